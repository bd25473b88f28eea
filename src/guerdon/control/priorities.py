"""Sampling in proportion to priorities: a sum tree for each seed, all of them descended and updated together."""

from __future__ import annotations

from guerdon.lazy import torch

_CHILDREN = 16  # of a node: few levels, each one operation over a short row, beat many levels of two


class SumTree:
    """Non-negative weights of `size` leaves for each of S seeds, and draws in proportion to them in O(log size).

    A node is the float64 sum of its children, computed anew whenever one changes, so that no rounding error grows.
    """

    def __init__(self, seeds: int, size: int, device: torch.device | str = "cpu") -> None:
        self._size = size
        self._levels: list[torch.Tensor] = []  # from the leaves up to the children of the root, each (S, families, 16)
        while not self._levels or size > 1:
            size = -(-size // _CHILDREN)
            self._levels.append(torch.zeros(seeds, size, _CHILDREN, dtype=torch.float64, device=device))
        self._seed = torch.arange(seeds, device=device)[:, None]
        self._order = torch.arange(_CHILDREN, device=device)

    @property
    def weights(self) -> torch.Tensor:
        """(S, size), a view."""
        return self._levels[0].flatten(1)[:, : self._size]

    @property
    def total(self) -> torch.Tensor:
        """(S,) sums of weights."""
        return self._levels[-1].sum((1, 2))

    def set(self, index: torch.Tensor, weight: torch.Tensor) -> None:
        """Set the leaves `index` (S, B) to `weight` (S, B)."""
        value = weight.double()
        for level in self._levels:
            family = index // _CHILDREN
            level[self._seed, family, index % _CHILDREN] = value
            index, value = family, self._families(level, family).sum(-1)

    def find(self, mass: torch.Tensor) -> torch.Tensor:
        """The leaves (S, B) where the cumulated weight passes `mass` (S, B), below `total`; never one of weight 0."""
        mass, node = mass.double(), torch.zeros_like(mass, dtype=torch.int64)
        for level in reversed(self._levels):
            weight = self._families(level, node)
            cumulated = weight.cumsum(-1)
            # Rounding may leave more mass than there is weight; it must not end in an empty branch.
            last = ((weight > 0) * self._order).amax(-1)
            child = torch.minimum((cumulated <= mass[..., None]).sum(-1), last)[..., None]
            mass = mass - (cumulated - weight).gather(-1, child)[..., 0]
            node = node * _CHILDREN + child[..., 0]
        return node

    def _families(self, level: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The children (S, B, 16) of the nodes `index` (S, B)."""
        rows = (index + self._seed * level.shape[1]).reshape(-1)
        return level.flatten(0, 1).index_select(0, rows).view(*index.shape, _CHILDREN)
