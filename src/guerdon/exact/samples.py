"""Tables of transitions: what was seen of a tabular MDP, sampled or logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from guerdon.errors import DataError
from guerdon.exact.mdp import TabularMDP


@dataclass(frozen=True)
class Samples:
    """Transitions by state and action, up to n of each, behind any leading axes.

    Attributes:
        rewards: (..., S, A, n).
        next_states: (..., S, A, n) int.
        terminated: (..., S, A, n) bool, whether the episode was over with this transition.
        seen: (..., S, A, n) bool; False fills the places where there are fewer than n.
    """

    rewards: np.ndarray
    next_states: np.ndarray
    terminated: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(
        cls,
        states: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_states: np.ndarray,
        terminated: np.ndarray,
        shape: tuple[int, int],
    ) -> Samples:
        """The table of logged transitions, arrays (N,), from an MDP of `shape` (S, A)."""
        if not len(states):
            raise DataError("there are no transitions to make a table of.")
        pair = np.ravel_multi_index((states, actions), shape)
        counts = np.bincount(pair, minlength=shape[0] * shape[1])
        order = np.argsort(pair, kind="stable")
        place = np.arange(len(pair)) - np.repeat(np.cumsum(counts) - counts, counts)
        table = cls(*(np.zeros((*shape, counts.max()), dtype=kind) for kind in (float, int, bool, bool)))
        at = (states[order], actions[order], place)
        table.rewards[at] = rewards[order]
        table.next_states[at] = next_states[order]
        table.terminated[at] = terminated[order]
        table.seen[at] = True
        return table

    @classmethod
    def stack(cls, tables: Sequence[Samples]) -> Samples:
        """Tables of equal shape as one with another leading axis."""
        names = ("rewards", "next_states", "terminated", "seen")
        return cls(*(np.stack([getattr(table, name) for table in tables]) for name in names))

    @property
    def counts(self) -> np.ndarray:
        """(..., S, A) how often each action was taken in each state."""
        return self.seen.sum(-1).astype(float)

    @property
    def behaviour(self) -> np.ndarray:
        """(..., S, A) share of each action in what was done in a state; 0 where nothing was."""
        return self.counts / np.maximum(self.counts.sum(-1, keepdims=True), 1)


def sample(mdp: TabularMDP, n: int, seed: int) -> Samples:
    """n transitions of each action in each state that is not terminal, from one MDP (no leading axes)."""
    rng = np.random.default_rng(seed)
    rows = np.arange(mdp.states * mdp.actions)[:, None]
    # The rows of cumulative probabilities, each one higher than the last, are one sequence for a single search.
    steps = mdp.transitions.reshape(len(rows), mdp.states).cumsum(-1) + rows
    drawn = np.searchsorted(steps.ravel(), rows + rng.random((len(rows), n)), side="right") - mdp.states * rows
    next_states = drawn.clip(0, mdp.states - 1).reshape(mdp.states, mdp.actions, n)
    rewards = np.take_along_axis(mdp.rewards, next_states, -1)
    seen = np.broadcast_to(mdp.alive[:, None, None], rewards.shape)
    return Samples(rewards, next_states, mdp.terminal[next_states], seen)


def bootstrap(samples: Samples, members: int, seed: int) -> np.ndarray:
    """(K, S, A, n) weights of K bootstrap replicates: the transitions of each pair drawn anew, as many as there are."""
    counts = samples.counts[..., None]
    shares = samples.seen / np.maximum(counts, 1)
    size = (members, *counts.shape[:-1])
    return np.random.default_rng(seed).multinomial(counts[..., 0].astype(int), shares, size).astype(float)
