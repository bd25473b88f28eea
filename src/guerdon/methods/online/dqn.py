"""Deep Q-learning: action values that follow the Bellman optimality equation, learned from replayed transitions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import Metrics, method
from guerdon.methods.control import ReplayControl, no_grad, td_target

if TYPE_CHECKING:
    from guerdon.control.environments import Step
    from guerdon.control.replay import Batch
    from guerdon.training.control import ControlRun


def greedy_value(target: torch.Tensor, online: torch.Tensor | None = None) -> torch.Tensor:
    """max_a Qbar(s', a), or Qbar(s', argmax_a Q(s', a)) where the online network chooses: (S, B).

    The second is double Q-learning (van Hasselt, Guez and Silver 2016, eq. 4), which does not take the largest error
    for the largest value.

    Args:
        target: (S, B, A) values of the target network.
        online: (S, B, A) values of the online network, or None.
    """
    if online is None:
        return target.amax(-1)
    return target.gather(-1, online.argmax(-1, keepdim=True)).squeeze(-1)


def td_loss(q: torch.Tensor, target: torch.Tensor, kind: Literal["huber", "squared"]) -> torch.Tensor:
    """Of the error d = Q(s, a) - y, elementwise: d^2 / 2, or |d| - 1/2 where |d| > 1 with "huber"."""
    how = torch.nn.functional.smooth_l1_loss
    return how(q, target, reduction="none") if kind == "huber" else 0.5 * (q - target).square()


def td_slope(error: torch.Tensor, kind: Literal["huber", "squared"]) -> torch.Tensor:
    """Derivative of `td_loss` by q: the error itself, which "huber" clips to [-1, 1] (Mnih et al. 2015)."""
    return error.clamp(-1, 1) if kind == "huber" else error


@method("dqn", learns_from="environment", policy="control")
@dataclass(kw_only=True)
class DQN(ReplayControl):
    """Deep Q-networks (Mnih et al. 2015, Nature 518): one value for each discrete action, and the best one is taken.

    y = r + gamma max_a Qbar(s', a),    L = E[ huber(Q(s, a) - y) ]

    with Qbar an older copy of Q. The extensions are options: `double` (van Hasselt et al. 2016, arXiv 1509.06461),
    `dueling` (Wang et al. 2016, arXiv 1511.06581), `n_step`, and `priority` (Schaul et al. 2016, arXiv 1511.05952);
    with `priority` errors are weighed to undo the bias of the draws, fully at the end of the run.

    The defaults are for small problems, after those of CleanRL and Stable-Baselines3. Images pass the convolutions of
    the paper first, and its settings for Atari are hidden=(), batch_size=32, steps=12_500_000, buffer_size=1_000_000,
    learning_starts=50_000, train_every=4, target_every=40_000, epsilon_end=0.1, epsilon_decay=0.08, with RMSProp where
    this has Adam (of whose learning rates 6.25e-5 to 1e-4 are usual there).

    A buffer_size and batch_size of 1 with learning_starts=0 learn from the last transition alone.
    """

    hidden: tuple[int, ...] = (128, 128)  # widths of the hidden layers of every network
    batch_size: int = 128  # transitions per update
    steps: int = 500_000  # environment steps of each seed in the published method
    buffer_size: int = 100_000  # transitions that the replay buffer holds
    learning_starts: int = 1_000  # environment steps before the first update
    train_every: int = 1  # environment steps between updates
    lr: float = 2.5e-4  # learning rate of Adam
    loss: Literal["huber", "squared"] = "huber"  # of the error of Q
    max_grad_norm: float = 0.0  # each seed's gradient is clipped to this norm; 0 does not clip
    double: bool = False  # the online network chooses the action whose target value is taken
    dueling: bool = False  # Q = V + A - mean A
    n_step: int = 1  # rewards that are summed before the target network takes over
    priority: float = 0.0  # how much larger errors are replayed more often; 0 not at all, 0.6 in the paper
    beta: float = 0.4  # with priority: share of the bias undone at the start of the run; 1 at its end
    target_every: int = 500  # environment steps between updates of the target network
    target_rate: float = 1.0  # share of the network that then goes into the target network
    epsilon_start: float = 1.0  # share of random actions at the start
    epsilon_end: float = 0.05  # share of random actions after the decay
    epsilon_decay: float = 0.2  # share of the run over which epsilon falls linearly

    actions: ClassVar[Literal["discrete", "continuous", "any"]] = "discrete"

    def check(self) -> None:
        check_range(vars(self), "lr", "max_grad_norm")
        check_range(vars(self), "n_step", "target_every", low=1)
        check_range(vars(self), "priority", "beta", "target_rate", high=1)
        check_range(vars(self), "epsilon_start", "epsilon_end", "epsilon_decay", high=1)

    def setup(self, run: ControlRun) -> None:
        from guerdon.control.networks import GreedyQ, in_numpy
        from guerdon.control.optim import Adam

        how: dict[str, Any] = {"dueling": self.dueling, "precision": run.precision}
        self.q = run.network("q", GreedyQ(len(run.seeds), run.spec, self.hidden, **how))
        self.target = run.add("target", copy.deepcopy(self.q).requires_grad_(False))
        adam = Adam(self.q.parameters(), self.lr, max_grad_norm=self.max_grad_norm)
        self.optimizer = run.add("optimizer", adam)
        self.values = in_numpy(self.q)
        run.act_with(self.q)
        self.remember(run, n_step=self.n_step, gamma=self.gamma, priority=self.priority or None)

    def explore(self, run: ControlRun, obs: np.ndarray) -> np.ndarray:
        decayed = min(1.0, self.done(run) / self.epsilon_decay) if self.epsilon_decay else 1.0
        epsilon = self.epsilon_start + (self.epsilon_end - self.epsilon_start) * decayed
        drawn = run.streams.uniform("explore", obs.shape[1], 2).cpu().numpy()
        explores = drawn[..., 0] < epsilon
        if not explores.any():
            return self.values(obs).argmax(-1)
        # in float32 the product might be the number of actions
        actions = (drawn[..., 1].astype(np.float64) * run.spec.actions).astype(np.int64)
        return actions if explores.all() else np.where(explores, actions, self.values(obs).argmax(-1))

    def draw(self, run: ControlRun) -> Batch:
        return self.replay.sample(self.batch_size, self.beta + (1 - self.beta) * self.done(run))

    def observe(self, run: ControlRun, obs: np.ndarray, actions: np.ndarray, step: Step) -> Metrics | None:
        from guerdon.control.networks import ema_

        metrics = super().observe(run, obs, actions, step)
        if metrics and self.priority:
            self.replay.prioritise(run.batch.index, self.errors)
        if run.cursor.step % self.target_every == 0:
            ema_(self.target, self.q, self.target_rate)
        return metrics

    @no_grad
    def update(self, batch: Batch) -> Metrics:
        from guerdon.control.networks import Pass

        chooser = self.q(batch.next_obs) if self.double else None
        target = td_target(batch, greedy_value(self.target(batch.next_obs), chooser), self.gamma)
        seen, taken = Pass(self.q, batch.obs), batch.action.unsqueeze(-1)
        q = seen.output.gather(-1, taken).squeeze(-1)
        losses, slope = td_loss(q, target, self.loss), td_slope(q - target, self.loss)
        if batch.weight is not None:
            self.errors = q - target
            losses, slope = losses * batch.weight, slope * batch.weight
        gradient = torch.zeros_like(seen.output).scatter_(-1, taken, slope.unsqueeze(-1) / q.shape[1])
        self.optimizer.apply(seen.parameters(gradient))
        return {"loss/q": losses.mean(-1), "value/mean": q.mean(-1)}
