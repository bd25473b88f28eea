"""Deep approximate value iteration: the heuristic of A* search."""

from __future__ import annotations

from dataclasses import dataclass

from guerdon.lazy import torch
from guerdon.methods.base import method
from guerdon.methods.planning.heuristics import HeuristicLearner


@method("davi", learns_from="environment", policy="control")
@dataclass(kw_only=True)
class DAVI(HeuristicLearner):
    """Deep approximate value iteration (Agostinelli et al. 2019, "DeepCubeA"): V(s), the cost to a puzzle's goal.

    L = E[ (V(s) - min_a (c(s, a) + Vbar(s')))^2 ],    Vbar(goal) = 0, and the target of the goal itself is 0

    s is a random walk back from the goal, s' where action a leads, and Vbar a copy of V, taken whenever L is low.
    """

    estimates_q = False

    def backup(self, states: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        after = self.after(self.tables.expand(states))
        return values, (self.tables.costs + self.gamma * after).amin(-1)
