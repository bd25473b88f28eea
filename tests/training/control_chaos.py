"""`python control_chaos.py KIND DIRECTORY`: train control policies in processes that are killed until one ends."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import guerdon
from guerdon.training.rundir import RunDir
from lives import kill_until_done

SMALL = {"hidden": (8, 8), "batch_size": 16, "eval_episodes": 2, "seeds": 2, "seed": 3}
KINDS = {
    "offline": {
        "method": "iql", "normalize": True, "data": "pendulum.npz", "env": "Pendulum-v1", "corrupt": ("reward:0.2",),
        "max_updates": 300, "log_every": 30, "checkpoint_every": 40, "eval_every": 150, "snapshot_every": 125, **SMALL,
    },
    "online": {
        "method": "dqn", "priority": 0.6, "n_step": 3, "double": True, "buffer_size": 150, "learning_starts": 50,
        "target_every": 30, "env": "CartPole-v1", "max_samples": 240, "log_every": 35, "checkpoint_every": 40,
        "eval_every": 120, "snapshot_every": 120, **SMALL,
    },
}  # fmt: skip


def write_data(path: Path, rows: int = 200) -> None:
    """Noise in the shapes of Pendulum-v1."""
    rng = np.random.default_rng(0)
    np.savez(
        path,
        observations=rng.normal(size=(rows, 3)).astype(np.float32),
        actions=rng.uniform(-2, 2, size=(rows, 1)).astype(np.float32),
        rewards=rng.normal(size=rows).astype(np.float32),
        next_observations=rng.normal(size=(rows, 3)).astype(np.float32),
        terminals=np.arange(rows) % 10 == 9,
        timeouts=np.zeros(rows, bool),
    )


def train(kind: str, path: Path, **other) -> RunDir:
    """Start a run, or go on with it where it exists."""
    if (path / "config.json").exists():
        return guerdon.resume(path)
    options = {**KINDS[kind], "out": str(path), **other}
    if "data" in options:
        options["data"] = str(path.with_name("pendulum.npz"))
    return guerdon.train(options.pop("method"), **options)


def main(kind: str, path: Path) -> None:
    torch.set_num_threads(1)
    write_data(path.with_name("pendulum.npz"))
    budget = {"max_samples": 60} if kind == "online" else {"max_updates": 2}
    train(kind, path.with_name("warm"), **budget)
    kill_until_done(lambda path: train(kind, path), path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
