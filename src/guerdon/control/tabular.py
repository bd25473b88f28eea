"""Tabular MDPs as deep methods see them: a Gymnasium environment and logged transitions, states one-hot."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from guerdon.control.spaces import Spec
from guerdon.control.transitions import Transitions
from guerdon.errors import ConfigError
from guerdon.exact.mdp import TabularMDP
from guerdon.exact.samples import Samples


class TabularEnv(gymnasium.Env):
    """One MDP (no leading axes) as an environment.

    Observations are one-hot float32 (S,), actions `Discrete(A)`; an episode terminates in a terminal state and is
    never truncated (`gymnasium.wrappers.TimeLimit` does that). `info["state"]` is the index of the state.

    Raises `ConfigError` for a batch of MDPs.
    """

    def __init__(self, mdp: TabularMDP):
        if mdp.rewards.ndim != 3:
            raise ConfigError(f"an environment is one MDP, not a batch of shape {mdp.rewards.shape[:-3]}: take one.")
        self.mdp = mdp
        self.observation_space = gymnasium.spaces.Box(0, 1, (mdp.states,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(mdp.actions)
        self.state = 0
        self._start = mdp.start.cumsum()
        self._moves = mdp.transitions.cumsum(-1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self._draw(self._start)
        return self._seen()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        before, self.state = self.state, self._draw(self._moves[self.state, action])
        observation, info = self._seen()
        reward = float(self.mdp.rewards[before, action, self.state])
        return observation, reward, bool(self.mdp.terminal[self.state]), False, info

    def _draw(self, steps: np.ndarray) -> int:
        return int(np.searchsorted(steps, self.np_random.random() * steps[-1], side="right"))

    def _seen(self) -> tuple[np.ndarray, dict[str, Any]]:
        observation = np.zeros(self.mdp.states, dtype=np.float32)
        observation[self.state] = 1
        return observation, {"state": self.state}


def as_transitions(samples: Samples) -> Transitions:
    """A table (no leading axes) row by row, states one-hot; each row is an episode, truncated where it does not end."""
    states, actions, _ = at = np.nonzero(samples.seen)
    terminated = samples.terminated[at]
    one_hot = np.eye(samples.seen.shape[0], dtype=np.float32)
    return Transitions(
        observations=one_hot[states],
        actions=actions,
        rewards=samples.rewards[at].astype(np.float32),
        next_observations=one_hot[samples.next_states[at]],
        terminated=terminated,
        truncated=~terminated,
        episode=np.arange(len(states)),
        spec=Spec((len(one_hot),), image=False, discrete=True, actions=samples.seen.shape[1], low=(), high=()),
        source="a table of transitions",
    )
