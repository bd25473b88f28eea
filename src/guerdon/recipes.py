"""Recipes: a method, its options and the runner's, written down in YAML.

method: dpo
options:        # fields of the method
  beta: 0.05
training:       # fields of the method's `training`, such as `guerdon.training.config.LanguageTraining`
  model: smollm2-135m
  data: pairs.jsonl

With `stages` in the place of `method` and `options` it is a chain, see `guerdon.chains`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, near
from guerdon.fields import checked
from guerdon.methods.base import get_method

KEYS = ("method", "options", "training")


@dataclass(frozen=True)
class Recipe:
    """What a recipe says; every name in it is known and every value has its field's type."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """What a YAML file says, unchecked; `ConfigError` where there is no such file or it is no mapping."""
    import yaml

    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(said, dict):
        raise ConfigError(f"recipe {path}: has to be a mapping with the keys {', '.join(KEYS)}.")
    return said


def read_recipe(path: str | Path) -> Recipe:
    """Read and check one YAML file.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, method or option (with the nearest name), a wrong type.
    """
    said = read_mapping(path)
    for key in said:
        if key not in KEYS:
            raise ConfigError(f"recipe {path}: there is no key '{key}'.{near(str(key), KEYS)} Keys: {', '.join(KEYS)}.")
    if not isinstance(said.get("method"), str):
        raise ConfigError(f"recipe {path}: 'method' has to name a method; `guerdon methods` lists them.")
    for key in KEYS[1:]:
        if not isinstance(said.setdefault(key, {}), dict):
            raise ConfigError(f"recipe {path}: '{key}' has to be a mapping of option names to values.")
    try:
        cls = get_method(said["method"])
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from None
    return Recipe(
        said["method"],
        checked(cls, said["options"], f"recipe {path}: options of {said['method']}"),
        checked(cls.training, said["training"], f"recipe {path}: training"),
    )
