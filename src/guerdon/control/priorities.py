"""Sampling in proportion to priorities: a sum tree for each seed, all of them descended and updated together."""

from __future__ import annotations

from guerdon.lazy import torch


class SumTree:
    """Non-negative weights of `size` leaves for each of S seeds, and draws in proportion to them in O(log size).

    Node 1 is the root and node k has the children 2k and 2k + 1; a parent is the float64 sum of its children, computed
    anew whenever one changes, so that no rounding error grows.
    """

    def __init__(self, seeds: int, size: int, device: torch.device | str = "cpu") -> None:
        self.depth = max(1, (size - 1).bit_length())
        self._width = 2 << self.depth  # nodes of a tree, with the unused node 0
        self._leaves = slice(1 << self.depth, (1 << self.depth) + size)
        self._nodes = torch.zeros(seeds * self._width, dtype=torch.float64, device=device)
        self._base = torch.arange(seeds, device=device)[:, None] * self._width

    @property
    def weights(self) -> torch.Tensor:
        """(S, size), a view."""
        return self._nodes.view(-1, self._width)[:, self._leaves]

    @property
    def total(self) -> torch.Tensor:
        """(S,) sums of weights."""
        return self._nodes[self._base[:, 0] + 1]

    def set(self, index: torch.Tensor, weight: torch.Tensor) -> None:
        """Set the leaves `index` (S, B) to `weight` (S, B)."""
        node = index + self._leaves.start
        self._nodes[self._base + node] = weight.double()
        for _ in range(self.depth):
            node = node >> 1
            left = self._base + 2 * node
            self._nodes[self._base + node] = self._nodes[left] + self._nodes[left + 1]

    def find(self, mass: torch.Tensor) -> torch.Tensor:
        """The leaves (S, B) where the cumulated weight passes `mass` (S, B), below `total`; never one of weight 0."""
        mass, node = mass.double(), torch.ones_like(mass, dtype=torch.int64)
        for _ in range(self.depth):
            left = self._base + 2 * node
            below = self._nodes[left]
            # Rounding may leave more mass than there is weight; it must not end in an empty branch.
            right = (mass >= below) & (self._nodes[left + 1] > 0)
            mass = torch.where(right, mass - below, mass)
            node = 2 * node + right
        return node - self._leaves.start
