"""A puzzle as one table of moves, so that a single line moves any number of states of any puzzle.

A state is a row of small numbers, one for each place. A move takes every place's number from another place, which may
depend on where the 0 is (the blank of a sliding puzzle), and may flip it between 0 and 1 (Lights Out):

    next[j] = state[moves[z, a, j]] xor flips[z, a, j],    z the place of the 0 where that matters, else 0

So cubes, sliding puzzles, lamps, pancakes and any graph (its nodes being the places of the 0) are data, and a sequence
of moves is a move again: a meta-action is a row of the same table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from guerdon.errors import ConfigError
from guerdon.lazy import torch


@dataclass(frozen=True, eq=False)
class Puzzle:
    """States (N, L) uint8 below V, and A moves; the goal is one state.

    Attributes:
        name: as `make_puzzle` takes it.
        goal: (L,) uint8.
        moves: (Z, A, L) uint8, Z being 1, or L where it matters which place holds the 0.
        flips: (Z, A, L) uint8, 0 or 1.
        costs: (A,) float64, above 0.
        inverse: (P,) int, of each of the P primitive moves, which come first, the one that undoes it.
        steps: (A, D) int, the primitive moves that each move is made of, -1 behind the last.
        scramble: moves of a random walk that mixes the puzzle.
        names: of the P primitive moves, for people.
    """

    name: str
    goal: np.ndarray
    moves: np.ndarray
    flips: np.ndarray
    costs: np.ndarray
    inverse: np.ndarray
    steps: np.ndarray
    scramble: int
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        name: str,
        goal: np.ndarray,
        moves: np.ndarray,
        inverse: Sequence[int],
        scramble: int,
        *,
        flips: np.ndarray | None = None,
        costs: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> Puzzle:
        """A puzzle of primitive moves alone; nothing flips without `flips`, all costs are 1 without `costs`."""
        count = moves.shape[1]
        return cls(
            name,
            goal.astype(np.uint8),
            moves.astype(np.uint8),
            np.zeros(moves.shape, np.uint8) if flips is None else flips.astype(np.uint8),
            np.ones(count) if costs is None else np.asarray(costs, dtype=np.float64),
            np.asarray(inverse),
            np.arange(count)[:, None],
            scramble,
            tuple(map(str, range(count)) if names is None else names),
        )

    @property
    def places(self) -> int:
        """L."""
        return len(self.goal)

    @cached_property
    def values(self) -> int:
        """V: a state's numbers are below it."""
        return max(int(self.goal.max()), int(self.flips.max())) + 1

    @property
    def actions(self) -> int:
        """A."""
        return len(self.costs)

    @property
    def primitives(self) -> int:
        """P."""
        return len(self.inverse)

    def next(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Where actions (N,) lead from states (N, L): (N, L)."""
        z = self._zeros(states)
        return np.take_along_axis(states, self.moves[z, actions], 1) ^ self.flips[z, actions]

    def expand(self, states: np.ndarray, count: int | None = None) -> np.ndarray:
        """Where every action, or each of the first `count`, leads: (N, L) to (N, A, L)."""
        z = self._zeros(states)
        return np.take_along_axis(states[:, None], self.moves[:, :count][z], 2) ^ self.flips[:, :count][z]

    def _zeros(self, states: np.ndarray) -> Any:
        return (states == 0).argmax(1) if len(self.moves) > 1 else np.zeros(len(states), dtype=int)

    def solved(self, states: np.ndarray) -> np.ndarray:
        """Which of the states (N, L) are the goal: (N,) bool."""
        return (states == self.goal).all(-1)

    @cached_property
    def zobrist(self) -> np.ndarray:
        """(L, V) uint64 random words, the same for all puzzles of that shape."""
        return np.random.default_rng([self.places, self.values]).integers(
            0, 2**64, (self.places, self.values), dtype=np.uint64
        )

    def keys(self, states: np.ndarray) -> np.ndarray:
        """64-bit hashes (N,) of states (N, L): the exclusive or of one word for each place and its number.

        Of n states two share a key with a probability of about n^2 / 2^65 (Zobrist 1970).
        """
        return np.bitwise_xor.reduce(self.zobrist[np.arange(self.places), states], axis=-1)

    def walk(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """States (N, L) from which so many primitive moves (N,) lead to the goal: random walks back from it."""
        states = np.repeat(self.goal[None], len(lengths), axis=0)
        for step in range(int(lengths.max(initial=0))):
            on = np.flatnonzero(lengths > step)
            states[on] = self.next(states[on], self.inverse[rng.integers(0, self.primitives, len(on))])
        return states

    def primitive(self, actions: Sequence[int]) -> list[int]:
        """The primitive moves of a sequence of actions."""
        moves = self.steps[list(actions)].ravel()
        return moves[moves >= 0].tolist()

    def with_meta(self, depth: int) -> Puzzle:
        """The puzzle with all sequences of 2 to `depth` primitive moves as moves of their own, which cost their sum.

        The A primitive moves get A^2 + ... + A^depth such meta-actions beside them (12 + 144 + 1728 = 1884 of the cube,
        depth 3); where a move undoes itself, sequences with it twice in a row are left out.
        """
        parts = [self]
        for _ in range(depth - 1):
            parts.append(_followed(parts[-1], self))
        width = max(part.steps.shape[1] for part in parts)
        return Puzzle(
            f"{self.name}?meta={depth}",
            self.goal,
            np.concatenate([part.moves for part in parts], axis=1),
            np.concatenate([part.flips for part in parts], axis=1),
            np.concatenate([part.costs for part in parts]),
            self.inverse,
            np.concatenate([_padded(part.steps, width) for part in parts]),
            self.scramble,
            self.names,
        )


def _followed(first: Puzzle, then: Puzzle) -> Puzzle:
    """Every move of `first` with every primitive one of `then` behind it, but those that undo themselves at once."""
    count = then.primitives
    after = np.zeros((1, first.actions), dtype=int)  # where the 0 is between the two
    if len(first.moves) > 1:
        after = (first.moves == np.arange(len(first.moves))[:, None, None]).argmax(-1)
    second = then.moves[after][:, :, :count]
    moves = np.take_along_axis(first.moves[:, :, None], second, -1)
    flips = np.take_along_axis(first.flips[:, :, None], second, -1) ^ then.flips[after][:, :, :count]
    last, primitive = first.steps[:, -1][:, None], np.arange(count)
    kept = ((last != primitive) | (then.inverse != primitive)).ravel()
    return Puzzle(
        first.name,
        first.goal,
        moves.reshape(len(moves), -1, first.places)[:, kept],
        flips.reshape(len(flips), -1, first.places)[:, kept],
        (first.costs[:, None] + then.costs[:count]).ravel()[kept],
        first.inverse,
        np.concatenate([np.repeat(first.steps, count, axis=0), np.tile(primitive, first.actions)[:, None]], axis=1)[
            kept
        ],
        first.scramble,
        first.names,
    )


def _padded(steps: np.ndarray, width: int) -> np.ndarray:
    return np.pad(steps, ((0, 0), (0, width - steps.shape[1])), constant_values=-1)


class Distances:
    """Least numbers of moves to the goal, of every state within `limit` of it, by breadth-first search from the goal.

    States are told apart by their keys alone, see `Puzzle.keys`.

    Args:
        puzzle: every primitive move costs 1 and has one that undoes it.
        limit: how far to go; None goes on to the last state.
    """

    def __init__(self, puzzle: Puzzle, limit: int | None = None) -> None:
        if (puzzle.costs[: puzzle.primitives] != 1).any():
            raise ConfigError(f"{puzzle.name}: breadth-first search needs primitive moves that cost 1.")
        self.puzzle = puzzle
        levels = list(_levels(puzzle, limit))
        self.counts = [len(keys) for keys in levels]  # states at each distance
        keys = np.concatenate(levels)
        order = np.argsort(keys)
        self._keys, self._distances = keys[order], np.repeat(np.arange(len(levels)), self.counts)[order]

    def of(self, states: np.ndarray) -> np.ndarray:
        """Distances (N,) of states (N, L); -1 beyond the limit."""
        keys = self.puzzle.keys(states)
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._distances[at], -1)


def _levels(puzzle: Puzzle, limit: int | None) -> Iterator[np.ndarray]:
    """Sorted keys of the states at distance 0, 1, ...; as moves can be undone, only two levels can come again."""
    states, before = puzzle.goal[None], np.zeros(0, np.uint64)
    keys, depth = puzzle.keys(states), 0
    while len(keys):
        yield keys
        if depth == limit:
            return
        depth += 1
        # Piece by piece: all children of a large level at once would not fit the memory.
        pieces = [_children(puzzle, piece) for piece in np.array_split(states, len(states) // 100_000 + 1)]
        found, first = np.unique(np.concatenate([k for k, _ in pieces]), return_index=True)
        new = ~(np.isin(found, keys) | np.isin(found, before))
        states = np.concatenate([s for _, s in pieces])[first[new]]
        before, keys = keys, found[new]


def _children(puzzle: Puzzle, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the distinct states that primitive moves lead to, and these states."""
    children = puzzle.expand(states, puzzle.primitives).reshape(-1, puzzle.places)
    keys, first = np.unique(puzzle.keys(children), return_index=True)
    return keys, children[first]


class Tables:
    """A puzzle's table on a device, for states with any leading axes (..., L) uint8."""

    def __init__(self, puzzle: Puzzle, device: torch.device | str) -> None:
        self.puzzle = puzzle
        self.goal = torch.as_tensor(puzzle.goal, device=device)
        self.moves = torch.as_tensor(puzzle.moves, device=device)
        self.flips = torch.as_tensor(puzzle.flips, device=device)
        self.costs = torch.as_tensor(puzzle.costs, device=device, dtype=torch.float32)
        self.inverse = torch.as_tensor(puzzle.inverse, device=device)

    def next(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Where actions (...) lead from states (..., L)."""
        z = self._zeros(states)
        return states.gather(-1, self.moves[z, actions].long()) ^ self.flips[z, actions]

    def expand(self, states: torch.Tensor) -> torch.Tensor:
        """Where every action leads: (..., L) to (..., A, L)."""
        z = self._zeros(states)
        moves = self.moves[z].long()
        return states.unsqueeze(-2).expand(moves.shape).gather(-1, moves) ^ self.flips[z]

    def _zeros(self, states: torch.Tensor) -> torch.Tensor:
        if len(self.moves) == 1:
            return torch.zeros(states.shape[:-1], dtype=torch.long, device=states.device)
        return (states == 0).byte().argmax(-1)

    def solved(self, states: torch.Tensor) -> torch.Tensor:
        """Which states (..., L) are the goal."""
        return (states == self.goal).all(-1)

    def walk(self, lengths: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        """As `Puzzle.walk`: lengths (...), and the primitive moves (T, ...) that are undone, to states (..., L)."""
        states = self.goal.expand(*lengths.shape, -1).contiguous()
        for step, choice in enumerate(choices):
            moved = self.next(states, self.inverse[choice])
            states = torch.where((lengths > step).unsqueeze(-1), moved, states)
        return states
