"""Logged transitions in memory, and the statistics by which they are normalised."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from guerdon.control.spaces import Spec
from guerdon.errors import ConfigError, DataError


class Chained:
    """Next observations that are the observations of the following rows, held without a second copy.

    Read it as an array: `chained[rows]`, `np.asarray(chained)`.
    """

    def __init__(self, observations: np.ndarray, ends: np.ndarray, finals: np.ndarray) -> None:
        """`ends` (N,) marks the last row of each episode; `finals` holds what was seen after these rows, in order."""
        self._observations, self.ends, self.finals = observations, ends, finals
        self._final_of = np.cumsum(ends) - 1
        self.shape, self.dtype, self.ndim = observations.shape, observations.dtype, observations.ndim

    def __len__(self) -> int:
        return len(self._observations)

    def __getitem__(self, rows: Any) -> np.ndarray:
        index = np.arange(len(self))[rows]
        last = self.ends[index]
        found = self._observations[np.where(last, index, index + 1)]
        if index.ndim == 0:
            return self.finals[self._final_of[index]] if last else found
        found[last] = self.finals[self._final_of[index[last]]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def take(self, observations: np.ndarray, rows: np.ndarray) -> Chained:
        """The same for the rows at these indices alone, where `observations` are those of the rows."""
        ends = self.ends[rows] | np.append(np.diff(rows) != 1, True)
        return Chained(observations, ends, self[rows[ends]])


@dataclass(eq=False)
class Transitions:
    """Logged transitions, row by row in the order of time, episode after episode.

    Vectors are float32, images uint8 with channels first. An episode's last row is `terminated`, `truncated` or both;
    where `terminated` stands earlier, the task had ended there but the recording went on (OGBench).
    """

    observations: np.ndarray  # (N, *obs)
    actions: np.ndarray  # (N, A) float32, or (N,) int64 where they are discrete
    rewards: np.ndarray  # (N,) float32
    next_observations: np.ndarray | Chained  # (N, *obs); `Chained` for images of whole episodes
    terminated: np.ndarray  # (N,) bool
    truncated: np.ndarray  # (N,) bool
    episode: np.ndarray  # (N,) int64, rising from 0
    spec: Spec
    source: str = ""
    env: str | None = None  # the environment it was recorded in, where that is known
    notes: list[str] = field(default_factory=list)  # what the file left open, and how it was settled
    declared: bool = True  # whether the source says which actions there are; else `spec` is what the rows show of them

    def __len__(self) -> int:
        return len(self.rewards)

    @cached_property
    def starts(self) -> np.ndarray:
        """(episodes,) the first row of each episode."""
        return np.flatnonzero(np.append(True, np.diff(self.episode) != 0)) if len(self) else np.zeros(0, np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the arrays: equal for equal data, wherever it was read from."""
        digest = hashlib.sha256()
        for name in (*_ARRAYS, "terminated", "truncated", "episode"):
            array = getattr(self, name)
            digest.update(f"{name} {array.dtype} {array.shape};".encode())
            for rows in blocks(array):
                digest.update(np.ascontiguousarray(array[rows]).data)
        return digest.hexdigest()

    def returns(self) -> np.ndarray:
        """(episodes,) the undiscounted sum of rewards."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.starts)

    def lengths(self) -> np.ndarray:
        """(episodes,) rows of each."""
        return np.diff(np.append(self.starts, len(self)))

    def where(self, row: int) -> str:
        """`row 17 (episode 2, step 3)`, all counted from 0."""
        episode = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"row {row} (episode {self.episode[row]}, step {row - self.starts[episode]})"

    def subset(self, rows: np.ndarray) -> Transitions:
        """The rows at these indices, or where this mask is true, in this order; episodes keep their numbers."""
        rows = np.arange(len(self))[rows]
        observations = self.observations[rows]
        following = self.next_observations
        return replace(
            self,
            observations=observations,
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            next_observations=following.take(observations, rows) if isinstance(following, Chained) else following[rows],
            terminated=self.terminated[rows],
            truncated=self.truncated[rows],
            episode=self.episode[rows],
            notes=list(self.notes),
        )

    def recorded_in(self, env: str, spec: Spec) -> Transitions:
        """The same, known to be from `env`, whose spec takes the place of what the rows alone showed of the actions.

        Raises:
            DataError: they cannot be from there: other observations, or other actions.
        """
        told, there = asdict(self.spec), asdict(spec)
        shown = () if self.declared else ("low", "high", "actions") if spec.discrete else ("low", "high")
        wrong = [
            f"{n} {told[n]} in the data and {there[n]} there" for n in told if n not in shown and told[n] != there[n]
        ]
        if spec.discrete and not wrong and self.spec.actions > spec.actions:
            wrong = [f"action {self.spec.actions - 1} in the data and {spec.actions} actions there"]
        if wrong:
            raise DataError(
                f"{self.source} and {env} do not fit: {'; '.join(wrong)}. Name the environment that made the data."
            )
        return replace(self, env=env, spec=spec)

    def scaled(self, normalizer: Normalizer) -> Transitions:
        """The same with observations, this and next, as `normalizer` scales them."""
        following = np.asarray(self.next_observations)
        return replace(
            self, observations=normalizer.apply(self.observations), next_observations=normalizer.apply(following)
        )

    def split(self, share: float, seed: int = 0) -> tuple[Transitions, Transitions]:
        """(train, held out): `share` of the episodes, chosen at random by `seed`, is held out whole.

        Where there are two episodes or more and the share is neither 0 nor 1, neither side is empty.

        Raises:
            ConfigError: the share is not within 0 and 1.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"a share of {share} cannot be held out: it must lie within 0 and 1.")
        episodes = self.episode[self.starts]
        count = round(share * len(episodes))
        if 0 < share < 1:
            count = max(min(max(count, 1), len(episodes) - 1), 0)
        held_out = np.isin(self.episode, np.random.default_rng(seed).permutation(episodes)[:count])
        return self.subset(~held_out), self.subset(held_out)


_ARRAYS = ("observations", "actions", "rewards", "next_observations")
_BLOCK = 4_000_000  # numbers looked at together where a whole array would need its memory again


def blocks(array: np.ndarray | Chained) -> list[slice]:
    """Parts of the rows of an array that are small enough to be worked on as a copy."""
    step = max(1, _BLOCK // int(np.prod(array.shape[1:])))
    return [slice(start, min(start + step, len(array))) for start in range(0, len(array), step)]


def moments(*arrays: np.ndarray | Chained) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) per coordinate over the rows of all arrays together, in float64."""
    count = sum(map(len, arrays))
    parts = [(array, rows) for array in arrays for rows in blocks(array)]
    mean = sum(array[rows].sum(axis=0, dtype=np.float64) for array, rows in parts) / count
    variance = sum(np.square(array[rows] - mean).sum(axis=0) for array, rows in parts) / count
    return mean, np.sqrt(variance)


@dataclass(frozen=True)
class Normalizer:
    """x -> (x - mean) / std, per coordinate of an observation."""

    mean: np.ndarray  # (*obs), float32
    std: np.ndarray  # (*obs), float32

    @classmethod
    def fit(cls, transitions: Transitions) -> Normalizer:
        """Mean and std + 1e-3 over observations and next observations together, as the learner sees them (corrupted).

        Source: arXiv 2310.12955, section on observation normalisation.

        Raises:
            ConfigError: the observations are images, which encoders scale themselves.
        """
        if transitions.spec.image:
            raise ConfigError("images cannot be normalised: encoders scale them. Leave the normalisation off.")
        mean, std = moments(transitions.observations, transitions.next_observations)
        return cls(mean.astype(np.float32), (std + 1e-3).astype(np.float32))

    def apply(self, x: np.ndarray) -> np.ndarray:
        """`x` (..., *obs), normalised, in float32."""
        return (np.asarray(x, np.float32) - self.mean) / self.std


def not_finite(transitions: Transitions) -> dict[str, np.ndarray]:
    """Name of an array -> its rows that hold NaN or an infinity; only arrays with such rows."""
    found = {}
    for name in _ARRAYS:
        array = getattr(transitions, name)
        if array.dtype.kind == "f":
            finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
            if not finite.all():
                found[name] = np.flatnonzero(~finite)
    return found
