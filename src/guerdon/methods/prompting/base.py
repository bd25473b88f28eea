"""What methods share that prune a prompt: which fitness they follow, what they may spend, and how a prompt is chosen.

A method says which prompts to try next, by `run.evaluate`; the run judges them on the search items and remembers. What
was best there is never a result: the best ones are judged again on validation items, and the one that is chosen is
tested once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from guerdon.fields import check_range
from guerdon.methods.base import Method, Metrics
from guerdon.training.config import PromptTraining, Training

if TYPE_CHECKING:
    from guerdon.training.prompting import Kept, Search


@dataclass(kw_only=True)
class PromptMethod(Method):
    """What every prompt method says: its fitness, its budget, and among how many the prompt is chosen."""

    fitness: Literal["reward", "accuracy"] = "reward"  # the margin reward, or the share of right answers
    max_prompts: int = 10_000  # prompts that are evaluated where max_samples sets no budget
    rerank: float = 0.1  # share of the prompts tried that validation chooses among; 1 and more are a number of them

    training: ClassVar[type[Training]] = PromptTraining

    def check_loop(self, training: PromptTraining) -> None:
        check_range(vars(self), "max_prompts", low=1)
        check_range(vars(self), "rerank", above=True)

    def candidates(self, run: Search) -> list[int]:
        """Where those prompts stand in the archive that validation chooses among, best first."""
        order = sorted(range(len(run.archive)), key=lambda i: -self.fit(run, i))
        count = self.rerank if self.rerank >= 1 else self.rerank * len(order)
        return order[: max(1, round(count))]

    def fit(self, run: Search, i: int) -> float:
        """Fitness of a prompt of the archive."""
        return run.archive[i].score.fitness(self.fitness)

    def progress(self, run: Search, now: list[int]) -> Metrics:
        """Metrics of a step: the archive's best, and means over the prompts at hand."""
        best = run.best(self.fitness)
        return {
            "search/best": best.score.fitness(self.fitness),
            "search/best_accuracy": best.score.accuracy,
            "search/mean": float(np.mean([self.fit(run, i) for i in now])),
            "search/length": float(np.mean([len(run.archive[i].prompt) for i in now])),
            "search/distinct": len(run.archive),
        }


def drop(kept: Kept, prunable: frozenset[int], count: int, rng: np.random.Generator) -> Kept:
    """`kept` without `count` positions drawn from the prunable ones of it."""
    chosen = rng.choice([i for i in kept if i in prunable], count, replace=False)
    gone = set(chosen.tolist())
    return tuple(i for i in kept if i not in gone)
