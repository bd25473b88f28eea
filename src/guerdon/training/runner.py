"""The loop around a method: it numbers, logs, evaluates, checkpoints, stops and resumes, and knows no method."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from guerdon.errors import GuerdonError, InvariantError
from guerdon.lazy import torch
from guerdon.training.config import Training
from guerdon.training.distributed import Distribution
from guerdon.training.loggers import Sink
from guerdon.training.optim import NonFiniteError
from guerdon.training.progress import Progress, Silent
from guerdon.training.rundir import RunDir, mean

Evaluate = Callable[[Any], Mapping[str, Any]]


class Stopped(KeyboardInterrupt):
    """The user or the machine asked the run to stop; the message says what it can be resumed with."""


class BudgetSpent(Exception):
    """Raised by a run asked for samples beyond `max_samples`; what was sampled before has been learned from by then."""


class Cursor(Protocol):
    """How far a run has come. The method sets it; of `step` the loop takes care where a method yields each update."""

    step: int  # updates done; of a control method that learns in an environment, steps taken there by each seed
    samples: int  # completions or transitions sampled
    tokens: int  # unique tokens trained on
    done: float  # share of the run in [0, 1]


class Run(Protocol):
    """What the loop needs of a run. `save` and `restore` cover all that the rest of the run depends on, except the
    global random states of torch, numpy and random, which the loop saves beside it.

    Every process calls `save` and `export`, so that what it holds a part of can be brought together; the main one
    alone writes, and for it alone the directory is there.
    """

    distribution: Distribution
    notes: list[str]  # what the user should know of data, tasks and environments; shown as the loop begins

    @property
    def cursor(self) -> Cursor: ...

    def save(self, directory: Path) -> None: ...

    def restore(self, directory: Path) -> None: ...

    def export(self, directory: Path) -> None: ...

    def dump_batch(self, directory: Path) -> None: ...


class Learner(Protocol):
    """What the loop needs of a method."""

    def learn(self, run: Any) -> Iterator[Mapping[str, Any]]: ...


def run_loop(
    run: Run,
    method: Learner,
    rundir: RunDir,
    config: Training,
    *,
    evaluate: Evaluate | None = None,
    score: Callable[[Mapping[str, float]], float] = itemgetter("eval/score"),
    sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train to the end of the method or of the budget, from the latest checkpoint where there is one.

    Every step is a row of `metrics.jsonl`: what the method yields, `progress/` (samples, tokens and share of the run so
    far) and `time/` (seconds, tokens or else steps per second). A method whose updates take microseconds moves the
    cursor itself and yields once for many of them. A list among the metrics holds one number for each seed of the run;
    such lists are kept in the row. Evaluations run at step 0 and every `eval_every` updates where that
    is set, and once at the end; they join the row of their step and leave the random states as they found them, so
    that they never change what is learned. An interrupted and resumed run leaves the same rows and the same policy as
    an uninterrupted one, bit for bit, except for `time/`. The final policy is exported to `policy/`, those that
    `snapshot_every` asks for to `snapshots/step-*`.

    Args:
        run: freshly built, after `method.setup(run)`; the same on every process.
        method: its `learn(run)` yields the metrics of one update at a time, the same on every process.
        rundir: where it is all written; a run whose state is done returns at once.
        config: `max_updates`, the `_every`s, `patience` and `keep_checkpoints`. `max_samples` is the
            run's to watch, which raises `BudgetSpent`.
        evaluate: metrics of the policy on held-out items, keys `eval/...`, the same on every process.
        score: what early stopping maximises, from an evaluation's metrics.
        sinks: take the metrics too; they are closed at the end.
        progress: shows the run to a person.

    Returns:
        The last row, with the final evaluation.

    Raises:
        Stopped: Ctrl-C or SIGTERM; the update under way was finished and a checkpoint written. A second signal stops at
            once, and the run can be resumed from the checkpoint before.
        GuerdonError: a loss or gradient that is not finite (the batch is saved), or a full disk.
    """
    loop = _Loop(run, method, rundir, config, evaluate, score, sinks, progress or Silent())
    main = run.distribution.is_main
    with rundir.locked() if main else nullcontext():
        try:
            if not run.distribution.any(main and rundir.status["state"] == "done"):
                loop.go()
        except BaseException as error:
            with suppress(GuerdonError):  # a full disk must not hide what went wrong
                loop.fail(error)
            if isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped):
                raise Stopped(
                    f"stopped within a step. `guerdon resume {rundir.path}` goes on from the last checkpoint."
                ) from None
            with rundir.told_when_full(rundir.path):
                raise
        finally:
            with rundir.told_when_full(rundir.path):
                loop.close()
    return next(reversed(rundir.metrics()), {})


class _Loop:
    def __init__(
        self,
        run: Run,
        method: Learner,
        rundir: RunDir,
        config: Training,
        evaluate: Evaluate | None,
        score: Callable[[Mapping[str, float]], float],
        sinks: Sequence[Sink],
        progress: Progress,
    ) -> None:
        self.run, self.method, self.rundir, self.config = run, method, rundir, config
        self.evaluate, self.score = evaluate, score
        self.main = run.distribution.is_main
        self.sinks, self.progress = (sinks, progress) if self.main else ((), Silent())
        self.scores: list[float] = []  # of the evaluations so far, for early stopping
        self.evaluated = -1  # step of the last evaluation

    def go(self) -> None:
        run, config = self.run, self.config
        self._resume()
        self.progress.begin(run.cursor.step, self._done())
        for note in run.notes:
            self.progress.note(note)
        with _signals(self.progress) as stop_asked:
            if config.eval_every and run.cursor.step == 0:
                self._evaluate()
            steps = self.method.learn(run)
            while not self._over():
                before = run.cursor.step
                metrics = self._next(steps)
                if metrics is None:
                    break
                self._record(metrics)
                step = run.cursor.step
                if _passed(config.eval_every, before, step):
                    self._evaluate()
                if _passed(config.snapshot_every, before, step):
                    self._export(self.rundir.path / "snapshots" / f"step-{step:08d}")
                stop = run.distribution.any(stop_asked())
                if stop or _passed(config.checkpoint_every, before, step):
                    self._checkpoint()
                if stop:
                    raise Stopped(f"stopped at step {step}. `guerdon resume {self.rundir.path}` goes on from there.")
            self._checkpoint()  # first, so that an evaluation that fails or is killed loses nothing
            if self.evaluated != run.cursor.step:
                self._evaluate()
        self._export(self.rundir.path / "policy")
        if self.main:
            self.rundir.set_status("done")
            self.rundir.remove_checkpoints()
        run.distribution.barrier()

    def fail(self, error: BaseException) -> None:
        if self.main:
            stopped = isinstance(error, KeyboardInterrupt)
            facts = {} if stopped else {"error": f"{type(error).__name__}: {error}"}
            self.rundir.set_status("stopped" if stopped else "failed", **facts)

    def close(self) -> None:
        self.progress.close()
        for sink in self.sinks:
            sink.close()

    def _resume(self) -> None:
        distribution = self.run.distribution
        checkpoint = self.rundir.latest_checkpoint()
        if checkpoint is not None:
            self.run.restore(checkpoint)
            states = json.loads((checkpoint / "random.json").read_text())
            set_rng_state(states[distribution.rank % len(states)])
        if self.main:
            self.rundir.truncate_to(self.run.cursor.step if checkpoint else -1)
            self.rundir.set_status("running")
        distribution.barrier()
        if self.config.patience:
            rows = [row for row in self.rundir.metrics() if any(name.startswith("eval/") for name in row)]
            self.scores = [self.score(row) for row in rows]
            self.evaluated = rows[-1]["step"] if rows else -1

    def _over(self) -> bool:
        config, cursor, scores = self.config, self.run.cursor, self.scores
        return bool(
            (config.max_updates and cursor.step >= config.max_updates)
            or (config.patience and scores and len(scores) - 1 - int(np.argmax(scores)) >= config.patience)
        )

    def _done(self) -> float:
        cursor, most = self.run.cursor, self.config.max_updates
        return max(cursor.done, cursor.step / most) if most else cursor.done

    def _next(self, steps: Iterator[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The metrics of the next update, or None at the end of the method or of its samples."""
        cursor = self.run.cursor
        start, step, tokens = time.perf_counter(), cursor.step, cursor.tokens
        try:
            with self._mendable():
                yielded = next(steps, None)
        except BudgetSpent:
            return None
        except NonFiniteError as error:
            self._not_finite(step + 1, str(error), error)
        if yielded is None:
            return None
        if cursor.step == step:
            cursor.step = step + 1
        metrics = {name: _numbers(value) for name, value in yielded.items()}
        losses = {name: np.ravel(value) for name, value in metrics.items() if name.startswith("loss/")}
        wrong = [f"{name} is {v[~np.isfinite(v)][0]}" for name, v in losses.items() if not np.isfinite(v).all()]
        if wrong:
            self._not_finite(cursor.step, f"{', '.join(wrong)}.")
        seconds = time.perf_counter() - start
        unit, covered = ("tokens", cursor.tokens - tokens) if cursor.tokens else ("steps", cursor.step - step)
        return {
            **metrics,
            "progress/samples": cursor.samples,
            "progress/tokens": cursor.tokens,
            "progress/done": self._done(),
            "time/step": seconds,
            f"time/{unit}_per_second": covered / seconds,
        }

    def _not_finite(self, step: int, what: str, cause: Exception | None = None) -> NoReturn:
        rank = self.run.distribution.rank
        directory = self.rundir.path / "failed" / f"step-{step:08d}-rank-{rank}"
        self.rundir.write_directory(directory, self.run.dump_batch)
        raise GuerdonError(
            f"step {step} of {self.rundir.path}: {what} The batch is saved in {directory}. Start again with a lower "
            "--lr or with --precision fp32."
        ) from cause

    @contextmanager
    def _mendable(self) -> Iterator[None]:
        """What the user can mend while the run waits (a reward function that fails) is told with how to go on."""
        try:
            yield
        except (InvariantError, NonFiniteError):
            raise
        except GuerdonError as error:
            again = f"`guerdon resume {self.rundir.path}` goes on from the last checkpoint."
            raise type(error)(f"{str(error).rstrip('.')}. When that is mended, {again}") from error
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            mend = "Start again with a smaller --batch-size or fewer --seeds."
            if at_once := getattr(self.config, "max_tokens", 0):
                mend = (
                    f"Lower max_tokens (now {at_once}) in {self.rundir.path}/config.json, which changes no result, and "
                    f"`guerdon resume {self.rundir.path}` goes on from the last checkpoint."
                )
            what = str(error).partition("\n")[0].rstrip(".")
            raise GuerdonError(f"step {self.run.cursor.step + 1} of {self.rundir.path}: {what}. {mend}") from error

    def _record(self, metrics: Mapping[str, Any]) -> None:
        if self.main:
            step = self.run.cursor.step
            self.rundir.append(step, metrics)
            means = {name: mean(value) for name, value in metrics.items()}
            for sink in self.sinks:
                sink.log(step, means)
            self.progress.update(step, self._done(), means)

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        state, start = rng_state(), time.perf_counter()
        with self._mendable():
            metrics = {name: _numbers(value) for name, value in self.evaluate(self.run).items()}
        set_rng_state(state)
        self.evaluated = self.run.cursor.step
        if self.config.patience:
            self.scores.append(self.score({name: mean(value) for name, value in metrics.items()}))
        self._record({**metrics, "time/evaluation": time.perf_counter() - start})

    def _checkpoint(self) -> None:
        distribution, step = self.run.distribution, self.run.cursor.step
        states = distribution.gather_objects([rng_state()])

        def write(directory: Path) -> None:
            self.run.save(directory)
            (directory / "random.json").write_text(json.dumps(states))

        latest = self.rundir.latest_checkpoint()
        if distribution.any(self.main and (latest is None or not latest.name.endswith(f"{step:08d}"))):
            if self.main:
                self.rundir.save_checkpoint(step, write, self.config.keep_checkpoints)
            else:
                self.run.save(self.rundir.path)
        distribution.barrier()

    def _export(self, directory: Path) -> None:
        if self.main:
            self.rundir.write_directory(directory, self.run.export)
        else:
            self.run.export(directory)


@contextmanager
def _signals(progress: Progress) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag that is asked for between updates; a second one acts at once."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    asked = False
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        restore()
        progress.note("stopping after this update, with a checkpoint; once more stops at once, without one.")

    if threading.current_thread() is threading.main_thread():  # the only one that can receive signals
        before.update({kind: signal.signal(kind, ask) for kind in kinds})
    try:
        yield lambda: asked
    finally:
        restore()


def _numbers(value: Any) -> Any:
    """A number and a list of numbers (one per seed) as they are, a tensor or an array as its mean."""
    if isinstance(value, (int, float, list)):
        return value
    return float(torch.as_tensor(value).detach().double().mean())


def _passed(every: int, before: int, step: int) -> bool:
    """Whether a multiple of `every` lies in (before, step]; 0 has none."""
    return bool(every) and step // every > before // every


def rng_state() -> dict[str, Any]:
    """The global random states of torch (CPU, and this process's GPU), numpy and random, as plain data for JSON."""
    numbers: Any = np.random.get_state(legacy=False)
    numbers["state"]["key"] = numbers["state"]["key"].tolist()
    state = {
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "numpy": numbers,
        "random": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    numbers = state["numpy"]
    key = np.array(numbers["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numbers, "state": {**numbers["state"], "key": key}})
    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state["cuda"])), dtype=torch.uint8))
