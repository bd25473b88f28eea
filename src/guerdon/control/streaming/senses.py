"""Normalisation online: each value joins the statistics, then it is normalised by them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guerdon.control.ingredients import Ingredients
from guerdon.control.streaming import EPS


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
