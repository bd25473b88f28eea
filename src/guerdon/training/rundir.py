"""The run directory: everything a run leaves behind, written so that no kill can leave half of anything.

    config.json          method, its options, the training options, the version of guerdon
    environment.json     machine and package versions (never environment variables)
    metrics.jsonl        one JSON object per step; numbers that are not finite are the strings NaN, Infinity, -Infinity;
                         a list has one number for each seed that the run trains
    status.json          running, done, stopped or failed, with the error
    checkpoints/step-*   written beside, synced to disk and then renamed: what has its name is whole
    policy/              the final policy
    snapshots/step-*     policies on the way there, where they were asked for

No torch here: `guerdon report` and a program that only looks at runs stay light.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

from guerdon import __version__
from guerdon.errors import ConfigError, GuerdonError

State = Literal["running", "done", "stopped", "failed"]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, beyond the largest size of a file


class RunDir:
    """One run on disk. Use `create` for a new run and `open` for one that exists."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._metrics: IO[bytes] | None = None
        self._last: tuple[int, int, dict[str, Any]] | None = None  # step, byte offset and content of the last row

    @classmethod
    def create(
        cls,
        path: str | Path,
        method_name: str,
        method_options: Mapping[str, Any],
        training_options: Mapping[str, Any],
    ) -> RunDir:
        """Start a run in a directory that is new or empty.

        Raises:
            ConfigError: the directory holds a run or other files already, or cannot be written.
        """
        run = cls(path)
        if run._file("config.json").exists():
            raise ConfigError(
                f"{path} already holds a run: go on with it by `guerdon resume {path}`, or choose another --out."
            )
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            left_by_a_kill = {"environment.json", ".environment.json", ".config.json"}
            if {file.name for file in run.path.iterdir()} - left_by_a_kill:
                raise ConfigError(f"{path} is not empty and holds no run: choose a new directory with --out.")
            config = {
                "guerdon": __version__,
                "method": method_name,
                "options": dict(method_options),
                "training": dict(training_options),
            }
            _write_json(run._file("environment.json"), _environment())
            _write_json(run._file("config.json"), config)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}): choose another --out.") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """A run that exists; `ConfigError` where there is none."""
        run = cls(path)
        file = run._file("config.json")
        if not file.is_file():
            raise ConfigError(f"{path} holds no run: there is no {file}.")
        if not cls.is_at(path):
            raise ConfigError(f"{path} holds no run: {file} was not written by `guerdon train`.")
        return run

    @classmethod
    def is_at(cls, path: str | Path) -> bool:
        """Whether a directory holds a run; a model's directory has a config.json as well, with other content."""
        file = cls(path)._file("config.json")
        return file.is_file() and {"method", "options", "training"} <= set(_read_json(file))

    def remove(self) -> None:
        """Delete a run that has not begun, so that its directory can be used again."""
        for path in self.path.iterdir():
            path.unlink()
        with suppress(OSError):  # the working directory, say
            self.path.rmdir()

    @property
    def config(self) -> dict[str, Any]:
        """`guerdon` (version), `method` (name), `options` (of the method) and `training` (options of the runner)."""
        return _read_json(self._file("config.json"))

    @property
    def environment(self) -> dict[str, Any]:
        """Facts about the machine on which the run was created, and the run's `id`."""
        return _read_json(self._file("environment.json"))

    # Status

    def set_status(self, state: State, **facts: Any) -> None:
        """Write the state and facts about it, such as `error=...`."""
        with self.told_when_full(self._file("status.json")):
            _write_json(self._file("status.json"), {"state": state, **facts})

    @property
    def status(self) -> dict[str, Any]:
        """`state` and facts about it. A run that says it is running but that no process holds is `killed`."""
        if not self._file("status.json").exists():
            return {"state": "created"}
        status = _read_json(self._file("status.json"))
        if status["state"] == "running":
            with suppress(ConfigError), self.locked():
                status["state"] = "killed"
        return status

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; `ConfigError` where another process holds it. A kill frees it."""
        import fcntl

        with self._file("config.json").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"{self.path} is in use by another process: wait for it or stop it.") from error
            yield

    # Metrics

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one step's row; for the step of the last row, add these metrics to that row. Survives a kill at once."""
        if self._last is None:
            self._last = max(self._rows(), key=lambda row: row[1], default=(-1, 0, {}))
        last_step, offset, last = self._last
        row = {**last, **metrics} if step == last_step else {"step": step, **metrics}
        line = (json.dumps({k: _plain(v) for k, v in row.items()}, allow_nan=False) + "\n").encode()
        file = self._file("metrics.jsonl")
        with self.told_when_full(file):
            if step == last_step:
                before = file.read_bytes()[:offset]
                self._close_metrics()
                _write_bytes(file, before + line)
            else:
                self._metrics = self._metrics or file.open("ab", buffering=0)
                offset = self._metrics.tell()
                if self._metrics.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._last = (step, offset, row)

    def metrics(self, seed: int | None = None) -> list[dict[str, Any]]:
        """All whole rows, in order of steps; of what they hold per seed, the mean, or the `seed`-th number."""
        pick = mean if seed is None else lambda value: value[seed] if isinstance(value, list) else value
        return [{name: pick(value) for name, value in row.items()} for _, _, row in self._rows()]

    def truncate_to(self, step: int) -> None:
        """Remove the rows after `step`, and a last line that a kill has torn."""
        self._close_metrics()
        file = self._file("metrics.jsonl")
        if file.exists():
            content = file.read_bytes()
            end = 0
            for row_step, offset, _ in self._rows():
                if row_step <= step:
                    end = content.index(b"\n", offset) + 1
            os.truncate(file, end)

    def _rows(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        file, offset = self._file("metrics.jsonl"), 0
        for line in file.read_bytes().splitlines(keepends=True) if file.exists() else ():
            if not line.endswith(b"\n"):
                return
            row = {key: _numeric(value) for key, value in json.loads(line).items()}
            yield int(row["step"]), offset, row
            offset += len(line)

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._metrics = self._last = None

    # Checkpoints

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self._file("checkpoints").glob("step-*"))

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest step, or None where there is none."""
        return next(reversed(self.checkpoints()), None)

    def save_checkpoint(self, step: int, write: Callable[[Path], object], keep: int) -> Path:
        """Write `checkpoints/step-{step:08d}` with `write(directory)` and keep the latest `keep`; 0 keeps all.

        Raises:
            GuerdonError: the disk is full; the checkpoints that existed are intact.
        """
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        directory = self._file("checkpoints") / f"step-{step:08d}"
        self.write_directory(directory, write)
        for old in self.checkpoints()[:-keep]:
            old.rename(old.with_name(f".{old.name}"))
        for hidden in self._file("checkpoints").glob(".step-*"):  # pruned just now, or left half by a kill
            shutil.rmtree(hidden)
        return directory

    def remove_checkpoints(self) -> None:
        """Free the disk of what only an unfinished run needs."""
        shutil.rmtree(self._file("checkpoints"), ignore_errors=True)

    def write_directory(self, target: Path, write: Callable[[Path], object]) -> None:
        """Fill a directory of the run with `write(directory)` so that it appears whole or not at all.

        Raises:
            GuerdonError: the disk is full; nothing that existed is lost.
        """
        partial = target.with_name(f".{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            write(partial)
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
        except BaseException as error:
            written = _size(partial)
            shutil.rmtree(partial, ignore_errors=True)
            if disk_full(error):
                before = self.latest_checkpoint()
                needed = max(written, _size(before) if before else 0)
                free = shutil.disk_usage(self.path).free
                kept = f"The last whole checkpoint is {before.name}. " if before else "No checkpoint is lost. "
                raise GuerdonError(
                    f"the disk is full: {target} needs at least {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are "
                    f"free. {kept}Free some space, then `guerdon resume {self.path}`."
                ) from error
            raise
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _sync(target.parent)

    @contextmanager
    def told_when_full(self, path: Path) -> Iterator[None]:
        """Turn the errors of a full disk into a `GuerdonError` that says how to go on."""
        try:
            yield
        except Exception as error:
            if not disk_full(error):
                raise
            raise GuerdonError(
                f"the disk is full: {path} could not be written. Free some space, then `guerdon resume {self.path}`."
            ) from error

    def _file(self, name: str) -> Path:
        return self.path / name


def mean(value: Any) -> Any:
    """The mean of a list over the seeds that have a number, and anything else as it is."""
    if not isinstance(value, list):
        return value
    known = [number for number in value if not math.isnan(number)]
    return sum(known) / len(known) if known else math.nan


def _numeric(value: Any) -> Any:
    if isinstance(value, list):
        return [_numeric(item) for item in value]
    return float(value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def disk_full(error: BaseException) -> bool:
    """Whether an error, from Python or from safetensors (which passes on the text alone), means a full disk."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return type(error).__name__ == "SafetensorError" and any(f"(os error {code})" in str(error) for code in _FULL)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_bytes(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}")
    partial.write_bytes(content)
    _sync(partial)
    partial.replace(file)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    _write_bytes(file, (json.dumps(content, indent=2) + "\n").encode())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} cannot be read: it holds no JSON object.")
    return content


def _environment() -> dict[str, Any]:
    packages = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "vllm")
    return {
        "id": secrets.token_hex(8),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "guerdon": __version__,
        "python": sys.version.split()[0],
        "packages": {name: version for name in packages if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
        "commit": _output("git", "rev-parse", "HEAD") or None,
    }


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """What a command prints, or an empty string where it is missing or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
