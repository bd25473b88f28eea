"""Heuristics that need no learning, by name: the least number of primitive moves that must be left, or fewer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from guerdon.control.puzzles.puzzle import Puzzle
from guerdon.errors import ConfigError

Heuristic = Callable[[np.ndarray], np.ndarray]
HEURISTICS = ("gap", "manhattan", "misplaced")


def make_heuristic(name: str, puzzle: Puzzle) -> Heuristic:
    """States (N, L) to costs (N,) that are never above those of the shortest path, in a puzzle whose moves cost 1.

        gap         of pancakes: neighbours in the stack that are not neighbours in size, the plate being the largest
        manhattan   of sliding puzzles: rows and columns that each tile is away from its place
        misplaced   of any puzzle: places that are not as in the goal, over the most that one move changes

    Raises:
        ConfigError: no such heuristic, or not of that puzzle.
    """
    if name not in HEURISTICS:
        raise ConfigError(f"there is no heuristic '{name}': there are {', '.join(HEURISTICS)}.")
    wants = {"gap": "pancake", "manhattan": "puzzle", "misplaced": ""}[name]
    if not puzzle.name.startswith(wants):
        raise ConfigError(f"'{name}' is a heuristic of {wants}N, not of {puzzle.name}: take misplaced, or learn one.")
    if name == "gap":
        return gap
    return _manhattan(puzzle) if name == "manhattan" else _misplaced(puzzle)


def gap(states: np.ndarray) -> np.ndarray:
    """The gap heuristic of pancakes (Helmert 2010): a flip changes one pair of neighbours."""
    plate = np.full((len(states), 1), states.shape[1])
    stack = np.concatenate([states.astype(np.int16), plate], axis=1)
    return (np.abs(np.diff(stack, axis=1)) != 1).sum(1).astype(np.float64)


def _manhattan(puzzle: Puzzle) -> Heuristic:
    side = round(puzzle.places**0.5)
    row, column = np.divmod(np.arange(puzzle.places), side)
    home = np.argsort(puzzle.goal)
    away = np.abs(row[:, None] - row[home]) + np.abs(column[:, None] - column[home])  # (places, tiles)
    away[:, 0] = 0  # the blank moves with each move, whatever moves
    return lambda states: away[np.arange(puzzle.places), states].sum(1).astype(np.float64)


def _misplaced(puzzle: Puzzle) -> Heuristic:
    primitive = slice(puzzle.primitives)
    changed = (puzzle.moves[:, primitive] != np.arange(puzzle.places)) | (puzzle.flips[:, primitive] == 1)
    most = changed.sum(-1).max()
    return lambda states: np.ceil((states != puzzle.goal).sum(1) / most)
