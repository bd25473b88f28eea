"""PromptQuine (arXiv 2506.17930): prompts that copy themselves with some tokens lost, and compete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.methods.base import Metrics, method
from guerdon.methods.prompting.base import PromptMethod, drop

if TYPE_CHECKING:
    from guerdon.training.prompting import Kept, Search

SIZES = (1, 2, 3, 4)  # tokens that a copy loses
TRIES = 10  # to draw a size that the parent can lose
RATIOS = np.linspace(1 / 20, 1 / 5, 10)  # shares that random prompts of the first population lose


def tournament(fitness: Sequence[float], share: float, rng: np.random.Generator) -> int:
    """The best among k = max(1, floor(share n)) of n, drawn with replacement."""
    drawn = rng.integers(0, len(fitness), max(1, int(share * len(fitness))))
    return int(drawn[np.argmax(np.asarray(fitness)[drawn])])


def mutated(kept: Kept, prunable: frozenset[int], rng: np.random.Generator) -> Kept | None:
    """A copy without 1 to 4 tokens, so many drawn uniformly, always fewer than there are; None where none was drawn."""
    left = sum(i in prunable for i in kept)
    for _ in range(TRIES):
        size = int(rng.choice(SIZES))
        if size < left:
            return drop(kept, prunable, size, rng)
    return None


def survivors(fitness: Sequence[float], attempts: int, size: int) -> list[int]:
    """Positions of the `size` best among the last `attempts` of parents (best first) and children, best first.

    Where every attempt gave a child, all parents die; for each that gave none the worst parent left competes.
    """
    last = range(max(0, len(fitness) - attempts), len(fitness))
    return sorted(last, key=lambda i: -fitness[i])[:size]


@method("promptquine", paper=13, learns_from="labels", policy="prompt")
@dataclass(kw_only=True)
class PromptQuine(PromptMethod):
    """Evolutionary pruning of a few-shot prompt: copies lose tokens, the fittest survive, parents die.

    max over m of f(tokens of m), by a genetic search in which prompts are only ever shortened. Each cycle makes R
    attempts: the best of a tournament of a fifth of the P prompts is copied without 1 to 4 random tokens, unless
    that text is in the population already. The P best of the last R prompts go on: children, and the worst parents
    for attempts that failed. `gga` judges the children of a cycle together and counts R evaluations; `ssga` judges each
    at once, so that it can be a parent in the same cycle, and counts those that it makes.

    Source: Wang et al. 2025, algorithm and settings of the official code; slots of the template are never lost.
    """

    mode: Literal["gga", "ssga"] = "gga"  # generational, or steady state
    population: int = 30  # P, prompts that survive a cycle
    reproductions: int = 50  # R, attempts in a cycle
    tournament: float = 0.2  # share of the population in a tournament
    min_length: int = 15  # tokens; the search ends where the mean of the population is no longer above it
    initial: Literal["duplicate", "random"] = "duplicate"  # P copies of the full prompt, or copies pruned at random
    halving: bool = False  # only children as good as the worst parent on half of the items are judged on the rest
    stall: int = 5  # cycles of ssga without a new child after which it ends

    def check(self) -> None:
        check_range(vars(self), "population", "reproductions", "stall", low=1)
        check_range(vars(self), "min_length")
        check_range(vars(self), "tournament", high=1, above=True)
        if self.population > self.reproductions:
            raise ConfigError(
                f"population is {self.population} and reproductions {self.reproductions}: the population of a cycle is "
                "taken from its attempts, of which there have to be as many."
            )

    def learn(self, run: Search) -> Iterator[Metrics]:
        state = run.state
        if "population" not in state:
            state["population"] = self._begin(run)
            state["idle"] = 0
            yield self.progress(run, state["population"])
        while run.left and state["idle"] < self.stall and self._mean_length(run) > self.min_length:
            before = len(run.archive)
            cycle = self._generation if self.mode == "gga" else self._steady_state
            state["population"] = cycle(run, state["population"], min(self.reproductions, run.left))
            state["idle"] = state["idle"] + 1 if self.mode == "ssga" and len(run.archive) == before else 0
            yield self.progress(run, state["population"])

    def _begin(self, run: Search) -> list[int]:
        if self.initial == "duplicate":
            return run.evaluate([run.everything]) * self.population
        prunable = frozenset(run.prompt.prunable)
        ratios = run.rng.choice(RATIOS, min(self.population, run.left))
        pruned = [drop(run.everything, prunable, round(ratio * len(prunable)), run.rng) for ratio in ratios]
        return sorted(run.evaluate(pruned), key=lambda i: -self.fit(run, i))

    def _mean_length(self, run: Search) -> float:
        return float(np.mean([len(run.archive[i].kept) for i in run.state["population"]]))

    def _child(self, run: Search, population: list[int]) -> Kept | None:
        """A new prompt, or None where the attempt fails."""
        parent = population[tournament([self.fit(run, i) for i in population], self.tournament, run.rng)]
        child = mutated(run.archive[parent].kept, frozenset(run.prompt.prunable), run.rng)
        texts = {run.archive[i].text for i in population}
        return None if child is None or run.text(child) in texts else child

    def _least(self, run: Search, population: list[int]) -> tuple[str, float] | None:
        return (self.fitness, min(self.fit(run, i) for i in population)) if self.halving else None

    def _generation(self, run: Search, population: list[int], attempts: int) -> list[int]:
        children = [self._child(run, population) for _ in range(attempts)]
        born = [child for child in children if child is not None]
        everyone = population + run.evaluate(born, self._least(run, population))
        run.spend(attempts - len(born))
        return [everyone[i] for i in survivors([self.fit(run, i) for i in everyone], attempts, self.population)]

    def _steady_state(self, run: Search, population: list[int], attempts: int) -> list[int]:
        everyone = list(population)
        for _ in range(attempts):
            child = self._child(run, everyone)
            if child is not None:
                everyone += run.evaluate([child], self._least(run, everyone))
        return [everyone[i] for i in survivors([self.fit(run, i) for i in everyone], attempts, self.population)]
