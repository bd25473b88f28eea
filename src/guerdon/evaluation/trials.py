"""The trials of a comparison: one method with one seed each, in its own processes, several at once, each resumable.

A trial `out/trials/LABEL/seed-K/` is a run directory like any other. Beside it stand `seed-K.json` (state and cost of
every process that worked on it) and what its processes printed. A trial of a control method trains several seeds
together. Nothing here knows how a policy is trained: `launch`
says which command does a stage, and its exit status says whether it did.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from guerdon.errors import ConfigError
from guerdon.evaluation.metrics import EVALUATION
from guerdon.training.rundir import RunDir

Stage = Literal["train", "resume", "evaluate"]
GRACE = 20.0  # seconds that an interrupted process has to save itself


@dataclass(frozen=True)
class Trial:
    """One method with one seed, or with several that are trained together.

    Attributes:
        label: the row it belongs to.
        method: name, or None for the untrained start, which is only evaluated.
        options: fields of the method.
        training: fields of the method's `training`, with this trial's seeds, directory and budget.
        start: the untrained policy that `guerdon evaluate` takes.
    """

    label: str
    method: str | None
    options: dict[str, Any]
    training: dict[str, Any]
    start: str = ""

    @property
    def seeds(self) -> range:
        first = self.training["seed"]
        return range(first, first + self.training.get("seeds", 1))

    @property
    def directory(self) -> Path:
        return Path(self.training["out"])

    @property
    def name(self) -> str:
        first, last = self.seeds[0], self.seeds[-1]
        which = f"seed {first}" if first == last else f"seeds {first} to {last}"
        return f"{self.label} {which}" if self.method else self.label


@dataclass
class Progress:
    """What is known of a trial, as kept in `seed-K.json`.

    Attributes:
        state: waiting (also when interrupted), failed or done.
        wall, cpu: seconds in all its processes together, interrupted ones included.
        memory: bytes, the largest resident set of any of them.
        error: the last lines that a failed process wrote.
    """

    state: Literal["waiting", "failed", "done"] = "waiting"
    wall: float = 0.0
    cpu: float = 0.0
    memory: int = 0
    stages: list[str] = field(default_factory=list)
    error: str = ""

    @classmethod
    def of(cls, directory: Path) -> Progress:
        """Read what is known; a trial that lost its evaluation waits again."""
        try:
            progress = cls(**json.loads(_beside(directory, ".json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        if progress.state == "done" and not (directory / EVALUATION).exists():
            progress.state = "waiting"
        return progress

    def save(self, directory: Path) -> None:
        draft = _beside(directory, ".json.tmp")
        draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        os.replace(draft, _beside(directory, ".json"))


Launch = Callable[[Trial, Stage], list[str]]


def guerdon_command(trial: Trial, stage: Stage) -> list[str]:
    """The command line of a stage: `guerdon train|resume|evaluate` in this interpreter."""
    guerdon = [sys.executable, "-m", "guerdon"]
    if stage == "train":
        assert trial.method is not None
        return [*guerdon, "train", trial.method, *_flags(trial.training | trial.options)]
    if stage == "resume":
        return [*guerdon, "resume", str(trial.directory)]
    if trial.method is not None:
        return [*guerdon, "evaluate", str(trial.directory)]
    start = {k: v for k, v in trial.training.items() if k != "model"}
    return [*guerdon, "evaluate", trial.start, *_flags(start)]


def run_trials(trials: Sequence[Trial], *, launch: Launch, jobs: int, lock: int, say: Callable[[str], None]) -> None:
    """Bring every trial to its end, `jobs` at a time: done ones are kept, interrupted and failed ones go on.

    Each process gets its share of the cores, and of the GPUs where there are several. `KeyboardInterrupt` reaches the
    processes, which have `GRACE` seconds to save themselves, and is raised again. `lock` is a file descriptor that the
    processes inherit, so that the comparison counts as busy while any of them lives.
    """
    waiting = [trial for trial in trials if Progress.of(trial.directory).state != "done"]
    slots = list(range(jobs))
    running: list[_Process] = []
    try:
        while waiting or running:
            while waiting and slots:
                running.append(_Process(waiting.pop(0), launch, slots.pop(0), jobs, lock, say))
            time.sleep(0.02)
            for process in [p for p in running if p.finished()]:
                running.remove(process)
                slots.append(process.slot)
    except KeyboardInterrupt:
        _stop(running)
        raise
    finally:
        for process in running:
            process.send(signal.SIGKILL)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Hold the directory's lock; `ConfigError` where another comparison, or a process one left behind, holds it."""
    with open(directory / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{directory}: a comparison is at work here, or a trial that one left behind. Wait for it, or stop it."
            ) from None
        yield file.fileno()


class _Process:
    """A trial at work: its stages one after the other, each a process of its own group."""

    def __init__(
        self, trial: Trial, launch: Launch, slot: int, jobs: int, lock: int, say: Callable[[str], None]
    ) -> None:
        self.trial, self.launch, self.slot, self.lock, self.say = trial, launch, slot, lock, say
        self.progress = Progress.of(trial.directory)
        self.environment = os.environ | _share(slot, jobs)
        self._start(self._next_stage())

    def _next_stage(self) -> Stage:
        run = RunDir(self.trial.directory)
        if self.trial.method is None or run.status["state"] == "done":
            return "evaluate"
        return "resume" if (run.path / "config.json").exists() else "train"

    def _start(self, stage: Stage) -> None:
        self.stage, self.since = stage, time.monotonic()
        self.say(f"{self.trial.name}: {stage}")
        self.trial.directory.parent.mkdir(parents=True, exist_ok=True)
        with open(self._said("out"), "wb") as out, open(self._said("err"), "wb") as err:
            self.process = subprocess.Popen(
                self.launch(self.trial, stage),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environment,
                start_new_session=True,
                pass_fds=(self.lock,),
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def _said(self, stream: str) -> Path:
        return _beside(self.trial.directory, f".{self.stage}.{stream}")

    def finished(self) -> bool:
        """Whether the trial came to its end, done or failed; starts the next stage where there is one."""
        code = self._reap()
        if code is None:
            return False
        progress = self.progress
        trained = code == 0 and self._next_stage() == "evaluate"
        if trained and (self.trial.directory / EVALUATION).exists():
            progress.state, progress.error = "done", ""
        elif trained and self.stage != "evaluate":
            progress.save(self.trial.directory)
            self._start("evaluate")
            return False
        else:
            progress.state = "failed"
            progress.error = f"{self.stage}: {_ending(code)}\n{self._last_lines()}".strip()
        progress.save(self.trial.directory)
        why = f": {progress.error.splitlines()[-1]}" if progress.error else ""
        self.say(f"{self.trial.name}: {progress.state} after {progress.wall:.0f} s{why}")
        return True

    def stopped(self) -> bool:
        """Whether an interrupted process has ended; what it cost is kept, and its trial goes on waiting."""
        if self._reap() is None:
            return False
        self.progress.state = "waiting"
        self.progress.save(self.trial.directory)
        return True

    def _reap(self) -> int | None:
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.progress.stages.append(self.stage)
        self.progress.wall += time.monotonic() - self.since
        self.progress.cpu += usage.ru_utime + usage.ru_stime
        memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.progress.memory = max(self.progress.memory, memory)
        return self.process.returncode

    def _last_lines(self, lines: int = 12) -> str:
        with open(self._said("err"), "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            return "\n".join(file.read().decode("utf-8", "replace").strip().splitlines()[-lines:])

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _end_with_parent() -> None:
    """In a trial's process: end when the comparison does, by kill -9 as well, so that the same command can go on."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _stop(running: list[_Process]) -> None:
    for process in running:
        process.send(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    while running and time.monotonic() < deadline:
        running[:] = [p for p in running if not p.stopped()]
        time.sleep(0.02)


def _ending(code: int) -> str:
    if code == 0:
        return "ended without finishing"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _beside(directory: Path, suffix: str) -> Path:
    return directory.with_name(directory.name + suffix)


def _share(slot: int, jobs: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // jobs))
    share = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    driver = Path("/proc/driver/nvidia/gpus")
    present = [str(i) for i, _ in enumerate(driver.glob("*"))] if said is None else said.split(",")
    if jobs > 1 and len(present) > 1:
        share["CUDA_VISIBLE_DEVICES"] = ",".join(present[slot % len(present) :: jobs])
    return share


def _flags(values: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (list, tuple)):
            flags += [f"--{flag}", *map(str, value)]
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags
