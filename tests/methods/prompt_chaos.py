"""`python prompt_chaos.py DATA DIRECTORY`: searches that are killed at given rows of metrics, and whole ones."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

import guerdon
from guerdon.training.rundir import RunDir

SMALL = {
    "model": "tiny:layers=1,width=16,heads=2,vocab=word", "verbalizers": ("negative=bad", "positive=good"),
    "precision": "fp32", "search_items": 6, "validation_items": 8, "eval_items": 10, "max_samples": 40,
    "checkpoint_every": 2, "keep_checkpoints": 1,
}  # fmt: skip
WRITES = {"write_tokens": 8, "model": "tiny:layers=1,width=16,heads=2,vocab=word,context=1024"}
QUINE = {"method": "promptquine", "population": 3, "reproductions": 4, "min_length": 0}
KINDS = {
    "gga": QUINE,
    "ssga": {**QUINE, "mode": "ssga", "halving": True},
    "tapruning": {"method": "tapruning", "order": "shuffled"},
    "attribution": {"method": "attribution-pruning"},
    "evoprompt": {"method": "evoprompt", "mode": "de", "population": 4, **WRITES},
    "ape": {"method": "ape", "proposals": 12, "rounds": 0, **WRITES},
    "rlprompt": {"method": "rlprompt", "hidden": 16, "batch_size": 4, "lr": 1e-2},
}


def killed_after(rows: int, options: dict) -> None:
    """Train in a process that kills itself at once when it has written so many rows of metrics."""
    child = os.fork()
    if child == 0:
        append, written = RunDir.append, []

        def counted(self, step, metrics):
            append(self, step, metrics)
            written.append(step)
            if len(written) == rows:
                os.kill(os.getpid(), signal.SIGKILL)

        RunDir.append = counted
        try:
            guerdon.train(**options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main(data: str, directory: Path) -> None:
    torch.set_num_threads(1)
    for kind, own in KINDS.items():
        options = {**SMALL, **own, "data": data}
        whole = guerdon.train(**options, out=str(directory / kind / "whole"))
        for rows in (1, len(whole.metrics()) - 1):
            path = directory / kind / f"killed-{rows}"
            killed_after(rows, {**options, "out": str(path)})
            assert RunDir.open(path).status["state"] == "killed"
            guerdon.resume(path)


main(sys.argv[1], Path(sys.argv[2]))
