"""`python chaos.py DIRECTORY`: train in processes that are killed at random moments until one reaches the end."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lives import kill_until_done
from training.problem import Fit, train

OPTIONS = {"checkpoint_every": 4, "eval_every": 3}
METHOD = Fit(seconds=0.004)


def main(path: Path) -> None:
    torch.set_num_threads(1)
    train(path.with_name("warm"), Fit(rounds=1), {})
    kill_until_done(lambda path: train(path, METHOD, OPTIONS), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
