"""Dataclass fields as configuration: help from comments, values from plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from guerdon.errors import ConfigError
from guerdon.fields import build, checked, options
from guerdon.methods.base import all_methods
from guerdon.training.config import ControlTraining, LanguageTraining


@dataclass(kw_only=True)
class Base:
    lr: float = 1e-3  # how fast
    name: str  # what it is called


@dataclass(kw_only=True)
class Derived(Base):
    lr: float = 1e-4
    kind: Literal["a", "b"] = "a"  # which # of them
    steps: int | None = None  # at most
    tags: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.99)  # two


def test_options_tell_comments_owners_and_defaults():
    found = {o.name: o for o in options(Derived)}
    assert [*found] == ["lr", "kind", "steps", "tags", "betas", "name"]
    assert (found["lr"].default, found["lr"].help, found["lr"].owner) == (1e-4, "how fast", Derived)
    assert (found["kind"].kind, found["kind"].help) == ("Literal['a', 'b']", "which # of them")
    assert found["name"].default is dataclasses.MISSING
    assert found["name"].owner is Base
    assert found["tags"].help == ""


def test_build_converts_what_yaml_and_json_make_of_values():
    built = build(Derived, {"name": "x", "lr": "1e-6", "tags": ["t"], "betas": [0, 1], "steps": None}, "r.yaml")
    assert built == Derived(name="x", lr=1e-6, tags=("t",), betas=(0.0, 1.0), steps=None)
    assert isinstance(built.betas[0], float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "x"}, r"^r\.yaml: there is no option 'nmae'\. Did you mean 'name'\?$"),
        ({}, r"^r\.yaml: 'name' is missing\.$"),
        ({"name": 3}, r"'name' has to be text, not 3"),
        ({"name": "x", "lr": "fast"}, r"'lr' has to be a number, not 'fast'"),
        ({"name": "x", "lr": True}, r"'lr' has to be a number, not True"),
        ({"name": "x", "kind": "c"}, r"'kind' has to be one of a, b, not 'c'"),
        ({"name": "x", "steps": 1.5}, r"'steps' has to be a whole number or nothing, not 1\.5"),
        ({"name": "x", "tags": "t"}, r"'tags' has to be a list of text, not 't'"),
        ({"name": "x", "tags": ["t", 1]}, r"'tags' has to be a list of text"),
    ],
)
def test_build_says_what_is_wrong(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Derived, values, "r.yaml")


def test_checked_leaves_out_what_is_not_given():
    assert checked(Derived, {"lr": 1}, "r.yaml") == {"lr": 1.0}


@pytest.mark.parametrize("name", all_methods())
def test_every_option_of_every_method_is_explained_and_its_own(name):
    method = all_methods()[name]
    runner = {f.name for f in dataclasses.fields(method.training)}
    for option in options(method):
        assert option.help, f"{name}: the field '{option.name}' has no comment"
        assert option.name not in runner, f"{name}: '{option.name}' is also an option of the runner"


@pytest.mark.parametrize("training", [LanguageTraining, ControlTraining])
def test_every_option_of_the_runner_is_explained(training):
    assert all(option.help for option in options(training))
