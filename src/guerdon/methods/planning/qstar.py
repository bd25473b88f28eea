"""Q-learning of the heuristic of Q* search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import method
from guerdon.methods.planning.heuristics import HeuristicLearner

if TYPE_CHECKING:
    from guerdon.training.config import ControlTraining


@method("qstar", paper=7, learns_from="environment", policy="control")
@dataclass(kw_only=True)
class QStar(HeuristicLearner):
    """Q-learning of costs (Agostinelli et al. 2021, arXiv 2102.04518): Q(s, a), the cost to the goal by way of a.

    L = E[ (Q(s, a) - c(s, a) - min_a' Qbar(s', a'))^2 ],    Qbar(goal, .) = 0, and the target of the goal itself is 0

    One action of each state is backed up, drawn from exp(-Q(s, .) / temperature), so that an update costs the same for
    any number of actions. Q* search asks for Q once in every state that it keeps, and generates no other.
    """

    backed_up: Literal["boltzmann", "uniform"] = "boltzmann"  # how the action of a state is drawn
    temperature: float = 1 / 3  # of the Boltzmann draw

    estimates_q = True

    def check_loop(self, training: ControlTraining) -> None:
        super().check_loop(training)
        check_range(vars(self), "temperature", above=True)

    def backup(self, states: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.backed_up == "uniform":
            actions = self.streams.integers("action", self.puzzle.actions, self.batch_size)
        else:
            shares = (values.detach() / -self.temperature).softmax(-1).cumsum(-1)
            drawn = self.streams.uniform("action", self.batch_size).unsqueeze(-1)
            actions = (shares < drawn).sum(-1).clamp(max=self.puzzle.actions - 1)
        after = self.after(self.tables.next(states, actions))
        learned = values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return learned, self.tables.costs[actions] + self.gamma * after
