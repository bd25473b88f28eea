"""Behaviour cloning, and the imitation of actions that other methods weigh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import Metrics, method
from guerdon.methods.control import OfflineControl, no_grad

if TYPE_CHECKING:
    from guerdon.control.networks import Actor, Categorical, Gaussian
    from guerdon.control.optim import Adam
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


def imitation_slopes(
    output: torch.Tensor | Gaussian | Categorical, action: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Derivatives of `imitation_loss` by actions, means or logits, and by log_std where there is one: (S, B, A).

    Gaussians are those of an `imitator`, without squashing.
    """
    from guerdon.control.networks import Categorical

    if isinstance(output, torch.Tensor):
        return 2 * (output - action), None
    if isinstance(output, Categorical):
        taken = action.unsqueeze(-1)
        return output.log_probs.exp().scatter_add_(-1, taken, torch.full_like(output.logits[..., :1], -1)), None
    precision = (-output.log_std).exp()
    away = (output.mean - action) * precision
    return away * precision, 1 - away.square()


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


def imitate(actor: Actor, optimizer: Adam, batch: Batch, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    """One step of an `imitator` down the gradient of E[ weight * imitation_loss ], in closed form; the loss, (S,).

    Args:
        weight: (S, B), of each action.
    """
    from guerdon.control.networks import Pass

    seen = Pass(actor, batch.obs)
    policy = actor.distribution(seen.output)
    losses = weight * imitation_loss(policy, batch.action)
    share = torch.as_tensor(weight / losses.shape[1]).unsqueeze(-1)
    to_mean, to_log_std = imitation_slopes(policy, batch.action)
    gradients = seen.parameters(actor.to_outputs(share * to_mean, seen.output))
    if to_log_std is not None:
        free = policy.log_std == actor.log_std  # not held at a bound
        gradients = ((share * to_log_std).sum(1, keepdim=True) * free, *gradients)
    optimizer.apply(gradients)
    return losses.mean(-1)


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

    @no_grad
    def update(self, batch: Batch) -> Metrics:
        return {"loss/policy": imitate(self.pi, self.optimizer, batch)}
