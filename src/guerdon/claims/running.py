"""Running claims: trials one after the other, in processes or as Ray tasks, each kept as soon as it is finished.

What stands in the directory:

    OUT/NN/SETTING/ARM/seeds-0-7.json     the evaluations of one trial; the same command goes on with what is there
    OUT/NN/SETTING/ARM/seeds-0-7/         where it was at work
    OUT/NN/result.json, plot.svg          of the whole claim; OUT/NN-quick/ holds the same of the quick version
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guerdon import __version__
from guerdon.claims.base import Claim, Trial, judge_claim
from guerdon.claims.showing import plot
from guerdon.errors import ConfigError, DataError
from guerdon.evaluation.metrics import Evaluation, load_evaluations, save_evaluations
from guerdon.evaluation.trials import locked
from guerdon.training.rundir import _environment

Found = dict[str, dict[str, dict[int, Evaluation]]]  # setting -> arm -> seed -> evaluation
QUICK = "This was the quick version, which shows that everything runs; only the full one says something of the claim."
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Task:
    """One trial of a claim."""

    trial: Trial
    where: str
    label: str
    arm: Mapping[str, Any]
    settings: Mapping[str, Any]
    seeds: range
    directory: Path

    @property
    def file(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.json")

    @property
    def key(self) -> dict[str, Any]:
        """What its evaluations depend on."""
        return json.loads(json.dumps({"arm": self.arm, "settings": self.settings, "guerdon": __version__}))

    def load(self) -> dict[int, Evaluation] | None:
        """What was kept, or None; `ConfigError` where it was made otherwise."""
        if not self.file.exists():
            return None
        found = dict(zip(self.seeds, load_evaluations(self.file).values(), strict=True))
        if any({k: e.settings.get(k) for k in self.key} != self.key for e in found.values()):
            raise ConfigError(
                f"{self.file} was made with other settings or another version of guerdon: choose another --out, or "
                "delete it to run the trial again."
            )
        return found

    def save(self, found: Mapping[int, Evaluation], seconds: float) -> None:
        for evaluation in found.values():
            evaluation.settings = {**self.key, "seconds": seconds / len(found)}
        save_evaluations(self.file, found)


def reproduce(
    claim: Claim,
    *,
    out: str | Path,
    quick: bool = False,
    seeds: int | None = None,
    jobs: int = 1,
    ray: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run a claim's trials and judge them; the result, as plain data, is written to `out/NN/result.json`.

    That of the full version, with all its seeds, becomes the claim's result in the library, too. Called again it goes
    on where it stopped.

    Args:
        out: directory of all claims.
        quick: the small version, which shows that everything runs.
        seeds: how many; the claim's own where not given.
        jobs: trials at the same time, each in a process.
        ray: run the trials as Ray tasks instead, on the cluster that RAY_ADDRESS names or on this machine.
        say: is told a line about each trial that finishes.

    Raises:
        ConfigError: numbers that cannot be meant, a busy directory, or one that holds trials made otherwise.
        GuerdonError: a trial failed; those that finished are kept.
    """
    count = seeds if seeds is not None else claim.quick_seeds if quick else claim.seeds
    if count < 2:
        raise ConfigError(f"reproduce: seeds is {count}, and one run says nothing of a claim: give at least 2.")
    if jobs < 1:
        raise ConfigError(f"reproduce: jobs has to be at least 1, not {jobs}.")
    out = Path(out) / (f"{claim.paper:02d}-quick" if quick else f"{claim.paper:02d}")
    tasks = _tasks(claim, out, count, quick)
    found: Found = {where: {label: {} for label in claim.arms_of(where)} for where in claim.settings}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another --out.") from error
    with locked(out):
        waiting = []
        for task in tasks:
            kept = task.load()
            found[task.where][task.label] |= kept or {}
            if kept is None:
                waiting.append(task)
        run = _as_ray_tasks if ray else _in_processes if jobs > 1 else _one_by_one
        for i, evaluations, seconds in run(waiting, jobs):
            task = waiting[i]
            task.save(evaluations, seconds)
            found[task.where][task.label] |= evaluations
            say(f"{claim.paper:02d} {task.where} {task.label}, seeds {_span(task.seeds)}: {seconds:.0f} s")
        # in the order of the seeds, whichever finished first
        ordered = {where: {a: dict(sorted(e.items())) for a, e in arms.items()} for where, arms in found.items()}
        result = _result(claim, ordered, quick)
        _write(out / "result.json", result)
        (out / "plot.svg").write_text(plot(result), encoding="utf-8")
    if not quick and count >= claim.seeds:
        try:
            _write(result_file(claim.paper), result)
        except OSError as error:  # an installation that belongs to someone else
            say(f"{RESULTS} cannot be written ({error.strerror}): the result stands in {out} alone.")
    return result


def result_file(paper: int) -> Path:
    """Where the result of a claim's full version stands."""
    return RESULTS / f"{paper:02d}.json"


def stored_result(paper: int) -> dict[str, Any] | None:
    """The result of a claim's full version, or None where it was never run."""
    try:
        return json.loads(result_file(paper).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{result_file(paper)} cannot be read: {error}. Reproduce the claim again.") from error


def describe(claim: Claim) -> dict[str, Any]:
    """A claim and what became of it, as plain data; `result` is None where its full version was never run."""
    result = stored_result(claim.paper)
    return {
        "paper": claim.paper,
        "says": claim.says,
        "measures": claim.measures,
        "arms": dict(claim.arms),
        "settings": claim.version(quick=False),
        "seeds": claim.seeds,
        "minutes": claim.minutes,
        "criteria": [{"says": each.says, "where": claim.place(each)} for each in claim.criteria],
        "result": result and {**{k: result[k] for k in ("verdict", "sentences", "seeds")}, **result["environment"]},
    }


def _tasks(claim: Claim, out: Path, seeds: int, quick: bool) -> list[Task]:
    blocks = [range(a, min(a + claim.together, seeds)) for a in range(0, seeds, claim.together)]
    return [
        Task(claim.trial, where, label, arm, settings, block, out / where / label / f"seeds-{_span(block)}")
        for block in blocks
        for where, settings in claim.version(quick).items()
        for label, arm in claim.arms_of(where).items()
    ]


def _span(seeds: range) -> str:
    return f"{seeds[0]}-{seeds[-1]}"


def _result(claim: Claim, found: Found, quick: bool) -> dict[str, Any]:
    evaluations = [e for arms in found.values() for seeds in arms.values() for e in seeds.values()]
    judged = judge_claim(claim, found)
    return {
        "paper": claim.paper,
        "says": claim.says,
        "measures": claim.measures,
        "quick": quick,
        "seeds": len(next(iter(next(iter(found.values())).values()))),
        "arms": {label: dict(arm) for label, arm in claim.arms.items()},
        "settings": claim.version(quick),
        **judged,
        "sentences": [*judged["sentences"], *([QUICK] if quick else [])],
        "seconds": sum(e.settings["seconds"] for e in evaluations),
        "environment": _environment(),
    }


def _write(file: Path, result: Mapping[str, Any]) -> None:
    draft = file.with_name(f".{file.name}")
    draft.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, file)


# Each runs tasks and gives, in the order in which they finish, number of the task, evaluations, seconds.
Finished = tuple[int, dict[int, Evaluation], float]


def _one_by_one(tasks: Sequence[Task], jobs: int) -> Iterator[Finished]:
    yield from map(_run, enumerate(tasks))


def _in_processes(tasks: Sequence[Task], jobs: int) -> Iterator[Finished]:
    # Fresh interpreters, since a fork of one that holds torch's threads may hang. Ctrl-C is for the parent alone, which
    # ends them on its way out.
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap_unordered(_run, list(enumerate(tasks)))


def _as_ray_tasks(tasks: Sequence[Task], jobs: int) -> Iterator[Finished]:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray needs Ray: `pip install 'guerdon[ray]'` installs it.") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(_run)
    waiting = [remote.remote(task) for task in enumerate(tasks)]
    while waiting:
        (done,), waiting = ray.wait(waiting)
        yield ray.get(done)


def _run(numbered: tuple[int, Task]) -> Finished:
    i, task = numbered
    task.directory.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    found = task.trial(task.arm, task.seeds, task.settings, task.directory)
    return i, found, time.monotonic() - start
