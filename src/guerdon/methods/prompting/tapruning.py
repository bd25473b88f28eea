"""TAPruning (arXiv 2506.17930): threshold accepting, one token after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from guerdon.fields import check_range
from guerdon.methods.base import Metrics, method
from guerdon.methods.prompting.base import PromptMethod

if TYPE_CHECKING:
    from guerdon.training.prompting import Search

LOWEST = -180.0  # of the margin reward


def accepts(new: float, best: float, tau: float, delta: float = 0.0) -> bool:
    """Whether a drop is kept: new / best >= tau, or new >= best - delta where a delta is given.

    A ratio says nothing of fitness that is not positive. Where `best` is not, both are measured from the least that the
    margin reward can be: (new + 180) / (best + 180) >= tau; no fitness divides by zero.
    """
    if delta:
        return new >= best - delta
    if best <= 0:
        new, best = new - LOWEST, best - LOWEST
    return new >= tau * best


@method("tapruning", paper=13, learns_from="labels", policy="prompt")
@dataclass(kw_only=True)
class TAPruning(PromptMethod):
    """Threshold-accepting pruning: drop each token in turn, keep the drop where the fitness does not fall far.

    f(new) / f(best) >= tau keeps a drop, and f(best) becomes the greater of the two; passes over the tokens that are
    left repeat until one removes nothing. The prompt is the last one of the accepted ones with the best validation.
    Tokens stay those of the full prompt: the surviving text is not cut into tokens again between passes.

    Source: Wang et al. 2025; threshold of the official code.
    """

    tau: float = 0.96  # least ratio of the fitness after a drop to the best so far
    delta: float = 0.0  # above 0: the fitness may fall by this much instead of by a ratio
    order: Literal["left-to-right", "shuffled"] = "left-to-right"  # of the tokens in each pass
    passes: int = 0  # over the prompt; 0 goes on until one removes nothing

    def check(self) -> None:
        check_range(vars(self), "tau", "delta", "passes")

    def learn(self, run: Search) -> Iterator[Metrics]:
        state = run.state
        if not state:
            (full,) = run.evaluate([run.everything])
            state |= {"now": full, "best": self.fit(run, full), "accepted": [full], "passes": 0, "removed": 1}
            state["waiting"] = []
            yield self.progress(run, [full])
        while run.left:
            if not state["waiting"]:
                if not state["removed"] or (self.passes and state["passes"] >= self.passes):
                    return
                state["waiting"] = self._order(run)
                state["passes"], state["removed"] = state["passes"] + 1, 0
                if not state["waiting"]:
                    return
            token = state["waiting"].pop(0)
            kept = run.archive[state["now"]].kept
            (new,) = run.evaluate([tuple(i for i in kept if i != token)])
            if accepts(self.fit(run, new), state["best"], self.tau, self.delta):
                state["now"], state["best"] = new, max(state["best"], self.fit(run, new))
                state["accepted"].append(new)
                state["removed"] += 1
            yield self.progress(run, [state["now"]])

    def _order(self, run: Search) -> list[int]:
        """The tokens that the next pass may remove."""
        left = [i for i in run.archive[run.state["now"]].kept if i in set(run.prompt.prunable)]
        return left if self.order == "left-to-right" else [left[i] for i in run.rng.permutation(len(left))]

    def candidates(self, run: Search) -> list[int]:
        """Every accepted prompt, the last one first."""
        return list(reversed(run.state["accepted"]))
