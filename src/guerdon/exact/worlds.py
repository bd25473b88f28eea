"""Small MDPs: grids drawn in characters, chains, random ones, and Gymnasium's toy-text environments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from guerdon.errors import DataError
from guerdon.exact.mdp import TabularMDP

_MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])


def gridworld(
    layout: Sequence[str],
    discount: float,
    *,
    slip: float = 0.0,
    reward: float = 1.0,
    goal: Literal["end", "teleport", "stay"] = "end",
) -> TabularMDP:
    """A grid drawn in characters: `S` start, `G` goal, `#` wall, `.` free; its states are counted row by row.

    Actions 0 to 3 are up, right, down and left; what would lead into a wall or off the grid leaves one in place.
    Several starts are equally likely; without any, so is every cell in which there is something to do.

    Args:
        slip: probability that one of the four moves, drawn uniformly, is made in place of the one chosen.
        reward: paid for coming to a goal ("end") or for any action taken there ("teleport", "stay").
        goal: a goal ends the episode, or brings one to the start whatever the action, or is a cell like any other.

    Raises `DataError` for rows of unequal length and unknown characters.
    """
    if len({len(row) for row in layout}) != 1 or set("".join(layout)) - set("SG#."):
        raise DataError("the layout of a grid needs rows of equal length, drawn in 'S', 'G', '#' and '.' alone.")
    grid = np.pad(np.array([list(row) for row in layout]), 1, constant_values="#")
    cells = np.argwhere(grid != "#")
    index = np.full(grid.shape, -1)
    index[tuple(cells.T)] = here = np.arange(len(cells))
    there = np.stack([index[tuple((cells + move).T)] for move in _MOVES], axis=1)
    there = np.where(there < 0, here[:, None], there)
    made = (1 - slip) * np.eye(4) + slip / 4  # (action chosen, move made)
    transitions = made @ np.eye(len(cells))[there]
    goals, starts = (grid[tuple(cells.T)] == mark for mark in "GS")
    start = starts if starts.any() else ~goals if goal == "end" else np.ones(len(cells))
    start = start / start.sum()
    if goal == "end":
        return TabularMDP(transitions, np.where(goals, reward, 0.0) * np.ones_like(transitions), discount, start, goals)
    if goal == "teleport":
        transitions[goals] = start
    return TabularMDP(transitions, np.where(goals, reward, 0.0)[:, None] * np.ones(4), discount, start)


def chain(states: int, discount: float, *, slip: float = 0.0) -> TabularMDP:
    """States in a row, from left to right: action 0 steps left, 1 right, and with probability `slip` the other way.

    The episode begins at the left and ends at the right, for a reward of 1. Without slip the value of a state at
    distance d from the end is gamma^(d - 1).
    """
    here = np.arange(states)
    sides = np.eye(states)[np.stack([here - 1, here + 1], axis=1).clip(0, states - 1)]
    transitions = np.array([[1 - slip, slip], [slip, 1 - slip]]) @ sides
    end = here == states - 1
    return TabularMDP(
        transitions, np.where(end, 1.0, 0.0) * np.ones_like(transitions), discount, np.eye(states)[0], end
    )


def random_mdp(
    states: int, actions: int, discount: float, seed: int, *, concentration: float = 1.0, batch: tuple[int, ...] = ()
) -> TabularMDP:
    """Moves drawn from Dirichlet(concentration), rewards (S, A) from N(0, 1), a uniform start; no episode ends.

    Args:
        concentration: small ones make moves nearly deterministic.
        batch: leading axes, of MDPs drawn independently.
    """
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.full(states, concentration), size=(*batch, states, actions))
    return TabularMDP(transitions, rng.normal(size=(*batch, states, actions)), discount)


def from_gymnasium(env: Any, discount: float) -> TabularMDP:
    """The MDP of a Gymnasium environment that shows its model (`P` and `initial_state_distrib`: FrozenLake, Taxi, ...).

    Rewards become those of each move (S, A, S); the time limit of a registered environment is no part of it.

    Raises `DataError` for an environment without a model, and where the same state ends an episode after one move
    and not after another.
    """
    model, start = (getattr(env.unwrapped, name, None) for name in ("P", "initial_state_distrib"))
    if model is None or start is None:
        raise DataError(f"{env} has no table of its moves: only environments with `P` (FrozenLake, Taxi, ...) have.")
    states, actions = len(model), len(model[0])
    transitions, paid = np.zeros((2, states, actions, states))
    for state, action in np.ndindex(states, actions):
        for probability, after, reward, _ in model[state][action]:
            transitions[state, action, after] += probability
            paid[state, action, after] += probability * reward
    rewards = np.divide(paid, transitions, out=np.zeros_like(paid), where=transitions > 0)
    return TabularMDP(transitions, rewards, discount, start, _terminal(model, start, env))


def _terminal(model: Any, start: np.ndarray, env: Any) -> np.ndarray:
    """(S,) where episodes end. Tables also say what would come after the end, so only real episodes are followed."""
    ends, goes_on = np.zeros(len(start), dtype=bool), start > 0
    waiting = list(np.flatnonzero(goes_on))
    while waiting:
        state = waiting.pop()
        for probability, after, _, terminated in itertools.chain.from_iterable(model[state].values()):
            if probability and terminated:
                ends[after] = True
            elif probability and not goes_on[after]:
                goes_on[after] = True
                waiting.append(after)
    if (ends & goes_on).any():
        raise DataError(f"state {(ends & goes_on).argmax()} of {env} ends an episode after some moves and not others.")
    return ends
