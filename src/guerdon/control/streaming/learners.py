"""Learners: an agent for each seed, from transition to transition."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from guerdon.control.ingredients import ActorCriticIngredients, Ingredients
from guerdon.control.spaces import Spec
from guerdon.control.streaming import EPS
from guerdon.control.streaming.agents import ActorCriticAgent, StreamActor, ValueAgent
from guerdon.control.streaming.networks import Kind, build_network, paper_hidden, sparse_init_
from guerdon.control.streaming.senses import Senses
from guerdon.control.streams import Streams

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

    @abstractmethod
    def reward_scale(self) -> np.ndarray:
        """(S,) what rewards are divided by by now."""

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

    def reward_scale(self) -> np.ndarray:
        scalers = [sense.scaler for sense in self.senses if sense.scaler is not None]
        return np.sqrt([scaler.variance + EPS for scaler in scalers]) if scalers else np.ones(len(self.senses))

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
        from guerdon.control.streaming import kernels

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
        shapes = [(len(networks), rows, weights.shape[1]), (len(networks), sum(sizes) + len(sizes))]
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        block = np.zeros(ends[-1] + shapes[1][1] + 2 * max(sizes), np.float32)
        stacked, tape, scratch = np.split(block, ends)
        stacked, tape = stacked.reshape(shapes[0]), tape.reshape(shapes[1])
        stacked[:, 0] = weights.numpy()
        return self.kernels.Network(stacked, np.array(sizes), tape, scratch)

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

    def reward_scale(self) -> np.ndarray:
        squares, count = self.senses.returns[:, 2], self.senses.returns[:, 3]
        if not self.options.scale_rewards:
            return np.ones_like(count)
        return np.sqrt(np.where(count > 1, squares / np.maximum(count - 1, 1), 1.0) + EPS)

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
