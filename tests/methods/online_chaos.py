"""`python online_chaos.py DIRECTORY`: train with each online method until the end, once alive and once killed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import guerdon
from lives import kill_until_done

SMALL = {"hidden": (8, 8), "checkpoint_every": 40, "log_every": 20, "eval_episodes": 2, "seeds": 2}
REPLAY = {"batch_size": 8, "learning_starts": 20, "buffer_size": 150}
RUNS = {
    "dqn": {"env": "CartPole-v1", "max_samples": 400, "n_step": 3, "priority": 0.6, "double": True, **REPLAY},
    "sac": {"env": "Pendulum-v1", "max_samples": 240, **REPLAY},
    "ppo-control": {"env": "Pendulum-v1", "max_samples": 600, "rollout": 32, "copies": 2, "batch_size": 16},
}


def train(path: Path, method: str) -> None:
    if (path / "config.json").exists():
        guerdon.resume(path)
    else:
        guerdon.train(method, out=str(path), **SMALL, **RUNS[method])


def main(path: Path) -> None:
    torch.set_num_threads(1)
    for method in RUNS:
        train(path / f"whole-{method}", method)
        kill_until_done(lambda killed, method=method: train(killed, method), path / f"killed-{method}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
