"""Environments of the user: `python:module.function`, whose function gives a `TextEnv` or a Gymnasium one of text.

A Gymnasium environment is brought back by playing its episode again, which is checked. Its tasks are numbers, from
which its resets take their seeds; what it tells in `info` as `actions` and `success` is passed on.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import yaml

from guerdon.errors import ConfigError
from guerdon.plugins import import_function
from guerdon.tasks.text.base import TextEnv, numbered
from guerdon.tasks.text.names import TextSpec


class Wrapped(TextEnv):
    """A Gymnasium environment with text spaces as a `TextEnv`; its own limit of steps holds beside `limit`."""

    copies = False
    closed = False

    def __init__(self, name: str, env: gymnasium.Env, limit: int = 100) -> None:
        self.env = env
        unwrapped: Any = env.unwrapped
        super().__init__(name, numbered(), instruction=getattr(unwrapped, "instruction", ""), limit=limit)

    def _begin(self) -> str:
        self.state, self._cut = None, False
        observation, self._told = self.env.reset(seed=int(self.chance.integers(2**31)))
        return str(observation)

    def _act(self, action: str) -> tuple[str, float, bool]:
        observation, reward, terminated, self._cut, self._told = self.env.step(action)
        return str(observation), float(reward), bool(terminated)

    def _actions(self) -> list[str] | None:
        actions = self._told.get("actions")
        return None if actions is None else list(actions)

    def _late(self) -> bool:
        return super()._late() or bool(self._cut)

    def _succeeded(self) -> bool:
        return bool(self._told.get("success", super()._succeeded()))


def make(spec: TextSpec) -> TextEnv:
    function = import_function(spec.name)
    env = function(**{name: yaml.safe_load(value) for name, value in spec.params.items()})
    if isinstance(env, TextEnv):
        return env
    texts = gymnasium.spaces.Text
    if (
        isinstance(env, gymnasium.Env)
        and isinstance(env.observation_space, texts)
        and isinstance(env.action_space, texts)
    ):
        return Wrapped(spec.spec, env)
    raise ConfigError(
        f"{spec.spec} gives {type(env).__name__}, where a TextEnv or a Gymnasium environment whose observations and "
        "actions are spaces of Text has to come."
    )
