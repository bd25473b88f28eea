"""Proximal policy optimisation in environments: several careful steps on what the policy itself has just done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import Metrics, method
from guerdon.methods.control import OnlineControl
from guerdon.methods.policy_gradient import clipped_surrogate

if TYPE_CHECKING:
    from guerdon.control.environments import Step
    from guerdon.training.config import ControlTraining
    from guerdon.training.control import ControlRun


def gae(
    reward: torch.Tensor,
    value: torch.Tensor,
    next_value: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    gamma: float,
    lamda: float,
) -> torch.Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16); all are (S, T, C).

    A_t = delta_t + gamma lamda (1 - ended_t) A_{t+1},    delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)

    Both kinds of end stop the sum; only termination stops the bootstrap, which for a truncated step is the value of the
    true last observation. The recursion takes log2(T) passes over all steps, each doubling how far a sum reaches.

    Args:
        value: V(s_t), of what was seen before the step.
        next_value: V(s'_t), of what the step led to.
    """
    total = torch.addcmul(reward - value, gamma * ~terminated, next_value)
    decay = gamma * lamda * ~(terminated | truncated)
    reach = 1
    while reach < total.shape[1]:
        total[:, :-reach] += decay[:, :-reach] * total[:, reach:]
        decay[:, :-reach] = decay[:, :-reach] * decay[:, reach:]
        reach *= 2
    return total


def weighted_mean(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Means (S,) of x (S, B), of those elements alone whose weight is 1 and not 0, where there are weights."""
    return x.mean(-1) if weight is None else (x * weight).sum(-1) / weight.sum(-1).clamp(min=1)


def value_loss(value: torch.Tensor, old: torch.Tensor, target: torch.Tensor, clip: float) -> torch.Tensor:
    """(V - target)^2 / 2, elementwise; with `clip` the larger of that and of the same with V kept within `clip` of old.

    Args:
        value, old: V(s) now and when the target was made.
        clip: 0 does not clip.
    """
    loss = (value - target).square()
    if clip:
        loss = torch.maximum(loss, (old + (value - old).clamp(-clip, clip) - target).square())
    return loss / 2


class Moments:
    """Running mean and standard deviation of arrays of one shape, for each of S seeds.

    Attributes:
        mean, std: (S, *shape) float32; 0 and 1 before anything was seen.
    """

    def __init__(self, seeds: int, shape: tuple[int, ...] = ()) -> None:
        self.count = 0
        self.centre, self.squares = np.zeros((2, seeds, *shape))
        self._tell()

    def update(self, x: np.ndarray) -> None:
        """Let `x` (S, ..., *shape) join (Chan, Golub and LeVeque 1983)."""
        seeds, *shape = self.centre.shape
        x = x.reshape(seeds, -1, *shape).astype(np.float64)
        n, mean = x.shape[1], x.mean(1)
        total, apart = self.count + n, mean - self.centre
        self.squares += x.var(1) * n + apart**2 * (self.count * n / total)
        self.centre += apart * (n / total)
        self.count = total
        self._tell()

    def _tell(self) -> None:
        self.mean = self.centre.astype(np.float32)
        self.std = np.sqrt(self.squares / max(self.count, 1) + 1e-8).astype(np.float32)
        if not self.count:
            self.std[:] = 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "centre": self.centre, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
        self.centre, self.squares = np.array(state["centre"]), np.array(state["squares"])
        self._tell()


class RewardScale(Moments):
    """Divides rewards by the running deviation of their discounted sum u <- gamma u + r, which ends with an episode."""

    def __init__(self, seeds: int, copies: int, gamma: float) -> None:
        super().__init__(seeds)
        self.gamma, self.sums = gamma, np.zeros((seeds, copies))

    def scale(self, reward: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """The rewards (S, T, C) of steps that follow those of the last call, scaled."""
        sums = np.empty(reward.shape)
        for t in range(reward.shape[1]):
            sums[:, t] = self.sums = self.gamma * self.sums + reward[:, t]
            self.sums = self.sums * ~ended[:, t]
        self.update(sums)
        return reward / self.std[:, None, None]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.sums = np.array(state["sums"])


class Rollout:
    """What happened since the last update: arrays (S, T, C, ...), filled step by step."""

    def __init__(self, seeds: int, steps: int, copies: int) -> None:
        self.shape, self.filled = (seeds, steps, copies), 0
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, **step: np.ndarray) -> bool:
        """Keep a step, each array (S, C, ...); True where the last place was filled and the next step is the first."""
        if not self.arrays:
            self.arrays = {name: np.empty((*self.shape, *x.shape[2:]), x.dtype) for name, x in step.items()}
        for name, x in step.items():
            self.arrays[name][:, self.filled] = x
        self.filled = (self.filled + 1) % self.shape[1]
        return self.filled == 0

    def state_dict(self) -> dict[str, Any]:
        return {"filled": self.filled, "arrays": self.arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.filled = state["filled"]
        self.arrays = {name: np.array(x) for name, x in state["arrays"].items()}


@dataclass
class Steps:
    """A mini-batch (S, B, ...)."""

    obs: torch.Tensor
    action: torch.Tensor
    log_prob: torch.Tensor  # of the action when it was taken
    value: torch.Tensor  # then
    advantage: torch.Tensor
    weight: torch.Tensor | None = None  # 1, or 0 of a step that took no action; None where all took theirs

    def take(self, index: torch.Tensor) -> Steps:
        """The steps `index` (S, B) of each seed."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return Steps(**{name: x[rows, index] for name, x in given.items() if x is not None})


@method("ppo-control", learns_from="environment", policy="control")
@dataclass(kw_only=True)
class PPO(OnlineControl):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347), for discrete and continuous actions.

    L = E[ -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) + value_coef L_V - entropy_coef H(pi(.|s)) ]

    with A from `gae` and L_V from `value_loss`, over `epochs` passes in mini-batches. Settings are those of the paper
    for MuJoCo with what its authors' code adds (Engstrom et al. 2020, arXiv 2005.12729): orthogonal initial weights,
    observations and rewards scaled, gradients clipped, a falling learning rate. For Atari the paper has copies=8,
    rollout=128, batch_size=256, epochs=3, lr=2.5e-4, entropy_coef=0.01.

    Statistics of observations stay as they are while a rollout is gathered and learned from. A rollout, batch_size and
    epochs of 1, without normalize_advantages, learn from the last transition alone.
    """

    hidden: tuple[int, ...] = (64, 64)  # widths of the hidden layers of every network, which have tanh
    batch_size: int = 64  # steps in a mini-batch
    copies: int = 1  # environments of each seed
    rollout: int = 2048  # steps of each environment between updates
    epochs: int = 10  # passes over a rollout
    lr: float = 3e-4  # learning rate of Adam
    anneal: bool = True  # the learning rate falls linearly to 0 over the run
    lamda: float = 0.95  # weight of longer returns in the advantages
    clip: float = 0.2  # ratios further than this from 1 gain nothing more
    value_clip: float = 0.0  # values further than this from their old ones gain nothing more; 0 does not clip
    value_coef: float = 0.5  # weight of the value loss
    entropy_coef: float = 0.0  # weight of the entropy
    max_grad_norm: float = 0.5  # each seed's gradient is clipped to this norm; 0 does not clip
    normalize_advantages: bool = True  # to mean 0 and deviation 1 in each mini-batch
    normalize_observations: bool = True  # of vectors, by running mean and deviation
    scale_rewards: bool = True  # by the running deviation of their discounted sum

    def check(self) -> None:
        check_range(vars(self), "copies", "rollout", "epochs", low=1)
        check_range(vars(self), "lr", "value_clip", "value_coef", "entropy_coef", "max_grad_norm")
        check_range(vars(self), "lamda", high=1)
        check_range(vars(self), "clip", high=1, above=True)
        if self.rollout * self.copies % self.batch_size:
            raise ConfigError(
                f"a rollout has {self.rollout * self.copies} steps (rollout times copies), which mini-batches of "
                f"{self.batch_size} cannot share out: make it a multiple of batch_size."
            )
        if self.batch_size == 1 and self.normalize_advantages:
            raise ConfigError("a mini-batch of one step has no deviation: give normalize_advantages=false.")

    def check_loop(self, training: ControlTraining) -> None:
        super().check_loop(training)
        if self.rollout * self.copies > self.total(training):
            raise ConfigError(
                f"the run ends after {self.total(training)} steps, before the first update after "
                f"{self.rollout * self.copies} (rollout times copies). Lower these, or raise max_samples."
            )

    def setup(self, run: ControlRun) -> None:
        from guerdon.control.networks import CategoricalActor, GaussianActor, Value
        from guerdon.control.optim import Adam

        seeds, how = len(run.seeds), dict[str, Any](activation="tanh", precision=run.precision)
        actor = (
            CategoricalActor(seeds, run.spec, self.hidden, **how)
            if run.spec.discrete
            else GaussianActor(seeds, run.spec, self.hidden, squash=False, state_dependent=False, **how)
        )
        self.actor = run.network("actor", actor, "orthogonal", head_gain=0.01)
        self.critic = run.network("critic", Value(seeds, run.spec, self.hidden, **how), "orthogonal", head_gain=1.0)
        parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = run.add("optimizer", Adam(parameters, self.lr, eps=1e-5, max_grad_norm=self.max_grad_norm))
        self.normalizer = None
        if self.normalize_observations and not run.spec.image:
            self.normalizer = run.add("observations", Moments(seeds, run.spec.observation))
        self.scaler = run.add("rewards", RewardScale(seeds, self.copies, self.gamma)) if self.scale_rewards else None
        self.gathered = run.add("rollout", Rollout(seeds, self.rollout, self.copies))
        self.compiled = run.compiled(self.update)
        run.act_with(self.actor, self.normalizer)

    def explore(self, run: ControlRun, obs: np.ndarray) -> np.ndarray:
        draw = run.streams.uniform if run.spec.discrete else run.streams.normal
        with torch.no_grad():
            policy = self.actor(self.seen(run, obs))
            # Not cut off at the bounds, as the actor's own actions are: the density is that of the whole normal.
            return policy.sample(draw("act", obs.shape[1], run.spec.actions))[0].cpu().numpy()

    def seen(self, run: ControlRun, obs: np.ndarray) -> torch.Tensor:
        """Observations (S, B, ...) as the networks see them."""
        if self.normalizer is not None:
            obs = (obs - self.normalizer.mean[:, None]) / self.normalizer.std[:, None]
        return torch.from_numpy(obs).to(run.device)

    def observe(self, run: ControlRun, obs: np.ndarray, actions: np.ndarray, step: Step) -> Metrics | None:
        full = self.gathered.add(
            obs=obs,
            action=actions,
            reward=step.reward,
            next_obs=step.final_obs,
            terminated=step.terminated,
            truncated=step.truncated,
            **({} if step.acted is None else {"acted": step.acted}),
        )
        if not full:
            return None
        if self.anneal:
            self.optimizer.lr = self.lr * (1 - self.done(run) + self.rollout * self.copies / self.total(run.config))
        batch, told = self.credit(run), []
        for order in (
            run.streams.uniform("order", self.epochs, batch.value.shape[1]).argsort(dim=-1, stable=True).unbind(1)
        ):
            for index in order.split(self.batch_size, 1):
                run.batch = batch.take(index)
                told.append(self.compiled(run.batch))
        if self.normalizer is not None:
            self.normalizer.update(self.gathered.arrays["obs"])
        return {name: torch.stack([metrics[name] for metrics in told]).mean(0) for name in told[0]}

    def interrupt(self) -> None:
        if self.gathered.arrays:
            self.gathered.arrays["truncated"][:, self.gathered.filled - 1] = True

    def credit(self, run: ControlRun) -> Steps:
        """What was gathered with its advantages, as one batch (S, T C, ...)."""
        arrays = self.gathered.arrays
        reward = arrays["reward"]
        if self.scaler is not None:
            reward = self.scaler.scale(reward, arrays["terminated"] | arrays["truncated"])
        facts = [torch.from_numpy(x).to(run.device) for x in (reward, arrays["terminated"], arrays["truncated"])]
        obs, next_obs = (self.seen(run, _flat(arrays[name])) for name in ("obs", "next_obs"))
        action = torch.from_numpy(_flat(arrays["action"])).to(run.device)
        with torch.no_grad():
            value, next_value = self.critic(obs), self.critic(next_obs)
            log_prob = self.actor(obs).log_prob(action)
        shape = arrays["reward"].shape
        earned, terminated, truncated = facts
        advantage = gae(
            earned, value.view(shape), next_value.view(shape), terminated, truncated, self.gamma, self.lamda
        )
        weight = None
        if "acted" in arrays:  # an episode has ended before a step that took no action: no advantage reaches past it
            weight = torch.from_numpy(_flat(arrays["acted"])).to(run.device, torch.float32)
        return Steps(obs, action, log_prob, value, advantage.flatten(1), weight)

    def update(self, batch: Steps) -> Metrics:  # type: ignore[override]
        policy, value, advantage = self.actor(batch.obs), self.critic(batch.obs), batch.advantage
        weight = batch.weight
        if self.normalize_advantages and weight is None:
            std, mean = torch.std_mean(advantage, -1, keepdim=True)
            advantage = (advantage - mean) / (std + 1e-8)
        elif self.normalize_advantages:
            advantage = advantage - weighted_mean(advantage, weight).unsqueeze(-1)
            advantage = advantage / (weighted_mean(advantage.square(), weight).sqrt().unsqueeze(-1) + 1e-8)
        log_ratio = policy.log_prob(batch.action) - batch.log_prob
        ratio = log_ratio.exp()
        losses, cut = clipped_surrogate(ratio, advantage, self.clip, self.clip)
        policy_loss, entropy = weighted_mean(losses, weight), weighted_mean(policy.entropy(), weight)
        v_losses = value_loss(value, batch.value, batch.advantage + batch.value, self.value_clip)
        v_loss = weighted_mean(v_losses, weight)
        self.optimizer.minimise(policy_loss + self.value_coef * v_loss - self.entropy_coef * entropy)
        return {
            "loss/policy": policy_loss.detach(),
            "loss/value": v_loss.detach(),
            "value/mean": weighted_mean(batch.value, weight),
            "policy/entropy": entropy.detach(),
            "policy/clip_share": weighted_mean(cut.float(), weight),
            "policy/kl": weighted_mean((ratio - 1 - log_ratio).detach(), weight),
        }


def _flat(x: np.ndarray) -> np.ndarray:
    """(S, T, C, ...) as (S, T C, ...)."""
    return x.reshape(len(x), -1, *x.shape[3:])
