"""Robust implicit Q-learning: IQL for data whose observations, actions, rewards or next observations are damaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import method
from guerdon.methods.offline.bc import ActorKind
from guerdon.methods.offline.iql import IQL


def huber_loss(q: torch.Tensor, target: torch.Tensor, delta: float) -> torch.Tensor:
    """d^2 / (2 delta) where |d| < delta, else |d| - delta / 2, with d = target - q; elementwise, q and target alike.

    Its gradient is at most 1. This is `torch.nn.functional.smooth_l1_loss`; `huber_loss` there is delta times as large.
    """
    return torch.nn.functional.smooth_l1_loss(q, target, reduction="none", beta=delta)


def quantile(q: torch.Tensor, alpha: float) -> torch.Tensor:
    """The alpha-quantile over K critics (S, K, B), linear between the two nearest: (S, B); alpha 0 is the minimum."""
    place = alpha * (q.shape[1] - 1)
    below = int(place)
    if place == 0:
        return q.amin(1)
    ordered = q.sort(1).values
    if place == below:
        return ordered[:, below]
    return torch.lerp(ordered[:, below], ordered[:, below + 1], place - below)


@method("riql", learns_from="transitions", paper=1, policy="control")
@dataclass(kw_only=True)
class RIQL(IQL):
    """Robust IQL (Yang et al. 2024, arXiv 2310.12955): IQL on scaled observations, with losses for heavy tails.

    u = Quantile_alpha over k of Qbar_k(s, a) - V(s)
    L_Q = E[ Huber_delta(r + gamma V(s') - Q_k(s, a)) ]
    L_pi = E[ min(exp(beta u), cap) |pi(s) - a|^2 ]

    delta is in units of the return. The paper's runs choose sigma in {0.1, 0.5, 1, 3} (delta 100, 4, 1, 0.111) and
    alpha in {0.1, 0.25, 0.5} for each task. Each part can be taken out: `td`, `ensemble`, `critics`, `actor`,
    `normalize`; with all of them out (and `init`) this is IQL. On data that is corrupted by `corrupt`, the metrics
    `corrupted/...` and `clean/...` compare the rows (see `iql.corruption_statistics`).
    """

    updates: int = 3_000_000  # updates of the published method
    normalize: bool = True  # scale observations by mean and standard deviation over the (corrupted) data
    critics: int = 5  # K
    actor: ActorKind = "deterministic"  # of continuous actions
    init: Literal["torch", "orthogonal", "edac"] = "edac"  # first weights; edac is for critics, others torch
    td: Literal["huber", "mse"] = "huber"  # loss of the critics
    huber_delta: float | None = None  # where the loss turns linear; lower is more robust; none is 1
    sigma: float | None = None  # the same as the paper tunes it, huber_delta = 1 / sigma^2: higher is more robust
    ensemble: Literal["quantile", "min", "mean"] = "quantile"  # of the critics
    alpha: float = 0.25  # which quantile; lower is more pessimistic
    target_range: tuple[float, ...] = ()  # (low, high) to which targets are clamped; the authors' code has -100, 1000

    def check(self) -> None:
        super().check()
        check_range(vars(self), "alpha", high=1)
        if self.huber_delta is not None and self.sigma is not None:
            raise ConfigError("huber_delta and sigma are one threshold, huber_delta = 1 / sigma^2: give one of them.")
        given = "huber_delta" if self.sigma is None else "sigma"
        if getattr(self, given) is not None:
            check_range(vars(self), given, above=True)
            if self.td == "mse":
                raise ConfigError(f"{given} is the threshold of the Huber loss, and td is mse: leave one of them out.")
        if self.target_range and (len(self.target_range) != 2 or self.target_range[0] >= self.target_range[1]):
            raise ConfigError(f"target_range is {self.target_range}: give two numbers, the lower one first.")

    @property
    def delta(self) -> float:
        """The threshold of the Huber loss."""
        if self.sigma is not None:
            return 1 / self.sigma**2
        return 1.0 if self.huber_delta is None else self.huber_delta

    def estimate(self, q: torch.Tensor) -> torch.Tensor:
        if self.ensemble == "mean":
            return q.mean(1)
        return quantile(q, self.alpha if self.ensemble == "quantile" else 0.0)

    def bound(self, target: torch.Tensor) -> torch.Tensor:
        return target.clamp(*self.target_range) if self.target_range else target

    def td_loss(self, q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.td == "mse":
            return super().td_loss(q, target)
        return huber_loss(q, target.unsqueeze(1).expand_as(q), self.delta)

    def td_slope(self, q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.td == "mse":
            return super().td_slope(q, target)
        return ((q - target.unsqueeze(1)) / self.delta).clamp(-1, 1)
