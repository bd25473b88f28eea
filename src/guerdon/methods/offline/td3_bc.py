"""TD3+BC: a deterministic actor-critic that stays near the data by one more term in its actor's loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import Metrics, method
from guerdon.methods.control import OfflineControl, no_grad, td_target

if TYPE_CHECKING:
    from guerdon.control.networks import QEnsemble
    from guerdon.control.replay import Batch
    from guerdon.training.control import ControlRun


def smoothed(
    action: torch.Tensor, noise: torch.Tensor, noise_clip: float, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """Target policy smoothing: a + clip(noise, -c, c) within the bounds (Fujimoto et al. 2018, eq. 14).

    Args:
        action, noise: (S, B, A), both in units of half the range of the actions but for `action`.
        noise_clip: c, in the same units.
        low, high: (A,) bounds of the actions.
    """
    half = (high - low) / 2
    return torch.addcmul(action, noise.clamp(-noise_clip, noise_clip), half).clamp(low, high)


def td3_bc_loss(q: torch.Tensor, policy: torch.Tensor, action: torch.Tensor, alpha: float) -> torch.Tensor:
    """mean_B[ -lambda Q(s, pi(s)) + mean_A (pi(s) - a)^2 ], lambda = alpha / mean_B |Q(s, pi(s))|: (S,).

    lambda is a constant to the gradient (Fujimoto and Gu 2021, arXiv 2106.06860, eq. 5 with the scale of its section 5;
    a mean over dimensions, as in its authors' code).

    Args:
        q: (S, B) Q(s, pi(s)).
        policy, action: (S, B, A) pi(s) and a.
    """
    return (policy - action).square().mean((-2, -1)) - q_scale(q, alpha) * q.mean(-1)


def q_scale(q: torch.Tensor, alpha: float) -> torch.Tensor:
    """lambda of `td3_bc_loss`, by seed: (S,)."""
    return alpha / q.detach().abs().mean(-1)


@method("td3-bc", learns_from="transitions", policy="control")
@dataclass(kw_only=True)
class TD3BC(OfflineControl):
    """TD3 with behaviour cloning (Fujimoto and Gu 2021, arXiv 2106.06860).

    Critics learn y = r + gamma min_k Qbar_k(s', pibar(s') + noise); the actor maximises the first of them while it
    imitates the data, lambda Q_1(s, pi(s)) - (pi(s) - a)^2, with lambda = alpha / mean |Q_1|. Settings are the
    published ones; the statistics that normalise observations are over next observations too.
    """

    normalize: bool = True  # scale observations by mean and standard deviation over the data
    lr: float = 3e-4  # learning rate of Adam, for all networks
    alpha: float = 2.5  # weight of Q against imitation; 0 imitates alone
    policy_delay: int = 2  # updates of the critics to one of the actor and of the target networks
    target_noise: float = 0.2  # deviation of the noise on target actions, in halves of the range of actions
    noise_clip: float = 0.5  # bound of that noise
    target_rate: float = 0.005  # share of the networks that goes into their targets

    actions: ClassVar[Literal["discrete", "continuous", "any"]] = "continuous"

    def check(self) -> None:
        check_range(vars(self), "lr", "alpha", "target_noise", "noise_clip")
        check_range(vars(self), "policy_delay", low=1)
        check_range(vars(self), "target_rate", high=1)

    def setup(self, run: ControlRun) -> None:
        from guerdon.control.networks import DeterministicActor, QEnsemble
        from guerdon.control.optim import Adam

        seeds, options = len(run.seeds), dict[str, Any](precision=run.precision)
        self.actor = run.network("actor", DeterministicActor(seeds, run.spec, self.hidden, **options))
        self.critic = run.network("critic", QEnsemble(seeds, run.spec, self.hidden, **options))
        self.first_critic = _first(self.critic, QEnsemble(seeds, run.spec, self.hidden, 1, **options))
        self.target_actor = run.add("target_actor", copy.deepcopy(self.actor).requires_grad_(False))
        self.target_critic = run.add("target_critic", copy.deepcopy(self.critic).requires_grad_(False))
        self.actor_optimizer = run.add("actor_optimizer", Adam(self.actor.parameters(), self.lr))
        self.critic_optimizer = run.add("critic_optimizer", Adam(self.critic.parameters(), self.lr))
        self.streams = run.streams
        run.act_with(self.actor, self.normalizer(run), self.critic)

    def before_update(self, step: int, total: int) -> None:
        self.moves_actor = (step + 1) % self.policy_delay == 0

    @no_grad
    def update(self, batch: Batch) -> Metrics:
        from guerdon.control.networks import Pass

        noise = self.target_noise * self.streams.normal("target_noise", *batch.action.shape[1:])
        next_action = smoothed(
            self.target_actor(batch.next_obs), noise, self.noise_clip, self.actor.low, self.actor.high
        )
        target = td_target(batch, self.target_critic(batch.next_obs, next_action).amin(1), self.gamma)
        judged = Pass(self.critic, batch.obs, batch.action)
        q = judged.output.squeeze(-1)
        error = q - target.unsqueeze(1)
        self.critic_optimizer.apply(judged.parameters(2 * error.unsqueeze(-1) / target.shape[1]))
        metrics = {"loss/q": error.square().sum(1).mean(-1), "value/q": q.mean((1, 2))}
        return metrics | self.update_actor(batch) if self.moves_actor else metrics

    def update_actor(self, batch: Batch) -> Metrics:
        """One step of the actor and of all target networks."""
        from guerdon.control.networks import Pass, ema_

        acting = Pass(self.actor, batch.obs)
        action = self.actor.distribution(acting.output)
        judged = Pass(self.first_critic, batch.obs, action)
        q = judged.output[:, 0, :, 0]
        loss, to_q = td3_bc_loss(q, action, batch.action, self.alpha), -q_scale(q, self.alpha) / q.shape[1]
        to_action = 2 * (action - batch.action) / action[0].numel()
        to_action += judged.beside(to_q.view(-1, 1, 1, 1).expand_as(judged.output))
        self.actor_optimizer.apply(acting.parameters(self.actor.to_outputs(to_action, acting.output)))
        ema_(self.target_critic, self.critic, self.target_rate)
        ema_(self.target_actor, self.actor, self.target_rate)
        return {"loss/policy": loss, "value/policy": q.mean(-1)}


def _first(critic: QEnsemble, one: QEnsemble) -> QEnsemble:
    """`one`, of a single member, as a view of the first member of `critic`."""
    one.encoder = critic.encoder
    for mine, theirs in zip(one.mlp.parameters(), critic.mlp.parameters(), strict=True):
        mine.requires_grad_(False).data = theirs.data[:, :1]
    return one
