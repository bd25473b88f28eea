from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import guerdon
from guerdon.evaluation.trials import Stage, Trial
from guerdon.methods import base


@dataclass(kw_only=True)
class Toy(base.Method):
    """A method whose trials `trial.py` plays."""

    skill: float = 0.5
    crash: str = ""
    pause: float = 0.0


def register_toys() -> None:
    for name in ("toy", "rival"):
        base.method(name, learns_from="verifier")(dataclass(kw_only=True)(type(name, (Toy,), {})))


def toy_launch(trial: Trial, stage: Stage) -> list[str]:
    script = Path(__file__).with_name("trial.py")
    return [sys.executable, str(script), stage, json.dumps(dataclasses.asdict(trial))]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", base.all_methods())
    monkeypatch.setenv("PYTHONPATH", str(Path(guerdon.__file__).parents[1]))
    register_toys()


@pytest.fixture
def launch():
    return toy_launch
