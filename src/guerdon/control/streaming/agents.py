"""Agents of one stream, in torch, and what is left of them when learning is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.control.ingredients import ActorCriticIngredients, Ingredients
from guerdon.control.networks import Categorical
from guerdon.control.spaces import Spec
from guerdon.control.streaming.networks import Kind, build_network
from guerdon.control.streaming.optimizers import build_optimizer
from guerdon.control.streams import Streams


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
