"""Training in processes that are killed at random moments until one reaches the end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from guerdon.training.rundir import RunDir

KILLS, RESTORED = 3, 2  # at least; fewer would show nothing


def kill_until_done(train: Callable[[Path], object], path: Path) -> None:
    """Train in one life after another: at least `KILLS` are killed, `RESTORED` of them with a checkpoint to go on from.

    `train` starts a run, or goes on with it where it exists. Each life is a process of its own, forked from this
    one. The moments follow the time that a whole run takes here, and a run that outlived too few kills is begun again.
    """
    moments = random.Random(7)
    begun = time.monotonic()
    if _end(_life(train, path.with_name(f"{path.name}-timed"))) != 0:
        raise SystemExit("the run that nobody killed failed")
    first = (time.monotonic() - begun) / 3
    while True:
        kills, restored, span = 0, 0, first
        while True:
            child = _life(train, path)
            time.sleep(moments.uniform(0.0, span))
            os.kill(child, signal.SIGKILL)
            code = _end(child)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise SystemExit(f"a life ended by itself with {code}")
            kills += 1
            if (path / "status.json").exists() and RunDir.open(path).status["state"] not in ("killed", "done"):
                raise SystemExit(f"a killed run says {RunDir.open(path).status}")
            restored += RunDir(path).latest_checkpoint() is not None
            span *= 1.1
        if kills >= KILLS and restored >= RESTORED:
            return
        shutil.rmtree(path)
        first /= 2


def _life(train: Callable[[Path], object], path: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            train(path)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def _end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
