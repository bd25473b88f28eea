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
        from guerdon.control.simulators import make
        from guerdon.control.streaming.learners import TorchLearner, build_learner

        assert run.env is not None
        env = make(run.env)
        env.close()
        self.learner = run.add(
            "learner",
            build_learner(
                self.kind,
                self,
                run.spec,
                run.streams,
                time_limit=env.spec.max_episode_steps if env.spec else None,
                frames=4 if run.env.startswith("ALE/") else 1,
            ),
        )
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
    """Stream TD(lamda): the values of acting uniformly at random; the exported policy holds them and acts so."""

    kind = "td"

    def behave(self, run: ControlRun) -> np.ndarray:
        spec, streams = run.spec, run.streams
        if spec.discrete:
            return streams.integers("behaviour", spec.actions).numpy()
        low, high = np.array(spec.low, np.float32), np.array(spec.high, np.float32)
        return low + (high - low) * streams.uniform("behaviour", spec.actions).numpy()
