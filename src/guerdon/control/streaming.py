"""Learning from each transition once, as it comes: no replay, no target network, no batch (stream-x).

    e <- gamma lamda e + g                              g: gradient of V(s), of Q(s, a) or of log pi(a|s), not of a loss
    M  = lr kappa max(|delta|, 1) |e|_1                 |e|_1 over all parameters of a network
    w <- w + lr / max(M, 1) delta e                     delta = r + gamma V(s') (1 - done) - V(s)
    e <- 0 where an episode ended, after the update

Elsayed, Vasan and Mahmood 2024, arXiv 2410.14606. `TorchLearner` runs any network and is the reference;
`KernelLearner` runs fully connected ones, compiled, to the same numbers. Each seed has one environment, one network
and statistics of its own; nothing is averaged over seeds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.control.ingredients import ActorCriticIngredients, Ingredients
from guerdon.control.networks import Categorical
from guerdon.control.spaces import Spec
from guerdon.control.streams import Streams

Kind = Literal["td", "q", "sarsa", "ac"]
EPS = 1e-8

# Networks


def sparse_init_(weight: Tensor, sparsity: float, rng: np.random.Generator, connect_all: bool = False) -> Tensor:
    """Fill a layer's weight (outputs, ...) in place: uniform in +-1/sqrt(fan_in), then a share of each unit's at 0.

    Of each unit ceil(sparsity * fan_in) incoming weights, chosen for it at random, become 0, so that at 0.9 a unit with
    fewer than 10 inputs begins without any.

    Args:
        connect_all: leave every unit at least one.
    """
    units, fan_in = len(weight), weight[0].numel()
    bound = 1 / math.sqrt(fan_in)
    zeros = min(math.ceil(round(sparsity * fan_in, 9)), fan_in - connect_all)  # 0.9 * 10 is a little above 9
    values = rng.uniform(-bound, bound, (units, fan_in))
    np.put_along_axis(values, rng.permuted(np.tile(np.arange(fan_in), (units, 1)), axis=1)[:, :zeros], 0.0, axis=1)
    with torch.no_grad():
        return weight.copy_(torch.from_numpy(values).view_as(weight))


def build_network(inputs: Sequence[int], outputs: int, hidden: Sequence[int], layer_norm: bool) -> nn.Sequential:
    """Layers, each followed by normalisation over all of its units and LeakyReLU, then a linear output.

    Images (C, H, W) first pass convolutions: those of Atari (32 of 8x8 by 5, 64 of 4x4 by 3, 64 of 3x3 by 2) from 36
    pixels on, that of MinAtar (16 of 3x3) below.
    """
    layers: list[nn.Module] = []
    shape = tuple(inputs)

    def add(layer: nn.Module) -> None:
        nonlocal shape
        shape = tuple(layer(torch.zeros(1, *shape)).shape[1:])
        norm = [nn.LayerNorm(shape, elementwise_affine=False)] if layer_norm else []
        layers.extend([layer, *norm, nn.LeakyReLU(0.01)])

    if len(shape) == 3:
        convolutions = ((32, 8, 5), (64, 4, 3), (64, 3, 2)) if min(shape[1:]) >= 36 else ((16, 3, 1),)
        for channels, size, stride in convolutions:
            add(nn.Conv2d(shape[0], channels, size, stride))
        layers.append(nn.Flatten())
        shape = (math.prod(shape),)
    for width in hidden:
        add(nn.Linear(shape[0], width))
    return nn.Sequential(*layers, nn.Linear(shape[0], outputs))


def paper_hidden(kind: Kind, spec: Spec) -> tuple[int, ...]:
    """Widths of the fully connected layers in the paper's experiments."""
    if spec.image:
        return (256,) if min(spec.observation[1:]) >= 36 else (128,)
    return (32, 32) if kind in ("q", "sarsa") else (128, 128)


# Optimisers: gradients of the output are fed to them, and delta when they step


class TraceOptimizer(torch.optim.Optimizer, ABC):
    """Keeps an eligibility trace e <- gamma lamda e + p.grad of each parameter, and moves along delta * e.

    `p.grad` is the gradient of what is learned (a value, a log-probability), never of a loss: delta comes in `step`.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, gamma: float, lamda: float, **options: float) -> None:
        super().__init__(params, {"lr": lr, "decay": gamma * lamda, "steps": 0, **options})
        self.bound, self.share = 0.0, 1.0  # M of the last step, and how much of lr it took

    @torch.no_grad()
    def step(self, delta: float, reset: bool = False) -> None:  # type: ignore[override]
        """One step for the error `delta`; the traces are forgotten after it where asked (an end, exploration)."""
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                trace = self.state[p].setdefault("trace", torch.zeros_like(p))
                trace.mul_(group["decay"])
                if p.grad is not None:
                    trace.add_(p.grad)
        self._move(delta)
        if reset:
            self.forget()

    def forget(self) -> None:
        """Set the traces to 0."""
        for state in self.state.values():
            state["trace"].zero_()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        state = {int(index): state for index, state in state_dict["state"].items()}  # JSON made text of the keys
        super().load_state_dict({**state_dict, "state": state})

    @abstractmethod
    def _move(self, delta: float) -> None: ...

    def _second(self, group: dict[str, Any], p: Tensor, delta: float, beta2: float = 0.999) -> Tensor:
        """Running mean of the squares of delta * e, unbiased."""
        second = self.state[p].setdefault("second", torch.zeros_like(p))
        second.mul_(beta2).add_((delta * self.state[p]["trace"]).square(), alpha=1 - beta2)
        return second / (1 - beta2 ** group["steps"])


class ObGD(TraceOptimizer):
    """Overshooting-bounded gradient descent: lr / max(M, 1) with M = lr kappa max(|delta|, 1) |e|_1; 0 for no bound.

    With kappa > 1 a step on a linear value of inputs in [-1, 1] never takes delta beyond 0.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1.0, gamma: float = 0.99, lamda: float = 0.8, kappa: float = 2.0
    ) -> None:
        super().__init__(params, lr, gamma, lamda, kappa=kappa)

    def _direction(self, group: dict[str, Any], p: Tensor, delta: float) -> Tensor:
        return self.state[p]["trace"]

    def _move(self, delta: float) -> None:
        moves = [(group, p, self._direction(group, p, delta)) for group in self.param_groups for p in group["params"]]
        norm = sum(float(direction.abs().sum()) for _, _, direction in moves)
        for group, p, direction in moves:
            self.bound = group["lr"] * group["kappa"] * max(abs(delta), 1.0) * norm
            self.share = 1 / max(self.bound, 1.0)
            p.add_(direction, alpha=group["lr"] * self.share * delta)


class AdaptiveObGD(ObGD):
    """ObGD along e / sqrt(v + 1e-8), v being the unbiased running mean (0.999) of (delta e)^2, also in M."""

    def _direction(self, group: dict[str, Any], p: Tensor, delta: float) -> Tensor:
        return self.state[p]["trace"] / (self._second(group, p, delta) + EPS).sqrt()


class TraceAdam(TraceOptimizer):
    """Adam (0.9, 0.999) that ascends delta * e; with lamda = 0 the usual semi-gradient step."""

    def _move(self, delta: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                first = self.state[p].setdefault("first", torch.zeros_like(p))
                first.lerp_(delta * self.state[p]["trace"], 0.1)
                unbiased = first / (1 - 0.9 ** group["steps"])
                p.add_(unbiased / (self._second(group, p, delta).sqrt() + EPS), alpha=group["lr"])


def build_optimizer(options: Ingredients, params: Iterable[Tensor], kappa: float) -> TraceOptimizer:
    """The optimiser that the options name, for one network."""
    if options.optimizer == "adam":
        return TraceAdam(params, options.lr, options.gamma, options.lamda)
    cls = AdaptiveObGD if options.optimizer == "adaptive-obgd" else ObGD
    return cls(params, options.lr, options.gamma, options.lamda, 0.0 if options.optimizer == "sgd" else kappa)


# Normalisation: each value joins the statistics, then it is normalised by them


class Welford:
    """Running mean and sample variance (n - 1; 1 at n = 1) of arrays of one shape (Welford 1962)."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.count = 0
        self.mean, self.squares = np.zeros(shape), np.zeros(shape)

    @property
    def variance(self) -> np.ndarray:
        return self.squares / (self.count - 1) if self.count > 1 else np.ones_like(self.squares)

    def add(self, x: np.ndarray | float) -> None:
        """Let one more value join."""
        self.count += 1
        before = x - self.mean
        self.mean = self.mean + before / self.count
        self.squares = self.squares + before * (x - self.mean)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update({k: np.array(v) if isinstance(v, Tensor) else v for k, v in state.items()})


class ObservationNormalizer(Welford):
    """(x - mean) / sqrt(variance + 1e-8) with x among the statistics already; the first x becomes 0."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.add(x)
        return (x - self.mean) / np.sqrt(self.variance + EPS)


class RewardScaler(Welford):
    """r / sqrt(Var(u) + 1e-8) with u <- gamma u (1 - done) + r: neither centred nor clipped.

    `done`, terminated or truncated, is that of the same step: what has been gathered is forgotten with the last reward,
    which itself goes on into the next episode. So it is in the paper's experiments.
    """

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma, self.u = gamma, 0.0

    def __call__(self, reward: float, done: bool) -> float:
        self.u = self.gamma * self.u * (not done) + reward
        self.add(self.u)
        return float(reward / np.sqrt(self.variance + EPS))


class Senses:
    """What one stream makes of its observations and rewards.

    Args:
        shape: of an observation.
        frames: how many frames an observation stacks on its first axis, the newest last; each is normalised once, when
            it comes, and then stacked.
        tick: what the time feature grows by in a step (1 / time limit); None without it. It is -0.5 at a reset and at
            the step after it, as in the paper's experiments.
    """

    def __init__(self, options: Ingredients, shape: Sequence[int], frames: int = 1, tick: float | None = None) -> None:
        frame = (shape[0] // frames, *shape[1:])
        self.tick, self.time = tick, -0.5
        self.stack: deque[np.ndarray] = deque(maxlen=frames)
        self.normalizer = ObservationNormalizer(frame) if options.normalize_observations else None
        self.scaler = RewardScaler(options.gamma) if options.scale_rewards else None

    def observe(self, obs: np.ndarray, begins: bool) -> Tensor:
        """Features (1, ...) of an observation; `begins` at the first of an episode."""
        stacked = self.stack.maxlen or 1
        x = obs[-(len(obs) // stacked) :].astype(np.float64)
        if self.normalizer is not None:
            x = self.normalizer(x)
        if begins:
            self.stack.extend([x] * stacked)
        else:
            self.stack.append(x)
        x = np.concatenate(self.stack)
        if self.tick is not None:
            self.time = -0.5 if begins else self.time
            x = np.append(x, self.time)
            self.time += 0.0 if begins else self.tick
        return torch.from_numpy(x[None]).float()

    def reward(self, reward: float, done: bool) -> float:
        return self.scaler(reward, done) if self.scaler is not None else float(reward)

    def state_dict(self) -> dict[str, Any]:
        return {"time": self.time, "stack": list(self.stack), "parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.time = state["time"]
        self.stack.extend(np.asarray(frame) for frame in state["stack"])
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)

    @property
    def _parts(self) -> list[Welford]:
        return [part for part in (self.normalizer, self.scaler) if part is not None]


# Agents of one stream, in torch


class ValueAgent:
    """Stream TD(lamda), SARSA(lamda) or Watkins's Q(lamda); a TD network has one output, the others one per action."""

    def __init__(self, kind: Kind, options: Ingredients, network: nn.Module) -> None:
        self.kind, self.gamma, self.network = kind, options.gamma, network
        self.optimizer = build_optimizer(options, network.parameters(), options.kappa)
        self.optimizers = (self.optimizer,)

    @torch.no_grad()
    def act(self, x: Tensor, noise: Tensor, epsilon: float) -> tuple[int, bool]:
        """An epsilon-greedy action from two uniform draws, and whether it is not the greedy one."""
        q = self.network(x)[0]
        greedy = int(q.argmax())
        if float(noise[0]) < epsilon:
            drawn = int(float(noise[1]) * len(q))
            return drawn, drawn != greedy
        return greedy, False

    def update(
        self,
        x: Tensor,
        action: int,
        reward: float,
        x_next: Tensor,
        terminated: bool,
        truncated: bool,
        next_action: int = 0,
        explored: bool = False,
    ) -> dict[str, float]:
        """Learn from one transition of features (1, ...).

        Both kinds of end stop the bootstrap and the trace: the time feature tells a value of the time that is left.
        SARSA bootstraps from `next_action`; Q forgets its trace after an action that `explored`, TD takes action 0.
        """
        done = terminated or truncated
        with torch.no_grad():
            q_next = self.network(x_next)[0]
            ahead = float(q_next.max() if self.kind == "q" else q_next[next_action])
        value = self.network(x)[0, action]
        delta = reward + (0.0 if done else self.gamma * ahead) - value.item()
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step(delta, reset=done or (self.kind == "q" and explored))
        return {
            "td/abs": abs(delta),
            "loss/td": delta * delta,
            "value/mean": value.item(),
            "obgd/bound": self.optimizer.bound,
            "obgd/share": self.optimizer.share,
        }


class ActorCriticAgent:
    """Stream AC(lamda) with a policy network of its own: a softmax, or a diagonal Gaussian (means, then deviations
    before softplus).
    """

    def __init__(self, options: ActorCriticIngredients, policy: nn.Module, value: nn.Module, discrete: bool) -> None:
        self.gamma, self.entropy_coef, self.discrete = options.gamma, options.entropy_coef, discrete
        self.policy, self.value = policy, value
        self.policy_optimizer = build_optimizer(options, policy.parameters(), options.kappa_policy)
        self.value_optimizer = build_optimizer(options, value.parameters(), options.kappa)
        self.optimizers = (self.value_optimizer, self.policy_optimizer)

    def distribution(self, x: Tensor) -> torch.distributions.Distribution:
        out = self.policy(x)[0]
        if self.discrete:
            return torch.distributions.Categorical(logits=out)
        mean, deviation = out.chunk(2)
        return torch.distributions.Independent(torch.distributions.Normal(mean, F.softplus(deviation)), 1)

    @torch.no_grad()
    def act(self, x: Tensor, noise: Tensor) -> Tensor:
        """A sample (), or (A,) and not clipped, from uniform noise (1,), or normal noise (A,)."""
        policy = self.distribution(x)
        if isinstance(policy, torch.distributions.Categorical):
            return (policy.probs.cumsum(0) <= noise[0]).sum().clamp(max=len(policy.probs) - 1)
        return policy.mean + policy.stddev * noise

    def update(
        self, x: Tensor, action: Tensor, reward: float, x_next: Tensor, terminated: bool, truncated: bool
    ) -> dict[str, float]:
        """Learn from one transition of features (1, ...): both networks from the same delta, before either moves.

        The policy's trace gathers the gradient of log pi(a|s) + entropy_coef sign(delta) H(pi(.|s)): multiplied by
        delta, the second part always raises the entropy.
        """
        done = terminated or truncated
        with torch.no_grad():
            ahead = float(self.value(x_next))
        value = self.value(x).squeeze()
        delta = reward + (0.0 if done else self.gamma * ahead) - value.item()
        policy = self.distribution(x)
        entropy = policy.entropy()
        objective = policy.log_prob(action) + self.entropy_coef * float(np.sign(delta)) * entropy
        for optimizer, learned in zip(self.optimizers, (value, objective), strict=True):
            optimizer.zero_grad()
            learned.backward()
            optimizer.step(delta, reset=done)
        return {
            "td/abs": abs(delta),
            "loss/td": delta * delta,
            "value/mean": value.item(),
            "obgd/bound": self.value_optimizer.bound,
            "obgd/share": self.value_optimizer.share,
            "obgd/bound_policy": self.policy_optimizer.bound,
            "obgd/share_policy": self.policy_optimizer.share,
            "policy/entropy": entropy.item(),
        }


# What is left of it all when learning is over


class StreamActor(nn.Module):
    """The policies of S learners: the best action, with `streams` what they would have drawn.

    TD's holds values (`forward`) and acts at random. Where there was a time feature it stays at 0, the middle of an
    episode: an actor is not told how far an episode has come (on CartPole its returns are no worse for it).

    Args:
        learns: td, q, sarsa or ac.
        timed: whether the last input of the networks is the time feature.
        epsilon: share of random actions of Q and SARSA when acting with streams.
    """

    kind = "stream"

    def __init__(
        self,
        seeds: int,
        spec: Spec,
        learns: Kind,
        hidden: Sequence[int],
        layer_norm: bool,
        timed: bool,
        epsilon: float = 0.0,
    ) -> None:
        super().__init__()
        self.seeds, self.spec, self.learns, self.timed, self.epsilon = seeds, spec, learns, timed, epsilon
        self.hidden, self.layer_norm = tuple(hidden), layer_norm
        inputs: tuple[int, ...] = (spec.observation[0] + 1,) if timed else spec.observation
        self.gaussian = learns == "ac" and not spec.discrete
        outputs = 1 if learns == "td" else spec.actions * (2 if self.gaussian else 1)
        self._network = [build_network(inputs, outputs, hidden, layer_norm)]  # in a list: its weights are not ours
        size = sum(p.numel() for p in self._network[0].parameters())
        self.weights = nn.Parameter(torch.full((seeds, size), torch.nan), requires_grad=False)

    @property
    def config(self) -> dict[str, Any]:
        """Plain data from which it is made again, without its parameters."""
        return {
            "actor": self.kind,
            "seeds": self.seeds,
            "spec": asdict(self.spec),
            "learns": self.learns,
            "hidden": list(self.hidden),
            "layer_norm": self.layer_norm,
            "timed": self.timed,
            "epsilon": self.epsilon,
        }

    def forward(self, obs: Tensor) -> Tensor:
        """Outputs (S, B, O) for observations (S, B, *obs): values, or what a policy's distribution is made of."""
        obs = F.pad(obs.float(), (0, 1)) if self.timed else obs.float()
        (network,) = self._network
        found = []
        for weights, x in zip(self.weights, obs, strict=True):
            nn.utils.vector_to_parameters(weights, network.parameters())
            found.append(network(x))
        return torch.stack(found)

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        """Actions (S, B, A), or (S, B) where they are discrete, for observations (S, B, *obs)."""
        if self.learns == "td":
            return self._at_random(obs.shape[1], streams)
        out = self(obs)
        if self.gaussian:
            mean, deviation = out.chunk(2, -1)
            if streams is not None:
                mean = mean + F.softplus(deviation) * streams.normal("act", *mean.shape[1:])
            return mean.clamp(torch.tensor(self.spec.low), torch.tensor(self.spec.high))
        if streams is None:
            return out.argmax(-1)
        if self.learns == "ac":
            return Categorical(out).sample(streams.uniform("act", *out.shape[1:]))[0]
        explores = streams.uniform("explore", obs.shape[1]) < self.epsilon
        return torch.where(explores, self._at_random(obs.shape[1], streams), out.argmax(-1))

    def _at_random(self, batch: int, streams: Streams | None) -> Tensor:
        """Actions drawn uniformly; without streams the first choice, or the middle of the range."""
        spec = self.spec
        if spec.discrete:
            first = torch.zeros(self.seeds, batch, dtype=torch.long)
            return first if streams is None else streams.integers("act", spec.actions, batch)
        middle = torch.full((self.seeds, batch, spec.actions), 0.5)
        drawn = middle if streams is None else streams.uniform("act", batch, spec.actions)
        return torch.tensor(spec.low).lerp(torch.tensor(spec.high), drawn)


# Learners: an agent for each seed, from transition to transition

METRICS = (
    "td/abs", "loss/td", "value/mean", "obgd/bound", "obgd/share",
    "obgd/bound_policy", "obgd/share_policy", "policy/entropy",
)  # fmt: skip


class Learner(ABC):
    """One agent per seed, each in an environment of its own.

    `begin` takes the first observations (S, ...), and `step` what the last actions led to; both return the next actions
    for the environments: (S,) int64, or (S, A) float32, which the environments clip to their bounds (what is learned is
    the likelihood of what was drawn). A TD learner has no policy, and its actions mean nothing.

    Attributes:
        epsilon: share of random actions of Q and SARSA, to be set before each step.
        unconnected: units of each seed's networks that began without any incoming weight.

    Args:
        time_limit: steps of an episode, for the time feature; None where there is no limit.
        frames: see `Senses`.
    """

    def __init__(
        self,
        kind: Kind,
        options: Ingredients,
        spec: Spec,
        streams: Streams,
        time_limit: int | None = None,
        frames: int = 1,
    ) -> None:
        self.kind, self.options, self.spec, self.streams, self.frames = kind, options, spec, streams, frames
        self.epsilon = 0.0
        self.tick = 1 / time_limit if options.time_feature and time_limit and not spec.image else None
        self.inputs: tuple[int, ...] = spec.observation if self.tick is None else (spec.observation[0] + 1,)
        self.hidden = options.hidden or paper_hidden(kind, spec)
        self.gaussian = kind == "ac" and not spec.discrete
        outputs = {"td": 1, "ac": spec.actions * (2 if self.gaussian else 1)}.get(kind, spec.actions)
        self.outputs = {"policy": outputs, "value": 1} if kind == "ac" else {"value": outputs}
        self.names = METRICS if kind == "ac" else METRICS[:5]
        self.tally = np.zeros((len(streams.seeds), len(self.names)))
        self.count, self.told = 0, 0  # steps so far, and those of which metrics were taken
        self.unconnected = 0

    def networks(self, seed: int) -> dict[str, nn.Sequential]:
        """Fresh networks of one seed: its `value`, and for an actor-critic its `policy`."""
        options, rng = self.options, self.streams.generator("networks", seed)
        found, self.unconnected = {}, 0
        for name, outputs in self.outputs.items():
            found[name] = build_network(self.inputs, outputs, self.hidden, options.layer_norm)
            for layer in found[name]:
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    sparse_init_(layer.weight, options.sparsity, rng, options.connect_all)
                    nn.init.zeros_(cast(Tensor, layer.bias))
                    self.unconnected += int((layer.weight.flatten(1) == 0).all(1).sum())
        return found

    def noise(self) -> Tensor:
        """What one action of each seed is drawn from: normal (S, A), or uniform (S, 2)."""
        drawn = self.streams.normal("act", self.spec.actions) if self.gaussian else self.streams.uniform("act", 2)
        return drawn.contiguous()

    @abstractmethod
    def begin(self, obs: np.ndarray) -> np.ndarray:
        """Start episodes, without a trace of what was before."""

    @property
    @abstractmethod
    def actions(self) -> np.ndarray:
        """What `begin` or `step` returned last."""

    @abstractmethod
    def step(
        self, obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, final: np.ndarray
    ) -> np.ndarray:
        """`final` (S, ...) is where the actions led, `obs` where the next ones are taken: after an end the first
        observation of the next episode, else the same.
        """

    @abstractmethod
    def weights(self, name: str) -> Tensor:
        """(S, P) parameters of the seeds' networks of this name, in the order of `nn.Module.parameters`."""

    @abstractmethod
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance (S, ...) by which observations (one frame of them) are normalised by now."""

    def policy(self) -> tuple[StreamActor, Any]:
        """What has been learned, and the mean and standard deviation by which its observations are scaled, if any."""
        actor = StreamActor(
            len(self.tally),
            self.spec,
            self.kind,
            self.hidden,
            self.options.layer_norm,
            timed=self.tick is not None,
            epsilon=self.options.epsilon(1.0),
        )
        actor.weights.data = self.weights("policy" if self.kind == "ac" else "value")
        if not self.options.normalize_observations:
            return actor, None
        mean, variance = (np.concatenate([x] * self.frames, axis=1) for x in self.statistics())
        return actor, SimpleNamespace(mean=mean.astype(np.float32), std=np.sqrt(variance + EPS).astype(np.float32))

    def take(self) -> dict[str, list[float]]:
        """Means over the steps since the last call, one for each seed: `td/abs` and `loss/td` (of |delta|, delta^2),
        `value/mean`, `obgd/bound` (M), `obgd/share` (of lr that was taken); of actor-critics `policy/entropy` too.
        """
        means = self.tally / max(self.count - self.told, 1)
        self.told = self.count
        self.tally[:] = 0
        return dict(zip(self.names, means.T.tolist(), strict=True))

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def build_learner(kind: Kind, options: Ingredients, spec: Spec, streams: Streams, **more: Any) -> Learner:
    """A compiled learner where observations are vectors and numba is installed, else the one in torch."""
    if not spec.image and find_spec("numba"):
        return KernelLearner(kind, options, spec, streams, **more)
    return TorchLearner(kind, options, spec, streams, **more)


class TorchLearner(Learner):
    """The reference: every seed's agent in torch, one after another."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.agents: list[Any] = [self._agent(self.networks(seed)) for seed in range(len(self.tally))]
        self.senses = [Senses(self.options, self.spec.observation, self.frames, self.tick) for _ in self.agents]
        self.x: list[Tensor] = []
        self.choices: list[tuple[Any, bool]] = []  # action, and whether it explored

    def _agent(self, networks: dict[str, nn.Sequential]) -> Any:
        if self.kind == "ac":
            return ActorCriticAgent(cast(ActorCriticIngredients, self.options), **networks, discrete=self.spec.discrete)
        return ValueAgent(self.kind, self.options, networks["value"])

    def _choose(self, agent: Any, x: Tensor, noise: Tensor) -> tuple[Any, bool]:
        return (agent.act(x, noise), False) if self.kind == "ac" else agent.act(x, noise, self.epsilon)

    @property
    def actions(self) -> np.ndarray:
        if self.gaussian:
            return torch.stack([action for action, _ in self.choices]).numpy()
        return np.array([int(action) for action, _ in self.choices])

    def begin(self, obs: np.ndarray) -> np.ndarray:
        for agent in self.agents:
            for optimizer in agent.optimizers:
                optimizer.forget()
        self.x = [sense.observe(o, True) for sense, o in zip(self.senses, obs, strict=True)]
        self.choices = [self._choose(*each) for each in zip(self.agents, self.x, self.noise(), strict=True)]
        return self.actions

    def step(
        self, obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, final: np.ndarray
    ) -> np.ndarray:
        noise = self.noise()
        self.count += 1
        for s, (agent, sense) in enumerate(zip(self.agents, self.senses, strict=True)):
            done = bool(terminated[s] or truncated[s])
            x, x_next = self.x[s], sense.observe(final[s], False)
            r = sense.reward(float(reward[s]), done)
            action, explored = self.choices[s]
            more = {"explored": explored} if self.kind == "q" else {}
            if self.kind == "sarsa" and not done:
                self.choices[s] = self._choose(agent, x_next, noise[s])
                more = {"next_action": self.choices[s][0]}
            told = agent.update(x, action, r, x_next, bool(terminated[s]), bool(truncated[s]), **more)
            self.tally[s] += list(told.values())
            self.x[s] = sense.observe(obs[s], True) if done else x_next
            if self.kind != "sarsa" or done:
                self.choices[s] = self._choose(agent, self.x[s], noise[s])
        return self.actions

    def weights(self, name: str) -> Tensor:
        networks = [agent.network if self.kind != "ac" else getattr(agent, name) for agent in self.agents]
        return torch.stack([nn.utils.parameters_to_vector(network.parameters()).detach() for network in networks])

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        normalizers = [sense.normalizer for sense in self.senses if sense.normalizer is not None]
        return np.stack([n.mean for n in normalizers]), np.stack([n.variance for n in normalizers])

    def state_dict(self) -> dict[str, Any]:
        return {
            "agents": [{name: part.state_dict() for name, part in _stateful(agent)} for agent in self.agents],
            "senses": [sense.state_dict() for sense in self.senses],
            **{name: getattr(self, name) for name in ("x", "choices", "tally", "count", "told")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for agent, saved in zip(self.agents, state["agents"], strict=True):
            for name, part in _stateful(agent):
                part.load_state_dict(saved[name])
        for sense, saved in zip(self.senses, state["senses"], strict=True):
            sense.load_state_dict(saved)
        self.x, self.count, self.told = list(state["x"]), state["count"], state["told"]
        self.choices = [(action, explored) for action, explored in state["choices"]]
        self.tally[:] = state["tally"]


def _stateful(agent: Any) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in vars(agent).items() if hasattr(part, "state_dict")]


class KernelLearner(Learner):
    """Fully connected networks of all seeds, compiled: one call for each step; see `kernels`. Needs numba."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        from guerdon.control import kernels

        self.kernels, chosen, seeds = kernels, self.options, len(self.tally)
        networks = [self.networks(seed) for seed in range(seeds)]
        rule = {"adaptive-obgd": kernels.ADAPTIVE, "adam": kernels.ADAM}.get(chosen.optimizer, kernels.OBGD)
        bound = 0.0 if chosen.optimizer == "sgd" else 1.0
        self.settings = kernels.Settings(
            kind={"q": kernels.Q, "sarsa": kernels.SARSA}.get(self.kind, kernels.TD),
            rule=rule,
            layer_norm=chosen.layer_norm,
            normalise=chosen.normalize_observations,
            scale=chosen.scale_rewards,
            tick=self.tick or 0.0,
            gamma=chosen.gamma,
            lamda=chosen.lamda,
            lr=chosen.lr,
            kappa=bound * chosen.kappa,
            kappa_policy=bound * getattr(chosen, "kappa_policy", 0.0),
            entropy=getattr(chosen, "entropy_coef", 0.0),
        )
        rows = kernels.ROWS[rule]
        self.nets = {name: self._stacked([each[name] for each in networks], rows) for name in self.outputs}
        (width,) = self.spec.observation
        self.senses = kernels.Senses(
            x=np.zeros((seeds, *self.inputs), np.float32),
            moments=np.zeros((seeds, 2, width + 1)),
            clock=np.zeros(seeds),
            returns=np.zeros((seeds, 4)),
        )
        shape = () if self.kind != "ac" else (self.spec.actions,) if self.gaussian else (1,)
        self.action = np.zeros((seeds, *shape), np.float32 if self.gaussian else np.int64)
        self.explored = np.zeros(seeds, bool)

    def _stacked(self, networks: list[nn.Sequential], rows: int) -> Any:
        linear = [layer for layer in networks[0] if isinstance(layer, nn.Linear)]
        sizes = [linear[0].in_features, *(layer.out_features for layer in linear)]
        weights = torch.stack([nn.utils.parameters_to_vector(network.parameters()) for network in networks]).detach()
        stacked = np.zeros((len(networks), rows, weights.shape[1]), np.float32)
        stacked[:, 0] = weights.numpy()
        tape = np.zeros((len(networks), sum(sizes) + len(sizes)), np.float32)
        return self.kernels.Network(stacked, np.array(sizes), tape)

    def begin(self, obs: np.ndarray) -> np.ndarray:
        for net in self.nets.values():
            net.rows[:, 1] = 0.0
        known, seen = (self.senses, self.settings), (obs, self.noise().numpy(), self.action)
        nets = self.nets
        if self.kind == "ac":
            self.kernels.actor_critic_begin(self.gaussian, nets["policy"], nets["value"], *known, *seen)
        else:
            self.kernels.value_begin(nets["value"], *known, self.epsilon, *seen, self.explored)
        return self.actions

    def step(
        self, obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, final: np.ndarray
    ) -> np.ndarray:
        self.count += 1
        known = self.senses, self.settings
        seen = self.count, obs, reward, terminated, truncated, final, self.noise().numpy(), self.action
        nets = self.nets
        if self.kind == "ac":
            self.kernels.actor_critic_step(self.gaussian, nets["policy"], nets["value"], *known, *seen, self.tally)
        else:
            self.kernels.value_step(nets["value"], *known, self.epsilon, *seen, self.explored, self.tally)
        return self.actions

    @property
    def actions(self) -> np.ndarray:
        return self.action.copy() if self.gaussian else self.action.reshape(-1).copy()

    def weights(self, name: str) -> Tensor:
        return torch.from_numpy(self.nets[name].rows[:, 0].copy())

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        mean, squares, count = self.senses.moments[:, 0], self.senses.moments[:, 1, :-1], self.senses.moments[:, 0, -1:]
        return mean[:, :-1].copy(), np.where(count > 1, squares / np.maximum(count - 1, 1), 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "told": self.told, "arrays": self._arrays()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.told = state["count"], state["told"]
        for mine, saved in zip(self._arrays(), state["arrays"], strict=True):
            mine[:] = saved

    def _arrays(self) -> list[np.ndarray]:
        """All that changes, beside the counts."""
        nets = [array for net in self.nets.values() for array in (net.rows, net.tape)]
        return [*nets, *self.senses, self.action, self.explored, self.tally]
