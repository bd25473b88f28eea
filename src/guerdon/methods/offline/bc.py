"""Behaviour cloning, and the imitation of actions that other methods weigh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import Metrics, method
from guerdon.methods.control import OfflineControl

if TYPE_CHECKING:
    from guerdon.control.networks import Actor, Categorical, Gaussian
    from guerdon.control.replay import Batch
    from guerdon.training.control import ControlRun

ActorKind = Literal["deterministic", "gaussian", "bounded-gaussian"]


def imitation_loss(output: torch.Tensor | Gaussian | Categorical, action: torch.Tensor) -> torch.Tensor:
    """How far an actor is from the actions of a batch, (S, B): -log pi(a|s), or |pi(s) - a|^2 without a distribution.

    Args:
        output: of the actor; actions (S, B, A), or a distribution over actions.
        action: (S, B, A), or (S, B) where actions are discrete.
    """
    if isinstance(output, torch.Tensor):
        return (output - action).square().sum(-1)
    return -output.log_prob(action)


def top_episodes(returns: np.ndarray, lengths: np.ndarray, share: float) -> np.ndarray:
    """(E,) mask of the episodes of highest return that together hold at most `share` of all rows; at least one.

    Of equal returns the earlier episode comes first (Chen et al. 2021, arXiv 2106.01345, section 5.1).
    """
    order = np.argsort(-returns, kind="stable")
    fits = lengths[order].cumsum() <= share * lengths.sum()
    fits[0] = True
    top = np.zeros(len(returns), dtype=bool)
    top[order[fits]] = True
    return top


def imitator(run: ControlRun, kind: ActorKind, hidden: tuple[int, ...]) -> Actor:
    """An actor for imitation, without values: categorical where actions are discrete, else of this kind.

    A Gaussian one has a standard deviation that does not depend on the state, and a mean without squashing; that of a
    bounded one is a tanh between the bounds of the actions.
    """
    from guerdon.control.networks import CategoricalActor, DeterministicActor, GaussianActor

    seeds, options = len(run.seeds), dict[str, Any](precision=run.precision)
    if run.spec.discrete:
        return CategoricalActor(seeds, run.spec, hidden, **options)
    if kind != "deterministic":
        bound = kind == "bounded-gaussian"
        return GaussianActor(seeds, run.spec, hidden, squash=False, state_dependent=False, bound_mean=bound, **options)
    return DeterministicActor(seeds, run.spec, hidden, **options)


@method("bc", learns_from="transitions", policy="control")
@dataclass(kw_only=True)
class BC(OfflineControl):
    """Behaviour cloning: the actions of the data, by regression or maximum likelihood.

    L = E[ |pi(s) - a|^2 ]    or, where pi is a distribution,    L = E[ -log pi(a|s) ]

    With `top_share` below 1 it imitates the best episodes alone, "%BC" (Chen et al. 2021, arXiv 2106.01345).
    """

    lr: float = 3e-4  # learning rate of Adam
    actor: ActorKind = "deterministic"  # of continuous actions; over discrete ones it is a distribution
    top_share: float = 1.0  # share of the transitions that is imitated, in episodes of the highest return

    def check(self) -> None:
        check_range(vars(self), "lr")
        check_range(vars(self), "top_share", high=1, above=True)

    def setup(self, run: ControlRun) -> None:
        from guerdon.control.optim import Adam

        if self.top_share < 1:
            assert run.data is not None
            lengths = run.data.lengths()
            top = np.repeat(top_episodes(run.data.returns(), lengths, self.top_share), lengths)
            run.data = run.data.subset(top)
            run.corrupted = {element: mask[top] for element, mask in run.corrupted.items()}
        self.pi = run.network("actor", imitator(run, self.actor, self.hidden))
        self.optimizer = run.add("optimizer", Adam(self.pi.parameters(), self.lr))
        run.act_with(self.pi, self.normalizer(run))

    def update(self, batch: Batch) -> Metrics:
        loss = imitation_loss(self.pi(batch.obs), batch.action).mean(-1)
        self.optimizer.minimise(loss)
        return {"loss/policy": loss.detach()}
