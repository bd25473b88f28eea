"""Environments with a known optimum, and runs of online methods without the loop of the runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from guerdon.api import configure
from guerdon.control.tabular import TabularEnv
from guerdon.exact.mdp import TabularMDP
from guerdon.exact.worlds import chain
from guerdon.training.control import ControlRun
from guerdon.training.distributed import Distribution

CHAIN: TabularMDP = chain(4, 0.8, slip=0.2)


class Bandit(gymnasium.Env):
    """One step, with the reward -(a - 0.3)^2 of an action a in [-1, 1]."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        return np.zeros(1, np.float32), -float((action[0] - 0.3) ** 2), True, False, {}


def register() -> None:
    """Make `Chain-v0` and `Bandit-v0` known to Gymnasium."""
    for name, make in {"Chain-v0": lambda: TabularEnv(CHAIN), "Bandit-v0": Bandit}.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, make, max_episode_steps=50)


def begin(name: str, env: str, path: Path, **options: Any) -> tuple[Any, ControlRun]:
    """A method and its run, set up."""
    register()
    method, config = configure(name, {"env": env, **options}, "test")
    run = ControlRun(method, config, Distribution(), path)  # type: ignore[arg-type]
    method.setup(run)
    return method, run
