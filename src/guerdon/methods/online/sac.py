"""Soft actor-critic: off-policy learning of a stochastic policy that is paid for its entropy too."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import Metrics, method
from guerdon.methods.control import ReplayControl, no_grad, td_target

if TYPE_CHECKING:
    from guerdon.control.replay import Batch
    from guerdon.training.control import ControlRun


def soft_value(q: torch.Tensor, log_prob: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """min_k Q_k(s, a) - alpha log pi(a|s) for actions drawn from pi: (S, B) (Haarnoja et al. 2018, eq. 3).

    Args:
        q: (S, K, B).
        log_prob: (S, B).
        alpha: (S,) temperature.
    """
    return torch.addcmul(q.amin(1), log_prob, alpha[:, None], value=-1)


def critic_loss(q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """sum_k E[ (Q_k(s, a) - y)^2 ] / 2, by seed: (S,) (Haarnoja et al. 2018, eq. 5).

    Args:
        q: (S, K, B).
        target: (S, B).
    """
    return (q - target.unsqueeze(1)).square().sum(1).mean(-1) / 2


def policy_slopes(
    mean: torch.Tensor, log_std: torch.Tensor, noise: torch.Tensor, to_action: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives of alpha log pi(a|s) - Q(s, a) by mean and log_std, at the action a = tanh(u), u = mean + std noise.

    by mean: 2 alpha a - (1 - a^2) dQ/da,    by log_std: std noise times that, less alpha

    since log pi = -noise^2 / 2 - log_std - log(1 - a^2) + a constant for each dimension (Haarnoja et al. 2018, eq. 9
    and appendix C). All but alpha are (S, B, A).

    Args:
        to_action: dQ/da.
        alpha: (S,).
    """
    spread = log_std.exp() * noise
    action, alpha = torch.tanh(mean + spread), alpha[:, None, None]
    to_mean = 2 * alpha * action - (1 - action.square()) * to_action
    return to_mean, to_mean * spread - alpha


def temperature_loss(log_alpha: torch.Tensor, entropy: torch.Tensor, target: float) -> torch.Tensor:
    """alpha (H - target) by seed: (S,), which falls as alpha falls where there is more entropy than the target.

    Haarnoja et al. 2018 (arXiv 1812.05905), eq. 18.

    Args:
        log_alpha: (S,).
        entropy: (S,) mean of -log pi, without gradient.
    """
    return log_alpha.exp() * (entropy - target)


@method("sac", learns_from="environment", policy="control")
@dataclass(kw_only=True)
class SAC(ReplayControl):
    """Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905): reward and entropy together, for continuous actions.

    y = r + gamma [ min_k Qbar_k(s', a') - alpha log pi(a'|s') ],    a' ~ pi(.|s')
    L_Q = sum_k E[ (Q_k(s, a) - y)^2 ] / 2
    L_pi = E[ alpha log pi(a|s) - min_k Q_k(s, a) ],    a ~ pi(.|s)
    L_alpha = alpha E[ -log pi(a|s) - target_entropy ]

    The policy is a tanh of a normal distribution between the bounds of the actions; entropy is counted as if these were
    -1 and 1, so that its target does not depend on units. Settings are the published ones.

    A buffer_size and batch_size of 1 with learning_starts=0 learn from the last transition alone.
    """

    learning_starts: int = 10_000  # environment steps before the first update, with random actions
    lr: float = 3e-4  # learning rate of Adam, for all networks and the temperature
    critics: int = 2  # K
    alpha: float | None = None  # temperature, the price of entropy; without one it is learned
    target_entropy: float | None = None  # at which a learned temperature stays, in nats; without one -1 per dimension
    target_rate: float = 0.005  # share of the critics that goes into their targets at each update

    actions: ClassVar[Literal["discrete", "continuous", "any"]] = "continuous"

    def check(self) -> None:
        check_range(vars(self), "lr")
        check_range(vars(self), "critics", low=1)
        if self.alpha is not None:
            check_range(vars(self), "alpha", above=True)
        if self.target_entropy is not None:
            check_range(vars(self), "target_entropy", low=-math.inf)
        check_range(vars(self), "target_rate", high=1)

    def setup(self, run: ControlRun) -> None:
        from guerdon.control.networks import GaussianActor, QEnsemble
        from guerdon.control.optim import Adam

        seeds, how = len(run.seeds), dict[str, Any](precision=run.precision)
        self.actor = run.network("actor", GaussianActor(seeds, run.spec, self.hidden, log_std=(-20.0, 2.0), **how))
        self.critic = run.network("critic", QEnsemble(seeds, run.spec, self.hidden, self.critics, **how))
        self.target = run.add("target", copy.deepcopy(self.critic).requires_grad_(False))
        start = torch.full((seeds,), self.alpha or 1.0, device=run.device).log()
        self.temperature = run.add("temperature", torch.nn.ParameterDict({"log_alpha": start}))
        self.log_alpha = self.temperature["log_alpha"]
        self.actor_optimizer = run.add("actor_optimizer", Adam(self.actor.parameters(), self.lr))
        self.critic_optimizer = run.add("critic_optimizer", Adam(self.critic.parameters(), self.lr))
        self.temperature_optimizer = run.add("temperature_optimizer", Adam([self.log_alpha], self.lr))
        self.wanted = -run.spec.actions if self.target_entropy is None else self.target_entropy
        self.unit = sum(math.log((high - low) / 2) for low, high in zip(run.spec.low, run.spec.high, strict=True))
        self.streams = run.streams
        run.act_with(self.actor, critic=self.critic)
        self.remember(run)

    def explore(self, run: ControlRun, obs: np.ndarray) -> np.ndarray:
        if run.cursor.step >= self.learning_starts:
            return run.policy.act(obs, run.streams)
        low, high = np.array(run.spec.low, np.float32), np.array(run.spec.high, np.float32)
        return low + (high - low) * run.streams.uniform("start", *obs.shape[1:2], run.spec.actions).cpu().numpy()

    @no_grad
    def update(self, batch: Batch) -> Metrics:
        from guerdon.control.networks import Pass, ema_

        noise, next_noise = self.streams.normal("noise", 2, *batch.action.shape[1:]).unbind(1)
        alpha, size = self.log_alpha.exp(), batch.reward.shape[1]
        next_action, next_log_prob = self.actor(batch.next_obs).sample(next_noise)
        next_value = soft_value(self.target(batch.next_obs, next_action), next_log_prob + self.unit, alpha)
        target = td_target(batch, next_value, self.gamma)
        judged = Pass(self.critic, batch.obs, batch.action)
        q = judged.output.squeeze(-1)
        self.critic_optimizer.apply(judged.parameters((q - target.unsqueeze(1)).unsqueeze(-1) / size))

        acting = Pass(self.actor, batch.obs)
        policy = self.actor.distribution(acting.output)
        action, log_prob = policy.sample(noise)
        log_prob = log_prob + self.unit
        judged = Pass(self.critic, batch.obs, action)
        q_policy = judged.output.squeeze(-1)
        least = torch.zeros_like(q_policy).scatter_(1, q_policy.argmin(1, keepdim=True), 1.0)
        assert policy.half is not None
        to_action = judged.beside(least.unsqueeze(-1)) * policy.half
        to_mean, to_log_std = policy_slopes(policy.mean, policy.log_std, noise, to_action, alpha)
        free = acting.output[..., to_mean.shape[-1] :] == policy.log_std  # not held at a bound
        self.actor_optimizer.apply(acting.parameters(torch.cat([to_mean, to_log_std * free], -1) / size))
        entropy = -log_prob.mean(-1)
        if self.alpha is None:
            # The derivative of exp(x) c is the same again.
            self.temperature_optimizer.apply([temperature_loss(self.log_alpha, entropy, self.wanted)])
        ema_(self.target, self.critic, self.target_rate)
        return {
            "loss/q": critic_loss(q, target),
            "loss/policy": -soft_value(q_policy, log_prob, alpha).mean(-1),
            "value/mean": q.mean((1, 2)),
            "policy/entropy": entropy,
            "policy/temperature": alpha,
        }
