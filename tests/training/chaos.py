"""`python chaos.py DIRECTORY`: train in processes that are killed at random moments until one reaches the end.

Prints how often it killed. Each life is a process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from guerdon.training.rundir import RunDir
from training.problem import Fit, train

OPTIONS = {"checkpoint_every": 4, "eval_every": 3}
METHOD = Fit(seconds=0.004)


def main(path: Path) -> None:
    torch.set_num_threads(1)
    train(path.with_name("warm"), Fit(rounds=1), {})
    moments = random.Random(7)
    kills, span = 0, 0.06
    while True:
        child = os.fork()
        if child == 0:
            try:
                train(path, METHOD, OPTIONS)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        time.sleep(moments.uniform(0.0, span))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise SystemExit(f"a life ended by itself with {code}")
        kills += 1
        if (path / "status.json").exists() and RunDir.open(path).status["state"] not in ("killed", "done"):
            raise SystemExit(f"a killed run says {RunDir.open(path).status}")
        span *= 1.05
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
