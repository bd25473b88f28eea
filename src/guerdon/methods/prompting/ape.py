"""APE (arXiv 2211.01910): a language model proposes instructions, and the one that scores best is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guerdon.fields import check_range
from guerdon.methods.base import Metrics, method
from guerdon.methods.prompting.instructions import VARY, InstructionMethod
from guerdon.methods.prompting.simple import TOGETHER

if TYPE_CHECKING:
    from guerdon.training.prompting import Candidate, Search


@method("ape", paper=13, learns_from="labels", policy="prompt")
@dataclass(kw_only=True)
class APE(InstructionMethod):
    """Automatic prompt engineer: an LLM is shown items with answers, and says which instruction they follow.

    rho* = argmax over rho of f(rho), among m instructions that the LLM proposes from different items each time (or,
    where instructions are given, varies from these). From the second round on (iterative Monte Carlo search,
    algorithm 1) it varies the best share of all that were tried, each equally often, keeping their meaning.

    Source: Zhou et al. 2022. Every instruction is judged on all search items, where the paper begins with some of them.
    The first step judges the full prompt without an instruction, too.
    """

    proposals: int = 50  # m, instructions in a round
    rounds: int = 1  # the first proposes, others vary the best ones; 0 goes on until the budget is spent
    top: float = 0.2  # share of the instructions tried that is varied in a further round

    def check(self) -> None:
        check_range(vars(self), "proposals", low=1)
        check_range(vars(self), "rounds")
        check_range(vars(self), "top", high=1, above=True)

    def learn(self, run: Search) -> Iterator[Metrics]:
        state = run.state
        if not state:
            first: list[Candidate] = [run.everything, *self.instructions]
            given = run.evaluate(first[: run.left])
            state |= {"round": 0, "parents": [], "waiting": self.proposals}
            yield self.progress(run, given)
        while run.left and (not self.rounds or state["round"] < self.rounds):
            count = min(TOGETHER, state["waiting"], run.left)
            if state["round"] == 0:
                asked = self.first(run, count)
            else:
                place = self.proposals - state["waiting"]
                parents = [run.archive[i].instruction for i in state["parents"]]
                asked = [VARY.format(parents[k % len(parents)]) for k in range(place, place + count)]
            now = self.judge(run, self.write(run, asked))
            state["waiting"] -= count
            if not state["waiting"]:
                state |= {"round": state["round"] + 1, "parents": self._best(run), "waiting": self.proposals}
            yield self.progress(run, now)

    def _best(self, run: Search) -> list[int]:
        """The best share of the instructions that were tried, best first."""
        written = [i for i, tried in enumerate(run.archive) if tried.instruction] or [0]
        ranked = sorted(written, key=lambda i: -self.fit(run, i))
        return ranked[: max(1, round(self.top * len(ranked)))]
