"""One process of a pair that shares weights: runs each of the jobs in `sys.argv[1]`, from its start or a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guerdon.methods.base import get_method
from guerdon.runs import resume, start
from guerdon.training.config import LanguageTraining
from guerdon.training.distributed import Distribution
from guerdon.training.progress import Silent
from guerdon.training.runner import Stopped


class StopAt(Silent):
    """Asks the run to stop after a step, as a scheduler would."""

    def __init__(self, step: int):
        self.step = step

    def update(self, step: int, done: float, metrics: Mapping[str, float]) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def begin(name: str, options: dict[str, Any], training: dict[str, Any], stop_at: int) -> None:
    """Start a run, and where `stop_at` is a step stop after it."""
    try:
        start(get_method(name)(**options), LanguageTraining(**training), StopAt(stop_at))
        assert not stop_at
    except Stopped:
        assert stop_at


def main(jobs: list[list[Any]]) -> None:
    distribution = Distribution.start()
    assert distribution.sharded and distribution.world == 2
    for name, options, training, stop_at in jobs:
        out = Path(training["out"])
        if not distribution.any(out.exists()):
            begin(name, options, training, stop_at)
            if stop_at and distribution.is_main:
                shutil.copytree(out, out.with_name(f"{out.name}-stopped"))
            distribution.barrier()
        resume(out)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
