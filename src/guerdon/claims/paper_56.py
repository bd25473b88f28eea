"""Stream-x (Elsayed, Vasan and Mahmood 2024, arXiv 2410.14606): learning from each transition once, on CartPole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.claims.base import Above, Claim, NotBelow
from guerdon.claims.training import Diverged, late_returns, trained
from guerdon.evaluation.metrics import Evaluation
from guerdon.training.rundir import RunDir

LATE = 0.2  # share of the steps whose episodes count


def trial(
    arm: Mapping[str, Any], seeds: Sequence[int], settings: Mapping[str, Any], directory: Path
) -> dict[int, Evaluation]:
    """All seeds in one run; where one of them diverges, each in its own.

    A run ends where its loss is no number any more. What counts then are the last episodes before.
    """
    training = {"env": settings["env"], "seed": seeds[0], "seeds": len(seeds), "eval_episodes": 1}
    steps = {"max_samples": settings["steps"], "log_every": settings["steps"] // 500}
    try:
        run = trained(arm["method"], arm["options"], training | steps, directory)
    except Diverged:
        if len(seeds) > 1:
            alone = [trial(arm, [seed], settings, directory / f"seed-{seed}") for seed in seeds]
            return {seed: found for each in alone for seed, found in each.items()}
        run = RunDir.open(directory / "run")
    return {
        seed: Evaluation(["run"], {"return": np.array([value])}, "return")
        for seed, value in zip(seeds, late_returns(run, seeds, LATE), strict=True)
    }


def stream(**options: Any) -> dict[str, Any]:
    return {"method": "stream-q", "options": {"hidden": [32, 32], **options}}


PLAIN = {"layer_norm": False, "sparsity": 0.0, "normalize_observations": False, "scale_rewards": False}

CLAIM = Claim(
    paper=56,
    says=(
        "Q(lambda) that learns from each transition once, without buffer, batch or target network, is stable and as "
        "good as batch methods with traces, a bounded step, normalisation and sparse initial weights; without them it "
        "is not."
    ),
    measures="mean return of the episodes that end in the last fifth of the steps",
    arms={
        "stream-q": stream(),
        "no-obgd": stream(optimizer="sgd", lr=1e-3),
        "no-traces": stream(lamda=0.0),
        "no-layer-norm": stream(layer_norm=False),
        "no-sparse-init": stream(sparsity=0.0),
        "no-observation-normalisation": stream(normalize_observations=False),
        "no-reward-scaling": stream(scale_rewards=False),
        "sgd": stream(optimizer="sgd", lr=1e-3, **PLAIN),
        "adam": stream(optimizer="adam", lr=1e-3, lamda=0.0, **PLAIN),
        "dqn": {"method": "dqn", "options": {}},
        "dqn-1": {"method": "dqn", "options": {"buffer_size": 1, "batch_size": 1, "learning_starts": 0}},
    },
    settings={"cartpole": {"env": "CartPole-v1", "steps": 50_000}},
    trial=trial,
    criteria=(
        Above("stream-q", "no-obgd"),
        Above("stream-q", "sgd"),
        Above("stream-q", "adam"),
        Above("stream-q", "dqn-1"),
        NotBelow("stream-q", "dqn", 50),  # a tenth of what there is to reach
    ),
    seeds=8,
    together=8,
    minutes=15,
    quick={"steps": 2_000},
    quick_seeds=3,
)
