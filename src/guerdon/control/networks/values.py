"""Networks that value states and actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from guerdon.control.networks.network import Network
from guerdon.control.spaces import Spec


class Value(Network):
    """V(s). `hidden`, `activation`, `layer_norm` and `precision` are those of `MLP`, here as in all that follows."""

    def __init__(self, seeds: int, spec: Spec, hidden: Sequence[int] = (256, 256), **options: Any) -> None:
        super().__init__(seeds, spec, 1, hidden, **options)

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (S, B, *obs) to values (S, B)."""
        return self.outputs(obs).squeeze(-1)


class QEnsemble(Network):
    """K critics Q_k(s, a) of continuous actions; of images all members share one encoder."""

    def __init__(
        self, seeds: int, spec: Spec, hidden: Sequence[int] = (256, 256), members: int = 2, **options: Any
    ) -> None:
        super().__init__(seeds, spec, 1, hidden, members, beside=spec.actions, **options)
        self.options |= {"members": members}

    @property
    def config(self) -> dict[str, Any]:
        """Plain data from which it is made again, without its parameters."""
        return {"seeds": self.seeds, **self.options}

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Observations (S, B, *obs) and actions (S, B, A) to values (S, K, B)."""
        return self.outputs(obs, action).squeeze(-1)


class DiscreteQ(Network):
    """Q(s, .) of discrete actions.

    Args:
        members: K members of an ensemble, or None for no axis of members.
        dueling: Q = V + A - mean over actions of A, the last layer giving V and A (Wang et al. 2016).
    """

    def __init__(
        self,
        seeds: int,
        spec: Spec,
        hidden: Sequence[int] = (256, 256),
        members: int | None = None,
        dueling: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(seeds, spec, spec.actions + dueling, hidden, members, **options)
        self.dueling = dueling
        self.options |= {"members": members, "dueling": dueling}

    @property
    def plain(self) -> bool:
        return super().plain and not self.dueling

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (S, B, *obs) to values (S, B, A), or (S, K, B, A) with members."""
        return self.outputs(obs)

    def outputs(self, obs: Tensor, *beside: Tensor) -> Tensor:
        q = super().outputs(obs)
        if not self.dueling:
            return q
        value, advantage = q[..., :1], q[..., 1:]
        return value + advantage - advantage.mean(-1, keepdim=True)
