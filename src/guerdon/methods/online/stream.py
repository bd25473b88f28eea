"""Streaming deep reinforcement learning: every transition is learned from once, when it comes, and then forgotten.

    delta = r + gamma V(s') (1 - done) - V(s)
    e <- gamma lamda e + grad V(s),    w <- w + lr / max(M, 1) delta e,    M = lr kappa max(|delta|, 1) |e|_1

No replay buffer, no target network, no batch. What makes it stable are eligibility traces, a step that cannot overshoot
(ObGD), normalisation within the network and of observations and rewards, and sparse initial weights; each can be left
out. `control.streaming` has the learners. Elsayed, Vasan and Mahmood 2024, arXiv 2410.14606.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from guerdon.control.ingredients import ActorCriticIngredients, Ingredients, ValueIngredients
from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.methods.base import Metrics, method
from guerdon.methods.control import ControlMethod

if TYPE_CHECKING:
    from guerdon.control.transitions import Transitions
    from guerdon.training.config import ControlTraining
    from guerdon.training.control import ControlRun


@dataclass(kw_only=True)
class StreamMethod(Ingredients, ControlMethod):
    """The loop of streaming learners: each seed in one environment, a step of learning for each step in it."""

    steps: int = 500_000  # environment steps of each seed in the published method

    batch_size: ClassVar[int] = 1  # type: ignore[misc]
    kind: ClassVar[Literal["td", "q", "sarsa", "ac"]]

    def check_loop(self, training: ControlTraining) -> None:
        check_range(vars(self), "steps", low=1)
        if training.data is not None:
            raise ConfigError(
                f"{self.name} learns in an environment, from what happens there as it happens: give env instead of "
                f"data. `guerdon inspect {training.data}` says which methods can learn from the data."
            )

    def setup(self, run: ControlRun) -> None:
        from guerdon.control.simulators import frames_of, make
        from guerdon.control.streaming.learners import TorchLearner, build_learner

        known = {}
        if run.env is not None:
            env = make(run.env)
            env.close()
            known = {"time_limit": env.spec.max_episode_steps if env.spec else None, "frames": frames_of(run.env)}
        self.learner = run.add("learner", build_learner(self.kind, self, run.spec, run.streams, **known))
        if isinstance(self.learner, TorchLearner) and not run.spec.image:
            run.notes.append("numba is not installed: streaming learners are some twenty times faster with it")
        if self.learner.unconnected:
            run.notes.append(
                f"{self.learner.unconnected} of {self.name}'s units begin without any incoming weight, since "
                f"{self.sparsity:g} of the weights begin at 0: connect_all leaves them one"
            )
        run.act_with(*self.learner.policy())

    def behave(self, run: ControlRun) -> np.ndarray:
        """What is done next, (S,) or (S, A)."""
        return self.learner.actions

    def learn(self, run: ControlRun) -> Iterator[Metrics]:
        learner, envs, cursor = self.learner, run.envs, run.cursor
        total = run.config.max_samples or self.steps
        assert envs is not None
        learner.epsilon = self.epsilon(cursor.step / total)
        if cursor.step == 0:
            learner.begin(envs.reset()[:, 0])
        elif not envs.restorable:
            learner.begin(envs.obs[:, 0])
        run.act_with(*learner.policy())
        for stop in run.stretches(total):
            while cursor.step < stop:
                step = envs.step(self.behave(run)[:, None])
                cursor.step += 1
                if step.finished:
                    run.episodes.add(step.finished)
                learner.epsilon = self.epsilon(cursor.step / total)
                learner.step(*(x[:, 0] for x in step[:5]))
            cursor.samples = cursor.step
            run.act_with(*learner.policy())
            yield {**run.episodes.take(), **learner.take()}


@method("stream-q", learns_from="environment", paper=56, policy="control")
@dataclass(kw_only=True)
class StreamQ(ValueIngredients, StreamMethod):
    """Stream Q(lamda), Watkins's: bootstraps from the best action, and forgets its trace after any other one."""

    kind = "q"
    actions = "discrete"


@method("stream-sarsa", learns_from="environment", paper=56, policy="control")
@dataclass(kw_only=True)
class StreamSARSA(ValueIngredients, StreamMethod):
    """Stream SARSA(lamda): bootstraps from the action that will be taken."""

    kind = "sarsa"
    actions = "discrete"


@method("stream-ac", learns_from="environment", paper=56, policy="control")
@dataclass(kw_only=True)
class StreamAC(ActorCriticIngredients, StreamMethod):
    """Stream AC(lamda): V(s) as in TD, and a policy along grad [log pi(a|s) + entropy_coef sign(delta) H(pi(.|s))]."""

    steps: int = 2_000_000  # environment steps of each seed in the published method

    kind = "ac"


@method("stream-td", learns_from="environment", paper=56, policy="control")
@dataclass(kw_only=True)
class StreamTD(StreamMethod):
    """Stream TD(lamda): the values of acting uniformly at random; the exported policy holds them and acts so.

    With data, a .csv or .parquet file with a row for each time, it predicts in one pass: at each row what its target
    (`FILE?target=COLUMN`, else the last column) will be, G_t = sum_k gamma^k c_{t+k+1}, seeing running means of all
    columns. `predictions.csv` in the run has what was said of each row before its future was known, and what came.
    """

    trace: float = 0.999  # with data: decay of the running means; 0 shows the rows as they are

    kind = "td"
    predicts = True

    def check(self) -> None:
        super().check()
        check_range(vars(self), "trace", high=1, below=True)

    def check_loop(self, training: ControlTraining) -> None:
        if training.data is None:
            return super().check_loop(training)
        if training.env is not None or training.corrupt:
            what = "env" if training.env is not None else "corrupt"
            raise ConfigError(f"{self.name} predicts the columns of {training.data}: leave {what} out.")

    def setup(self, run: ControlRun) -> None:
        super().setup(run)
        if run.data is not None:
            from guerdon.control.series import Forecast

            self.forecast = run.add("forecast", Forecast(len(run.seeds), run.data.rewards, self.gamma))

    def learn(self, run: ControlRun) -> Iterator[Metrics]:
        if run.data is None:
            yield from super().learn(run)
        else:
            yield from self.predict(run, run.data)

    def predict(self, run: ControlRun, data: Transitions) -> Iterator[Metrics]:
        """One pass over a series, the same for all seeds."""
        from guerdon.control.series import running_means

        learner, cursor, seeds = self.learner, run.cursor, len(run.seeds)
        rows = np.concatenate([data.observations, data.next_observations[-1:]])
        seen = np.repeat(running_means(rows, self.trace)[:, None], seeds, 1)
        value = learner.names.index("value/mean")
        if cursor.step == 0:
            learner.begin(seen[0])
        for stop in run.stretches(min(run.config.max_updates or len(data), len(data))):
            start = cursor.step
            while cursor.step < stop:
                t = cursor.step
                before, scale = learner.tally[:, value].copy(), learner.reward_scale()
                reward, terminated, truncated = (
                    np.repeat(x[t], seeds) for x in (data.rewards, data.terminated, data.truncated)
                )
                learner.step(seen[t + 1], reward, terminated, truncated, seen[t + 1])
                self.forecast.values[:, t] = (learner.tally[:, value] - before) * scale
                cursor.step += 1
            run.act_with(*learner.policy())
            yield {**learner.take(), **self.forecast.errors(start, stop)}
        self.forecast.write(run.directory / "predictions.csv", run.seeds)

    def behave(self, run: ControlRun) -> np.ndarray:
        spec, streams = run.spec, run.streams
        if spec.discrete:
            return streams.integers("behaviour", spec.actions).numpy()
        low, high = np.array(spec.low, np.float32), np.array(spec.high, np.float32)
        return low + (high - low) * streams.uniform("behaviour", spec.actions).numpy()
