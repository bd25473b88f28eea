"""Environments in words by name: `KIND:NAME?param=value&param=value`, or a function of the user."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from guerdon.errors import ConfigError, near
from guerdon.fields import build
from guerdon.tasks.base import params_of

if TYPE_CHECKING:
    from guerdon.tasks.text.base import TextEnv

T = TypeVar("T")

# Kind -> what it holds; the module of that name makes it.
ENVIRONMENTS = {
    "babyai": "missions of BabyAI and MiniGrid, with what is seen in words: babyai:GoToLocal",
    "bandit": "machines to be tried, described in words: bandit:bernoulli, bandit:gaussian, bandit:contextual",
    "keys": "two keys to be pressed in turn, rewarded at the end only: keys:",
    "reasoning": "questions of reasoning-gym, answered in one step: reasoning:chain_sum",
    "textworld": "text adventures, generated here: textworld:coin, textworld:treasure, textworld:cooking",
}


@dataclass(frozen=True)
class TextSpec:
    """What a spec says before anything is imported.

    Attributes:
        spec: as given.
        kind: what stands before the colon.
        name: what stands after it; may be empty.
        params: option -> value as text.
    """

    spec: str
    kind: str
    name: str
    params: dict[str, str]

    def options(self, cls: type[T]) -> T:
        """The parameters as a dataclass of options, values read as YAML; `ConfigError` names one that does not fit."""
        import yaml

        values: dict[str, Any] = {}
        for name, text in self.params.items():
            try:
                values[name] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise ConfigError(f"{self.spec}: '{name}' has the value '{text}', which is not YAML.") from None
        return build(cls, values, self.spec)


def parse_text(spec: str) -> TextSpec:
    """Read the spec of an environment; imports no environment.

    Raises:
        ConfigError: it is malformed, or names a kind that there is not (with the nearest one).
    """
    head, _, query = spec.partition("?")
    kind, _, name = head.partition(":")
    if kind not in (*ENVIRONMENTS, "python"):
        kinds = ", ".join(f"{each}:" for each in ENVIRONMENTS)
        raise ConfigError(
            f"there is no environment in words '{spec}'.{near(kind, ENVIRONMENTS)} There are {kinds} and "
            "python:module.function for your own."
        )
    return TextSpec(spec, kind, name, params_of(spec, query))


def make_text(spec: str) -> TextEnv:
    """The environment in words that a spec names.

    Args:
        spec: `KIND:NAME?param=value&param=value` with one of `ENVIRONMENTS`, where % escapes stand for characters; or
            `python:module.function?param=value` of the user, which gives a `TextEnv`, or a Gymnasium environment whose
            spaces are text (see `guerdon.tasks.text.wrapped`).

    Raises:
        ConfigError: a kind, name or option that there is not, or a package that is not installed.
    """
    parsed = parse_text(spec)
    try:
        module = importlib.import_module(f"guerdon.tasks.text.{'wrapped' if parsed.kind == 'python' else parsed.kind}")
    except ModuleNotFoundError as error:
        if (error.name or "guerdon").startswith("guerdon"):
            raise
        extra = "textworld" if parsed.kind == "textworld" else "text"
        raise ConfigError(f"{spec} needs the package {error.name}: pip install 'guerdon[{extra}]'.") from error
    env: TextEnv = module.make(parsed)
    return env
