"""Implicit Q-learning: values and a policy from the actions of the data alone."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import Metrics, method
from guerdon.methods.control import OfflineControl, no_grad, td_target
from guerdon.methods.offline.bc import ActorKind, imitate, imitator

if TYPE_CHECKING:
    from guerdon.control.replay import Batch
    from guerdon.training.control import ControlRun


def expectile_loss(advantage: torch.Tensor, tau: float) -> torch.Tensor:
    """|tau - 1[u < 0]| u^2 of u = Q(s, a) - V(s), elementwise (Kostrikov et al. 2022, eq. 5)."""
    return torch.where(advantage < 0, 1 - tau, tau) * advantage.square()


def expectile_slope(advantage: torch.Tensor, tau: float) -> torch.Tensor:
    """Derivative of `expectile_loss` by u: 2 |tau - 1[u < 0]| u."""
    return 2 * torch.where(advantage < 0, 1 - tau, tau) * advantage


def of_actions(output: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Those of the outputs (S, K, B, O) of critics that are of these actions, (S, K, B)."""
    if action.is_floating_point():  # which critics see, so that they have one output
        return output.squeeze(-1)
    return output.gather(-1, action[:, None, :, None].expand(-1, output.shape[1], -1, -1)).squeeze(-1)


def to_outputs(slope: torch.Tensor, output: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """The gradient of outputs (S, K, B, O) from that of `of_actions`, (S, K, B)."""
    if action.is_floating_point():
        return slope.unsqueeze(-1)
    taken = action[:, None, :, None].expand(-1, output.shape[1], -1, -1)
    return torch.zeros_like(output).scatter_(-1, taken, slope.unsqueeze(-1))


def advantage_weight(advantage: torch.Tensor, beta: float, cap: float) -> torch.Tensor:
    """min(exp(beta u), cap) of u = Q(s, a) - V(s), elementwise (Kostrikov et al. 2022, eq. 7, and their code's cap)."""
    return (beta * advantage).exp().clamp(max=cap)


def corruption_statistics(
    q: torch.Tensor, estimate: torch.Tensor, target: torch.Tensor, corrupted: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What corruption does to values, for the corrupted and for the clean rows of a batch: numbers (S,).

    `q_std` is the mean deviation between critics, `q_gap` the mean of their mean less the estimate, `target_kurtosis`
    the fourth moment of the targets over their squared second one (3 for a normal distribution; heavy tails have more).

    Args:
        q: (S, K, B) target critics, K of at least 2.
        estimate: (S, B) what stands for all of them.
        target: (S, B) targets of the critics.
        corrupted: (S, B) bool.
    """
    rows = torch.stack([corrupted, ~corrupted]).to(q.dtype)
    rows = rows / rows.sum(-1, keepdim=True).clamp(min=1)
    centred = target - (rows * target).sum(-1, keepdim=True)
    variance, fourth = (rows * centred**2).sum(-1), (rows * centred**4).sum(-1)
    found = {
        "q_std": (rows * q.std(1)).sum(-1),
        "q_gap": (rows * (q.mean(1) - estimate)).sum(-1),
        "target_kurtosis": fourth / variance.square().clamp(min=1e-12),
    }
    return {f"{kind}/{name}": x[i] for name, x in found.items() for i, kind in enumerate(("corrupted", "clean"))}


@method("iql", learns_from="transitions", policy="control")
@dataclass(kw_only=True)
class IQL(OfflineControl):
    """Implicit Q-learning (Kostrikov, Nair and Levine 2022, arXiv 2110.06169), which never asks for unseen actions.

    u = min_k Qbar_k(s, a) - V(s)
    L_V = E[ |tau - 1[u < 0]| u^2 ]
    L_Q = E[ (r + gamma V(s') - Q_k(s, a))^2 ]
    L_pi = E[ -min(exp(beta u), cap) log pi(a|s) ]

    u and V(s') are taken before any network moves. The actor's learning rate falls to 0 over the run, by a cosine.
    Where actions are discrete the actor is categorical and Q has an output for each. The actor of the authors' code is
    `bounded-gaussian`; the default is that of the IQL beside RIQL (Yang et al. 2024).
    """

    lr: float = 3e-4  # learning rate of Adam, for all networks; the actor's is the first of its cosine
    tau: float = 0.7  # expectile: 0.5 values the behaviour, 1 the best of its actions
    beta: float = 3.0  # inverse temperature of the weights: 0 clones the behaviour
    weight_cap: float = 100.0  # weights are at most this
    critics: int = 2  # K
    actor: ActorKind = "gaussian"  # of continuous actions
    target_rate: float = 0.005  # share of the critics that goes into their targets at each update
    init: Literal["torch", "orthogonal", "edac"] = "orthogonal"  # first weights; edac is for critics, others torch

    def check(self) -> None:
        check_range(vars(self), "lr", "beta")
        check_range(vars(self), "tau", high=1, above=True, below=True)
        check_range(vars(self), "weight_cap", above=True)
        check_range(vars(self), "critics", low=1)
        check_range(vars(self), "target_rate", high=1)

    def setup(self, run: ControlRun) -> None:
        from guerdon.control.networks import DiscreteQ, QEnsemble, Value
        from guerdon.control.optim import Adam

        critic = DiscreteQ if run.spec.discrete else QEnsemble
        beside: Any = {"how": "torch" if self.init == "edac" else self.init, "head_gain": math.sqrt(2)}
        new = len(run.seeds), run.spec, self.hidden
        self.value = run.network("value", Value(*new, precision=run.precision), **beside)
        self.critic = run.network(
            "critic", critic(*new, members=self.critics, precision=run.precision), self.init, math.sqrt(2)
        )
        self.target = run.add("target", copy.deepcopy(self.critic).requires_grad_(False))
        self.pi = run.network("actor", imitator(run, self.actor, self.hidden), **beside)
        values = [*self.value.parameters(), *self.critic.parameters()]
        self.optimizer = run.add("optimizer", Adam(values, self.lr))
        self.actor_optimizer = run.add("actor_optimizer", Adam(self.pi.parameters(), self.lr))
        self.corrupted = None
        if run.corrupted and self.critics > 1:
            self.corrupted = torch.as_tensor(np.any([*run.corrupted.values()], axis=0), device=run.device)
        run.act_with(self.pi, self.normalizer(run), None if run.spec.discrete else self.critic)

    def before_update(self, step: int, total: int) -> None:
        self.actor_optimizer.lr = self.lr * (1 + math.cos(math.pi * step / total)) / 2

    @no_grad
    def update(self, batch: Batch) -> Metrics:
        from guerdon.control.networks import Pass, ema_

        seen = (batch.obs, batch.action) if batch.action.is_floating_point() else (batch.obs,)
        target_q = of_actions(self.target.outputs(*seen), batch.action)
        estimate = self.estimate(target_q)
        target = self.bound(td_target(batch, self.value(batch.next_obs), self.gamma))
        judged, valued = Pass(self.critic, *seen), Pass(self.value, batch.obs)
        value, q = valued.output.squeeze(-1), of_actions(judged.output, batch.action)
        advantage = estimate - value
        to_value = (expectile_slope(advantage, self.tau) / -value.shape[1]).unsqueeze(-1)
        to_q = to_outputs(self.td_slope(q, target) / q[0].numel(), judged.output, batch.action)
        self.optimizer.apply([*valued.parameters(to_value), *judged.parameters(to_q)])
        ema_(self.target, self.critic, self.target_rate)

        weight = advantage_weight(advantage, self.beta, self.weight_cap)
        policy_loss = imitate(self.pi, self.actor_optimizer, batch, weight)
        metrics = {
            "loss/value": expectile_loss(advantage, self.tau).mean(-1),
            "loss/q": self.td_loss(q, target).mean((1, 2)),
            "loss/policy": policy_loss,
            "value/mean": value.mean(-1),
            "policy/weight": weight.mean(-1),
        }
        if self.corrupted is not None:
            metrics |= corruption_statistics(target_q, estimate, target, self.corrupted[batch.index])
        return metrics

    def estimate(self, q: torch.Tensor) -> torch.Tensor:
        """What stands for all target critics (S, K, B): (S, B)."""
        return q.amin(1)

    def bound(self, target: torch.Tensor) -> torch.Tensor:
        """The targets (S, B) of the critics, kept where they may be."""
        return target

    def td_loss(self, q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of every critic (S, K, B) at its target (S, B): (S, K, B)."""
        return (q - target.unsqueeze(1)).square()

    def td_slope(self, q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Derivative of `td_loss` by q."""
        return 2 * (q - target.unsqueeze(1))
