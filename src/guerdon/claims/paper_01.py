"""Robust IQL (Yang et al. 2024, arXiv 2310.12955): exact fixed points on corrupted tables, without networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.claims.base import Above, Alike, Claim, NotBelow
from guerdon.evaluation.metrics import Evaluation
from guerdon.exact.robust_grid import LEARNERS, robust_grid_scores


def trial(
    arm: Mapping[str, Any], seeds: Sequence[int], settings: Mapping[str, Any], directory: Path
) -> dict[int, Evaluation]:
    """One learner in the grid; see `guerdon.exact.robust_grid`."""
    learner = arm["learner"]
    scores = robust_grid_scores(**settings, seeds=seeds, learners={learner: LEARNERS[learner]})[learner]
    return {
        seed: Evaluation(["grid"], {"normalized": np.array([score])}, "normalized")
        for seed, score in zip(seeds, scores, strict=True)
    }


CLAIM = Claim(
    paper=1,
    says=(
        "Where transitions or rewards are corrupted at random, implicit Q-learning becomes robust by a Huber loss and "
        "a quantile over critics, at no cost on clean data; against a constant bias neither helps."
    ),
    measures="value of the greedy policy at the start, as a share of the optimal one",
    arms={
        "riql": {"learner": "riql"},
        "iql": {"learner": "iql"},
        "mean-quantile": {"learner": "mean-quantile"},
        "huber-10": {"learner": "huber-10"},
    },
    settings={
        "dynamics": {"corruption": "dynamics", "n": 20},
        "reward": {"corruption": "reward", "n": 20},
        "clean": {"corruption": "none", "n": 5},
        "worst-state": {"corruption": "worst-state", "n": 20},
    },
    trial=trial,
    criteria=(
        Above("riql", "iql", 0.2, where="dynamics"),
        Above("riql", "iql", 0.2, where="reward"),
        NotBelow("riql", "iql", 0.05, where="clean"),
        Alike("riql", "iql", 0.05, where="worst-state"),
    ),
    seeds=32,  # scores are near 0 or near 1
    together=32,
    minutes=1.5,
    quick={},
    quick_seeds=8,
)
