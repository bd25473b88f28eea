"""PromptQuine (arXiv 2506.17930): whether a prompt with tokens missing beats the whole one, on items never searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.claims.base import Above, Claim
from guerdon.claims.training import one_thread
from guerdon.evaluation.metrics import Evaluation
from guerdon.feedback.sentiment import NAMED
from guerdon.feedback.writers import write_feedback

MODEL = {"model": "smollm2-135m", "verbalizers": ("negative=terrible", "positive=great")}


def trial(
    arm: Mapping[str, Any], seeds: Sequence[int], settings: Mapping[str, Any], directory: Path
) -> dict[int, Evaluation]:
    """One search for each seed, which draws demonstrations and search items; all are tested on the same items.

    Beside the accuracy stands what the chosen prompt had reached in search and validation, the same for all items.
    """
    from guerdon.evaluation.prompting import evaluate_chosen
    from guerdon.fields import build
    from guerdon.methods.base import get_method
    from guerdon.methods.prompting.base import PromptMethod
    from guerdon.training.config import PromptTraining
    from guerdon.training.distributed import Distribution
    from guerdon.training.prompting import PromptRun

    data = directory / "items.jsonl"
    rows = NAMED[settings["data"]]()
    write_feedback(data, [row for row in rows if len(row["text"].split()) <= settings["words"]])
    found = {}
    for seed in seeds:
        config = PromptTraining(**{**MODEL, **settings["training"]}, data=str(data), seed=seed)
        method = build(get_method(arm["method"]), arm.get("options", {}), "the claim")
        assert isinstance(method, PromptMethod)
        with one_thread():
            run = PromptRun(method, config, Distribution(), directory)
            for _ in method.learn(run):
                pass
            evaluation = evaluate_chosen(run)
        tried, validation, _ = run.selected()
        told = {"search": tried.score.accuracy, "validation": validation.accuracy, "tokens": len(tried.kept)}
        evaluation.metrics |= {name: np.full(len(evaluation.items), float(value)) for name, value in told.items()}
        found[seed] = evaluation
    return found


TRAINING = {
    "template": "Review: {text}\\nSentiment:",
    "search_items": 24,
    "validation_items": 60,
    "eval_items": 200,
}
CLAIM = Claim(
    paper=13,
    says=(
        "A few-shot prompt that lost some of its tokens answers better than the whole one, and evolutionary pruning "
        "finds such a prompt better than random pruning does with as many evaluations."
    ),
    measures="accuracy on 200 test items with the prompt that 60 validation items chose (SmolLM2-135M)",
    arms={
        "full-prompt": {"method": "icl"},
        "random-pruning": {"method": "random-pruning"},
        "tapruning": {"method": "tapruning"},
        "promptquine": {"method": "promptquine", "options": {"population": 6, "reproductions": 10}},
    },
    settings={
        "negation": {"data": "templated-sentiment", "words": 12, "training": {**TRAINING, "max_samples": 150}},
        "reviews": {"data": "movie-reviews", "words": 12, "training": {**TRAINING, "max_samples": 100}},
    },
    trial=trial,
    criteria=(
        Above("promptquine", "full-prompt", where="negation"),
        Above("promptquine", "random-pruning", where="negation"),
        Above("promptquine", "full-prompt", where="reviews"),
        Above("promptquine", "random-pruning", where="reviews"),
    ),
    seeds=6,
    minutes=35,
    quick={
        "data": "templated-sentiment",
        "training": {**TRAINING, "search_items": 4, "validation_items": 4, "eval_items": 20, "max_samples": 12},
    },
    quick_seeds=2,
)
