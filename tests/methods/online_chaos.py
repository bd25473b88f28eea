"""`python online_chaos.py DIRECTORY`: train in processes that are killed at random moments until one reaches the end.

Prints how often it killed, for each method. Each life is a process of its own, forked from one that has imported
everything.
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

import guerdon

SMALL = {"hidden": (8, 8), "checkpoint_every": 40, "log_every": 20, "eval_episodes": 2, "seeds": 2}
REPLAY = {"batch_size": 8, "learning_starts": 20, "buffer_size": 150}
RUNS = {
    "dqn": {"env": "CartPole-v1", "max_samples": 400, "n_step": 3, "priority": 0.6, "double": True, **REPLAY},
    "sac": {"env": "Pendulum-v1", "max_samples": 240, **REPLAY},
    "ppo-control": {"env": "Pendulum-v1", "max_samples": 600, "rollout": 32, "copies": 2, "batch_size": 16},
}


def train(path: Path, method: str) -> None:
    if (path / "status.json").exists():
        guerdon.resume(path)
    else:
        guerdon.train(method, out=str(path), **SMALL, **RUNS[method])


def main(path: Path) -> None:
    torch.set_num_threads(1)
    moments = random.Random(7)
    for method in RUNS:
        train(path / f"whole-{method}", method)
        kills, span = 0, 0.5
        while True:
            child = os.fork()
            if child == 0:
                try:
                    train(path / f"killed-{method}", method)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            time.sleep(moments.uniform(0.0, span))
            os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise SystemExit(f"a life ended by itself with {code}")
            kills += 1
            span *= 1.1
        print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
