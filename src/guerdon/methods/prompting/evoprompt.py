"""EvoPrompt (arXiv 2309.08532): evolutionary algorithms whose crossover and mutation are done by a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.methods.base import Metrics, method
from guerdon.methods.prompting.instructions import InstructionMethod

if TYPE_CHECKING:
    from guerdon.training.prompting import Search

LOWEST = {"reward": -180.0, "accuracy": 0.0}  # that each fitness can be
# Figures 1 and 2 of the paper.
GENETIC = """Please follow the instruction step-by-step to generate a better prompt.
1. Crossover the following prompts and generate a new prompt:
Prompt 1: {0}
Prompt 2: {1}
2. Mutate the prompt generated in Step 1 and generate a final prompt bracketed with <prompt> and </prompt>."""
DIFFERENTIAL = """Please follow the instruction step-by-step to generate a better prompt.
1. Identify the different parts between Prompt 1 and Prompt 2:
Prompt 1: {0}
Prompt 2: {1}
2. Randomly mutate the different parts.
3. Combine the different parts with Prompt 3, selectively replace it with the different parts in Step 2 and generate a \
new prompt.
Prompt 3: {2}
4. Crossover the prompt in Step 3 with the following basic prompt and generate a final prompt bracketed with <prompt> \
and </prompt>:
Basic Prompt: {3}"""


def roulette(fitness: Sequence[float], lowest: float) -> np.ndarray:
    """(n,) s_i / sum of all s, with s the fitness above the least that it can be; uniform where all are that."""
    s = np.asarray(fitness, float) - lowest
    return s / s.sum() if s.sum() > 0 else np.full(len(s), 1 / len(s))


def others(i: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Two different positions in range(size) that are not i."""
    a, b = rng.choice([j for j in range(size) if j != i], 2, replace=False)
    return int(a), int(b)


@method("evoprompt", paper=13, learns_from="labels", policy="prompt")
@dataclass(kw_only=True)
class EvoPrompt(InstructionMethod):
    """Instructions that a language model crosses and mutates; the fittest stay.

    `ga` (algorithm 2): N pairs of parents are drawn by roulette, p_i = s_i / sum of s; the LLM crosses and mutates each
    pair; the N fittest of parents and children go on. `de` (algorithm 3): the differences of two random instructions
    are mutated and combined with the best one, and the outcome is crossed with instruction i; it takes the place of i
    where it is fitter. Roulette measures the margin reward from -180, its least, because it can be negative.

    Source: Guo et al. 2023; the paper's requests without their worked examples. The first step judges the full prompt
    without an instruction, too, which every method here has to beat.
    """

    mode: Literal["ga", "de"] = "ga"  # genetic algorithm, or differential evolution
    population: int = 10  # N, instructions that go on
    iterations: int = 10  # T, generations; 0 goes on until the budget is spent
    write_temperature: float = 0.5  # of the LLM's replies

    def check(self) -> None:
        check_range(vars(self), "population", low=3 if self.mode == "de" else 1)
        check_range(vars(self), "iterations")
        if len(self.instructions) > self.population:
            raise ConfigError(
                f"there are {len(self.instructions)} instructions and the population is {self.population}: raise "
                "population, or leave some out."
            )

    def learn(self, run: Search) -> Iterator[Metrics]:
        state = run.state
        if "population" not in state:
            run.evaluate([run.everything])
            missing = min(self.population, run.left) - len(self.instructions)
            first = [*self.instructions, *self.write(run, self.first(run, missing))][: run.left]
            state["population"] = self.judge(run, first) or [0]  # where the budget ends here
            state["iteration"] = 0
            yield self.progress(run, state["population"])
        while run.left and (not self.iterations or state["iteration"] < self.iterations):
            generation = self._genetic if self.mode == "ga" else self._differential
            state["population"] = generation(run, state["population"])
            state["iteration"] += 1
            yield self.progress(run, state["population"])

    def _genetic(self, run: Search, population: list[int]) -> list[int]:
        p = roulette([self.fit(run, i) for i in population], LOWEST[self.fitness])
        pairs = [run.rng.choice(population, 2, p=p) for _ in range(min(self.population, run.left))]
        asked = [GENETIC.format(*(run.archive[i].instruction for i in pair)) for pair in pairs]
        everyone = list(dict.fromkeys(population + self.judge(run, self.write(run, asked))))
        return sorted(everyone, key=lambda i: -self.fit(run, i))[: self.population]

    def _differential(self, run: Search, population: list[int]) -> list[int]:
        texts = [run.archive[i].instruction for i in population]
        best = max(range(len(population)), key=lambda k: self.fit(run, population[k]))
        drawn = [others(k, len(population), run.rng) for k in range(min(len(population), run.left))]
        asked = [DIFFERENTIAL.format(texts[a], texts[b], texts[best], texts[k]) for k, (a, b) in enumerate(drawn)]
        children = self.judge(run, self.write(run, asked))
        for k, new in enumerate(children):
            if self.fit(run, new) > self.fit(run, population[k]):
                population = [*population[:k], new, *population[k + 1 :]]
        return population
