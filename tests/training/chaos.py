"""`python chaos.py DIRECTORY`: train in processes that are killed at random moments until one reaches the end.

Prints how often it killed. Each life is a process of its own, forked before torch has computed anything.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from guerdon.training.rundir import RunDir
from training.problem import Fit, train

OPTIONS = {"checkpoint_every": 4, "eval_every": 3}
METHOD = Fit(seconds=0.004)


def main(path: Path) -> None:
    torch.set_num_threads(1)
    moments = random.Random(7)
    kills, span = 0, 0.2
    while True:
        child = os.fork()
        if child == 0:
            train(path, METHOD, OPTIONS)
            os._exit(0)
        time.sleep(moments.uniform(0.0, span))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        kills += 1
        if (path / "status.json").exists() and RunDir.open(path).status["state"] not in ("killed", "done"):
            raise SystemExit(f"a killed run says {RunDir.open(path).status}")
        span *= 1.05
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
