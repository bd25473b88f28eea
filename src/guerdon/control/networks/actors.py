"""Distributions of actions, and networks that act."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from guerdon.control.networks.layers import parameter
from guerdon.control.networks.network import Network
from guerdon.control.networks.values import DiscreteQ
from guerdon.control.spaces import Spec
from guerdon.control.streams import Streams
from guerdon.errors import ConfigError, near

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution over actions, each dimension for itself; with bounds, of a tanh between them.

        a = mean + std * noise,  or  a = centre + half * tanh(mean + std * noise)

    Attributes:
        mean: (S, B, A).
        log_std: broadcasts to `mean`.
        centre, half: of the range of squashed actions, (A,); None does not squash.
    """

    mean: Tensor
    log_std: Tensor
    centre: Tensor | None = None
    half: Tensor | None = None

    @property
    def mode(self) -> Tensor:
        """The action without noise, (S, B, A)."""
        return self._squash(self.mean)

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (S, B, A) from standard normal noise, differentiable, and their log-probs (S, B)."""
        free = self.mean + self.log_std.exp() * noise
        return self._squash(free), self._log_prob(free, noise)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probs (S, B) of actions (S, B, A); squashed ones count as at most 1 - 1e-6 of the way to a bound."""
        free = action
        if self.half is not None and self.centre is not None:
            free = torch.atanh(((action - self.centre) / self.half).clamp(-1 + 1e-6, 1 - 1e-6))
        return self._log_prob(free, (free - self.mean) * (-self.log_std).exp())

    def entropy(self) -> Tensor:
        """Entropy (S, B), before squashing if there is any: squashed, it has no closed form."""
        return (self.log_std.expand_as(self.mean) + 0.5 * (1 + _LOG_2PI)).sum(-1)

    def _squash(self, free: Tensor) -> Tensor:
        if self.half is None or self.centre is None:
            return free
        return torch.addcmul(self.centre, torch.tanh(free), self.half)

    def _log_prob(self, free: Tensor, noise: Tensor) -> Tensor:
        terms = -0.5 * noise.square() - self.log_std - 0.5 * _LOG_2PI
        if self.half is not None:  # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which no u makes infinite
            terms = terms - 2 * (math.log(2) - free - F.softplus(-2 * free)) - self.half.log()
        return terms.sum(-1)


@dataclass(frozen=True)
class Categorical:
    """A distribution over discrete actions from logits (S, B, A)."""

    logits: Tensor

    @property
    def log_probs(self) -> Tensor:
        """Log-probs of all actions, (S, B, A)."""
        return self.logits.log_softmax(-1)

    @property
    def mode(self) -> Tensor:
        """The likeliest actions, (S, B), int64."""
        return self.logits.argmax(-1)

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (S, B) from uniform noise (S, B, A), by Gumbel's trick, and their log-probs (S, B)."""
        action = (self.logits - (-noise.clamp_min(1e-20).log()).log()).argmax(-1)
        return action, self.log_prob(action)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probs (S, B) of actions (S, B)."""
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy (S, B)."""
        logs = self.log_probs
        return -(logs.exp() * logs).sum(-1)


class Actor(Network):
    """A network that acts. `config` is plain data from which `build_actor` makes it again, without its parameters."""

    kind: ClassVar[str]

    @property
    def config(self) -> dict[str, Any]:
        return {"actor": self.kind, "seeds": self.seeds, "spec": asdict(self.spec), **self.options}

    def distribution(self, outputs: Tensor) -> Any:
        """The distribution that `outputs` of the network stand for, or the actions themselves where there is none."""
        raise NotImplementedError

    def to_outputs(self, gradient: Tensor, outputs: Tensor) -> Tensor:
        """The gradient by `outputs` of the network, from that by the actions, means or logits they stand for."""
        return gradient

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        """Actions (S, B, A), or (S, B) where they are discrete, for observations (S, B, *obs).

        Args:
            streams: where exploration draws from, for each seed its own; None acts greedily.
        """
        raise NotImplementedError


class _ContinuousActor(Actor):
    """An actor whose actions have bounds."""

    low: Tensor
    high: Tensor
    bound_mean = True  # whether the mean action is centre + half * tanh(outputs), or `outputs` as they are

    def __init__(self, seeds: int, spec: Spec, outputs: int, hidden: Sequence[int], **options: Any) -> None:
        if spec.discrete:
            raise ConfigError(f"{type(self).__name__} acts with continuous actions, and these are discrete.")
        super().__init__(seeds, spec, outputs, hidden, **options)
        self.register_buffer("low", torch.tensor(spec.low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.high), persistent=False)

    def _require_bounds(self) -> None:
        if not all(map(math.isfinite, self.spec.low + self.spec.high)):
            raise ConfigError(
                f"{type(self).__name__} squashes actions between their bounds, and these have none: "
                f"from {self.spec.low} to {self.spec.high}."
            )

    def squashed_range(self) -> tuple[Tensor, Tensor]:
        """Centre and half width of the range of every dimension."""
        return (self.high + self.low) / 2, (self.high - self.low) / 2

    def mean(self, outputs: Tensor) -> Tensor:
        """The mean action that `outputs` of the network stand for."""
        if not self.bound_mean:
            return outputs
        centre, half = self.squashed_range()
        return torch.addcmul(centre, torch.tanh(outputs), half)

    def to_outputs(self, gradient: Tensor, outputs: Tensor) -> Tensor:
        if not self.bound_mean:
            return gradient
        return gradient * self.squashed_range()[1] * (1 - torch.tanh(outputs).square())


class DeterministicActor(_ContinuousActor):
    """centre + half * tanh(MLP(s)), between the bounds of the actions."""

    kind = "deterministic"

    def __init__(self, seeds: int, spec: Spec, hidden: Sequence[int] = (256, 256), **options: Any) -> None:
        super().__init__(seeds, spec, spec.actions, hidden, **options)
        self._require_bounds()

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (S, B, *obs) to actions (S, B, A)."""
        return self.distribution(self.outputs(obs))

    def distribution(self, outputs: Tensor) -> Tensor:
        return self.mean(outputs)

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        return self(obs)


class GaussianActor(_ContinuousActor):
    """A normal distribution over actions, `Gaussian`, with mean MLP(s).

    Args:
        squash: actions are a tanh of the normal variable, between their bounds; otherwise they are the variable itself,
            and `act` clips it to the bounds.
        state_dependent: the network gives the log of the standard deviation too; otherwise it is a parameter.
        bound_mean: the mean is centre + half * tanh(MLP(s)), between the bounds of the actions.
        log_std: bounds to which the log of the standard deviation is clamped.
    """

    kind = "gaussian"

    def __init__(
        self,
        seeds: int,
        spec: Spec,
        hidden: Sequence[int] = (256, 256),
        *,
        squash: bool = True,
        state_dependent: bool = True,
        bound_mean: bool = False,
        log_std: tuple[float, float] = (-5.0, 2.0),
        **options: Any,
    ) -> None:
        super().__init__(seeds, spec, spec.actions * (2 if state_dependent else 1), hidden, **options)
        self.squash, self.bound_mean, self.bounds = squash, bound_mean, log_std
        self.log_std = None if state_dependent else parameter(seeds, 1, spec.actions)
        self.options |= {"squash": squash, "state_dependent": state_dependent}
        self.options |= {"bound_mean": bound_mean, "log_std": list(log_std)}
        if squash or bound_mean:
            self._require_bounds()

    def forward(self, obs: Tensor) -> Gaussian:
        """The distribution of actions for observations (S, B, *obs)."""
        return self.distribution(self.outputs(obs))

    def distribution(self, outputs: Tensor) -> Gaussian:
        mean, log_std = outputs.chunk(2, -1) if self.log_std is None else (outputs, self.log_std)
        return Gaussian(self.mean(mean), log_std.clamp(*self.bounds), *(self.squashed_range() if self.squash else ()))

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        found = self(obs)
        action = found.mode if streams is None else found.sample(streams.normal("act", *found.mean.shape[1:]))[0]
        return action if self.squash else torch.clamp(action, self.low, self.high)


class CategoricalActor(Actor):
    """A distribution over discrete actions, `Categorical`, with logits MLP(s)."""

    kind = "categorical"

    def __init__(self, seeds: int, spec: Spec, hidden: Sequence[int] = (256, 256), **options: Any) -> None:
        super().__init__(seeds, spec, spec.actions, hidden, **options)

    def forward(self, obs: Tensor) -> Categorical:
        """The distribution of actions for observations (S, B, *obs)."""
        return self.distribution(self.outputs(obs))

    def distribution(self, outputs: Tensor) -> Categorical:
        return Categorical(outputs)

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        found = self(obs)
        return found.mode if streams is None else found.sample(streams.uniform("act", *found.logits.shape[1:]))[0]


class GreedyQ(DiscreteQ, Actor):
    """A `DiscreteQ` that takes the best action of the mean over its members, or with probability `epsilon` any.

    Attributes:
        epsilon: of acting with streams; a number, or one for each seed (S,).
    """

    kind = "greedy-q"
    epsilon: float | Tensor = 0.0

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        q = self(obs)
        best = (q if q.ndim == 3 else q.mean(1)).argmax(-1)
        if streams is None:
            return best
        epsilon = torch.as_tensor(self.epsilon, device=best.device).view(-1, 1)
        explores = streams.uniform("explore", best.shape[1]) < epsilon
        return torch.where(explores, streams.integers("act", self.spec.actions, best.shape[1]), best)


_ACTORS: dict[str, type[Actor]] = {
    cls.kind: cls for cls in (DeterministicActor, GaussianActor, CategoricalActor, GreedyQ)
}
_ELSEWHERE = {  # modules that import this one
    "stream": ("guerdon.control.streaming.agents", "StreamActor"),
    "cost-to-go": ("guerdon.control.puzzles.networks", "CostToGo"),
}


def build_actor(config: Mapping[str, Any]) -> Actor:
    """The actor that `config` describes, its parameters still NaN.

    Raises:
        ConfigError: an actor that does not exist.
    """
    options = dict(config)
    kind, seeds, spec = options.pop("actor"), options.pop("seeds"), Spec(**options.pop("spec"))
    if kind in _ELSEWHERE:
        module, name = _ELSEWHERE[kind]
        return cast(Actor, getattr(importlib.import_module(module), name)(seeds, spec, **options))
    if kind not in _ACTORS:
        raise ConfigError(f"no actor is called '{kind}'.{near(kind, _ACTORS)} There are {', '.join(_ACTORS)}.")
    return _ACTORS[kind](seeds, spec, **options)
