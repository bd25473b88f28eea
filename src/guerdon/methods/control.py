"""The loops that control methods share: over logged transitions, and in environments. All seeds move together.

A method builds its networks in `setup` (with the seed axis in front) and states one update on a batch of transitions;
what a batch holds, and what its metrics are, has one entry per seed. The loops below draw, update and report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import Method, Metrics, all_methods
from guerdon.training.config import ControlTraining, Training

if TYPE_CHECKING:
    from guerdon.control.environments import Step
    from guerdon.control.replay import Batch
    from guerdon.control.spaces import Spec
    from guerdon.control.transitions import Normalizer
    from guerdon.training.control import ControlRun


def td_target(batch: Batch, next_value: torch.Tensor, gamma: float) -> torch.Tensor:
    """r + gamma^n (1 - terminated) V(s'), n the steps that the reward sums over: (S, B). A truncation goes on.

    Args:
        next_value: (S, B) V(s').
    """
    following = next_value.masked_fill(batch.terminated, 0)
    if batch.steps is None:
        return torch.add(batch.reward, following, alpha=gamma)
    return torch.addcmul(batch.reward, gamma**batch.steps, following)


def no_grad(update: Callable[..., Metrics]) -> Callable[..., Metrics]:
    """`torch.no_grad` for an update that has its gradients in closed form, without importing torch for it."""

    @functools.wraps(update)
    def without(*args: Any) -> Metrics:
        with torch.no_grad():
            return update(*args)

    return without


@dataclass(kw_only=True)
class ControlMethod(Method):
    """What every control method says: its networks, its batches, its horizon."""

    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers of every network
    batch_size: int = 256  # transitions per update
    gamma: float = 0.99  # discount

    training: ClassVar[type[Training]] = ControlTraining
    copies = 1  # of each seed's environment; a method that steps several has a field for it
    predicts = False  # data of this method is a series to predict, and no transitions of an environment
    actions: ClassVar[Literal["discrete", "continuous", "any"]] = "any"  # what it can act with

    def check_loop(self, training: ControlTraining) -> None:
        check_range(vars(self), "batch_size", low=1)
        check_range(vars(self), "gamma", high=1)
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"hidden is {self.hidden}: every layer must be at least 1 wide.")

    def check_spec(self, spec: Spec, where: str) -> None:
        """Raise `ConfigError` where the method cannot act in such an environment; it names those that can."""
        found = "discrete" if spec.discrete else "continuous"
        if self.actions not in ("any", found):
            alike = [m for m in all_methods().values() if m.learns_from == self.learns_from and m.policy == "control"]
            able = [m.name for m in alike if getattr(m, "actions", "") in ("any", found)]
            raise ConfigError(
                f"{self.name} acts with {self.actions} actions, and those of {where} are {found}. "
                f"Methods for {found} actions: {', '.join(able) or 'none'}."
            )

    def update(self, batch: Batch) -> Metrics:
        """One step of every network on a batch (S, B, ...); metrics are tensors (S,)."""
        raise NotImplementedError


@dataclass(kw_only=True)
class OfflineControl(ControlMethod):
    """The loop over logged transitions: each seed draws its own batches, with replacement, from one shared data set."""

    updates: int = 1_000_000  # updates of the published method
    normalize: bool = False  # scale observations by mean and standard deviation over the data

    def normalizer(self, run: ControlRun) -> Normalizer | None:
        """What scales the observations of data and policy."""
        from guerdon.control.transitions import Normalizer

        assert run.data is not None
        return Normalizer.fit(run.data) if self.normalize else None

    def check_loop(self, training: ControlTraining) -> None:
        super().check_loop(training)
        check_range(vars(self), "updates", low=1)
        if training.data is None:
            raise ConfigError(
                f"{self.name} learns from logged transitions: give data (minari:ID, .npz or .hdf5). "
                "`guerdon collect --env` makes some."
            )

    def before_update(self, step: int, total: int) -> None:
        """Set what changes over a run of `total` updates, as learning rates do; not a part of what is compiled."""

    def learn(self, run: ControlRun) -> Iterator[Metrics]:
        from guerdon.control.replay import Replay
        from guerdon.control.transitions import Normalizer
        from guerdon.training.control import Means

        data, normalizer = run.data, run.policy.normalizer
        assert data is not None
        if isinstance(normalizer, Normalizer):
            data = data.scaled(normalizer)
        total = run.config.max_updates or self.updates
        replay = Replay.of(data, len(run.seeds), run.streams)
        update, means = run.compiled(self.update), Means()
        for stop in run.stretches(total):
            while run.cursor.step < stop:
                self.before_update(run.cursor.step, total)
                run.batch = replay.sample(self.batch_size)
                means.add(update(run.batch))
                run.cursor.step += 1
            yield means.take()


@dataclass(kw_only=True)
class OnlineControl(ControlMethod):
    """The loop in environments, one or more for each seed: act, step, observe."""

    steps: int = 1_000_000  # environment steps of each seed in the published method

    def check_loop(self, training: ControlTraining) -> None:
        super().check_loop(training)
        check_range(vars(self), "steps", low=1)
        if training.data is not None:
            raise ConfigError(
                f"{self.name} learns in an environment: give env instead of data. "
                f"`guerdon inspect {training.data}` says which methods can learn from the data."
            )

    def total(self, training: ControlTraining) -> int:
        """Environment steps of each seed in the whole run."""
        return training.max_samples or self.steps

    def done(self, run: ControlRun) -> float:
        """Share of the run that is over, by which what changes over a run is set."""
        return run.cursor.step / self.total(run.config)

    def explore(self, run: ControlRun, obs: np.ndarray) -> np.ndarray:
        """Actions (S, C[, A]) to learn from where the environments show `obs` (S, C, ...)."""
        raise NotImplementedError

    def observe(self, run: ControlRun, obs: np.ndarray, actions: np.ndarray, step: Step) -> Metrics | None:
        """Learn from one step of all environments; metrics where there was an update."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """What comes next does not follow from what was observed last: the environments could not be restored."""
        raise NotImplementedError

    def learn(self, run: ControlRun) -> Iterator[Metrics]:
        from guerdon.training.control import Means

        envs, cursor, means = run.envs, run.cursor, Means()
        assert envs is not None
        if cursor.step == 0:
            envs.reset()
        elif not envs.restorable:
            self.interrupt()
        for stop in run.stretches(self.total(run.config)):
            while cursor.step < stop:
                obs = envs.obs
                actions = self.explore(run, obs)
                step = envs.step(actions)
                cursor.step += self.copies
                cursor.samples = cursor.step
                if step.finished:
                    run.episodes.add(step.finished)
                metrics = self.observe(run, obs, actions, step)
                if metrics:
                    means.add(metrics)
            yield {**run.episodes.take(), **means.take()}


@dataclass(kw_only=True)
class ReplayControl(OnlineControl):
    """Learning from what was observed long ago too: all of it goes into a replay buffer, from which batches come."""

    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    learning_starts: int = 10_000  # environment steps before the first update
    train_every: int = 1  # environment steps between updates

    def check_loop(self, training: ControlTraining) -> None:
        super().check_loop(training)
        check_range(vars(self), "buffer_size", "train_every", low=1)
        check_range(vars(self), "learning_starts")
        if self.learning_starts >= self.total(training):
            raise ConfigError(
                f"learning_starts is {self.learning_starts}, and the run ends after {self.total(training)} steps: "
                "nothing would be learned. Lower it, or raise max_samples."
            )

    def remember(self, run: ControlRun, **options: Any) -> None:
        """Make the replay buffer, with `options` of `Replay`: the last part of a set-up."""
        from guerdon.control.replay import Replay

        assert run.envs is not None
        capacity = min(self.buffer_size, self.total(run.config))
        given = {"copies": run.envs.copies, "frames": run.envs.frames, **options}
        self.replay = run.add("replay", Replay(capacity, len(run.seeds), run.spec, run.streams, **given))
        self.compiled = run.compiled(self.update)

    def draw(self, run: ControlRun) -> Batch:
        """The batch of the next update."""
        return self.replay.sample(self.batch_size)

    def observe(self, run: ControlRun, obs: np.ndarray, actions: np.ndarray, step: Step) -> Metrics | None:
        self.replay.add(obs, actions, step.reward, step.final_obs, step.terminated, step.truncated)
        taken = run.cursor.step
        if taken <= self.learning_starts or taken % self.train_every:
            return None
        run.batch = self.draw(run)
        return self.compiled(run.batch)

    def interrupt(self) -> None:
        self.replay.cut()
