"""Calls that model-written text may hang or blow up, made in a child process with limits of CPU time and memory.

The limit is CPU time, enforced by the kernel: it stops loops inside C code as well, does not depend on how busy the
machine is, and works from any thread. The child starts at the first call and again after a call that was stopped.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any

from guerdon import errors
from guerdon.errors import GuerdonError


class Stopped(Exception):
    """A call went beyond its CPU time or memory and was ended."""


class Isolated:
    """A function in a child process: arguments and results are plain data (JSON).

    Args:
        factory: dotted path of a callable that builds the function. It runs in the child, once and without limits, and
            is the place for slow imports.
        args: plain data for the factory.
        seconds: CPU time of one call.
        memory: bytes of address space of the child.

    A call raises `Stopped` beyond its limits, and the `GuerdonError` that the function or its factory raised.
    """

    def __init__(self, factory: str, *args: Any, seconds: float = 10.0, memory: int = 4 * 2**30) -> None:
        self._setup = json.dumps([factory, args, seconds, memory])
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] = lambda: None  # also runs when this object or the interpreter goes away
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        with self._lock:
            try:
                if self._process is None:
                    self._process = self._start()
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(args) + "\n")
                self._process.stdin.flush()
                kind, value = self._reply(self._process)
            except BaseException:  # also Ctrl-C: a late reply would be taken for that of the next call
                self._process = None
                self._end()
                raise
        if kind == "result":
            return value
        if kind == "defect":
            raise RuntimeError(f"in a child process:\n{value}")
        raise getattr(errors, kind)(value)

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "guerdon.rewards.isolation", self._setup],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # A fixed hash seed, because some libraries iterate over sets where they draw at random.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
        )
        self._end = weakref.finalize(self, _end, process)
        return process

    def _reply(self, process: subprocess.Popen[str]) -> list[Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if line:
            return json.loads(line)
        if process.wait() == -signal.SIGPROF:
            raise Stopped(f"took more than {self._seconds:g} s of CPU time")
        raise Stopped(f"ran out of memory or crashed (exit code {process.returncode})")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _serve(setup: str) -> None:
    """The child: build the function, then answer one line of JSON with another until the parent closes the pipe."""
    import resource

    factory, factory_args, seconds, memory = json.loads(setup)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    module, _, name = factory.rpartition(".")
    function = None
    for line in sys.stdin:
        try:
            if function is None:
                function = getattr(importlib.import_module(module), name)(*factory_args)
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
            reply = json.dumps(["result", function(*json.loads(line))], default=str)
        except MemoryError:
            os._exit(1)
        except GuerdonError as error:
            reply = json.dumps([type(error).__name__, str(error)])
        except Exception:
            reply = json.dumps(["defect", traceback.format_exc()])
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
