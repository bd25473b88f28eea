"""Trials that train: runs in processes of their own or in this one, resumed where they were stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guerdon.errors import GuerdonError
from guerdon.evaluation.trials import Progress, Trial, guerdon_command, locked, run_trials
from guerdon.lazy import torch
from guerdon.training.rundir import RunDir

if TYPE_CHECKING:
    from guerdon.methods.base import LanguageMethod


class Diverged(GuerdonError):
    """A run whose loss is no number any more; the rows that it wrote before stand."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the order of sums, and so the last digits, would depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trained(method: str, options: Mapping[str, Any], training: Mapping[str, Any], directory: Path) -> RunDir:
    """A run in `directory/run`, trained and evaluated to its end.

    It computes on one thread, see `one_thread`.

    Raises:
        Diverged: of one of its seeds at least, the loss is not finite.
        GuerdonError: it failed otherwise; the message has the last lines of what it said.
    """
    run = directory / "run"
    directory.mkdir(parents=True, exist_ok=True)
    trial = Trial(run.name, method, dict(options), {"threads": 1, **training, "out": str(run)})
    with locked(directory) as lock:
        run_trials([trial], launch=guerdon_command, jobs=1, lock=lock, say=lambda line: None)
    progress = Progress.of(run)
    if progress.state != "done":
        failed = Diverged if re.search(r"loss/\S+ is (nan|-?inf)", progress.error) else GuerdonError
        raise failed(f"{run}: the trial failed at {progress.error}")
    return RunDir.open(run)


@contextmanager
def shared(directory: Path, **identity: Any) -> Iterator[Path]:
    """A place beside the trials for what several of them need: those with the same `identity` have it in turn.

    Args:
        directory: of one of these trials, `OUT/NN/SETTING/ARM/seeds-A-B`.
    """
    name = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    place = directory.parents[2] / "shared" / name
    place.mkdir(parents=True, exist_ok=True)
    with open(place / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield place


def learned(method: LanguageMethod, directory: Path, **training: Any) -> str:
    """The language policy that a method leaves in `directory`, trained in this process, on one thread, to its end.

    A run that was stopped goes on where it stood, and one that is done is not run again. Nothing is held out.

    Args:
        **training: fields of `LanguageTraining`.
    """
    from guerdon.training.config import LanguageTraining
    from guerdon.training.distributed import Distribution
    from guerdon.training.language import LanguageRun
    from guerdon.training.runner import run_loop

    config = LanguageTraining(holdout=0.0, out=str(directory), **training)
    rundir = RunDir(directory)
    if not RunDir.is_at(directory):
        rundir = RunDir.create(directory, method.name, method.options(), vars(config))
    if rundir.status["state"] != "done":
        with one_thread():
            run = LanguageRun(method, config, Distribution.start(), directory)
            method.setup(run)
            if rundir.latest_checkpoint() is None:
                run.forget_samples(0)
            run_loop(run, method, rundir, config)
    return str(directory / "policy")


def late_returns(run: RunDir, seeds: Sequence[int], share: float) -> list[float]:
    """Mean return, for each seed, of the episodes that ended in the last `share` of a run's steps.

    Raises:
        GuerdonError: no episode ended there.
    """
    means = []
    for i, seed in enumerate(seeds):
        rows = run.metrics(i)
        late = [row for row in rows if row["step"] > (1 - share) * rows[-1]["step"] and row["episode/count"]]
        count = sum(row["episode/count"] for row in late)
        if not count:
            raise GuerdonError(f"{run.path}: no episode of seed {seed} ended in the last {share:.0%} of its steps.")
        means.append(sum(row["episode/return"] * row["episode/count"] for row in late) / count)
    return means
