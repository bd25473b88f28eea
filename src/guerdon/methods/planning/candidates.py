"""One answer of several to the same prompt: the best by its score, or the one that most of them agree on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from guerdon.rewards.verifiers import last_number


def best_of_n(scores: Sequence[float] | np.ndarray) -> int:
    """The index of the highest score, the first one of equals (Stiennon et al. 2020)."""
    return int(np.argmax(scores))


def vote(answers: Sequence[Hashable | None], weights: Sequence[float] | np.ndarray | None = None) -> int:
    """The index that stands for the answer with the most weight.

    Without weights this is self-consistency (Wang et al. 2022, arXiv 2203.11171), with those of a verifier weighted
    voting (Li et al. 2022, arXiv 2206.02336). Of those that gave the winning answer the heaviest is returned, and of
    equals the first.

    Args:
        answers: n final answers; None for what holds none, which wins only where nothing else is there.
        weights: (n,), at least 0; equal without them.
    """
    each = np.ones(len(answers)) if weights is None else np.asarray(weights, dtype=float)
    totals: dict[Hashable | None, float] = defaultdict(float)
    for answer, weight in zip(answers, each, strict=True):
        totals[answer] += weight
    voted = [answer for answer in totals if answer is not None] or [None]
    winner = max(voted, key=lambda answer: totals[answer])
    return max((i for i, answer in enumerate(answers) if answer == winner), key=lambda i: each[i])


def vote_weights(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """exp(score) of each of n answers, over their sum: what a Bradley-Terry reward, known up to a constant, can say."""
    odds = np.exp(np.asarray(scores, dtype=float) - np.max(scores))
    return odds / odds.sum()


def final_answer(text: str) -> str | None:
    """By what answers are told apart in a vote; None where there is nothing.

    What stands in the last `<answer>` tag, else in the last `\\boxed{}`, else the last number, else the last line
    without case and punctuation at its ends.
    """
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL) or re.findall(r"\\boxed\{([^{}]*)\}", text)
    if found:
        text = found[-1]
    elif (number := last_number(text)) is not None:
        return number
    lines = text.strip().splitlines()
    return (" ".join(lines[-1].split()).strip(" .,;:!*`\"'").lower() or None) if lines else None
