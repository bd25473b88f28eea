"""Weighted A* and Q* search of puzzles, many instances and many nodes at once.

A* evaluates every child that it generates. Q* search (Agostinelli et al. 2021, arXiv 2102.04518) has a heuristic
q(s, a) ~ c(s, a) + h(s') of all actions of a state in one pass, orders edges by it, and generates the child of an edge
only when that edge is popped:

    priority of a node:  weight * g(s) + h(s)           priority of an edge:  weight * g(s) + q(s, a)

With a heuristic that never overestimates (h <= h*, or q <= c + h*) a path is found that costs at most 1 / weight times
the shortest one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError, InvariantError
from guerdon.fields import check_range

if TYPE_CHECKING:
    from guerdon.control.puzzles.puzzle import Puzzle

Heuristic = Callable[[np.ndarray], np.ndarray]
Stop = Literal["bound", "first"]
_FIRST_NODES = 4096  # room at first; it doubles when it is full


@dataclass(frozen=True)
class Solution:
    """What a search found for one instance.

    Attributes:
        solved: whether there is a path.
        cost: of the path, infinite without one.
        actions: of the path.
        nodes_generated: children that were made (in A* of every popped node, in Q* one for each popped edge), those
            that were known already too, and 1 for the start.
        heuristic_calls: states that went to the heuristic.
        iterations: rounds of popping.
        lower: where the heuristic never overestimates no path costs less: the largest of the smallest priorities that
            were popped, or the cost where that is less.
        node_bytes: memory of the nodes that were kept.
        edge_bytes: memory of the edges that were kept beside them, in Q* search 4 bytes for each action of a node.
        seconds: by the clock, from the start of all instances to the end of this one.
    """

    solved: bool
    cost: float
    actions: list[int]
    nodes_generated: int
    heuristic_calls: int
    iterations: int
    lower: float
    node_bytes: int
    edge_bytes: int
    seconds: float


def a_star(
    puzzle: Puzzle,
    h: Heuristic,
    starts: np.ndarray,
    *,
    weight: float = 1.0,
    batch: int = 1,
    stop: Stop = "bound",
    max_nodes: int = 0,
) -> list[Solution]:
    """Batch weighted A* search (Agostinelli et al. 2019; B = 1 and weight 1 is Hart, Nilsson and Raphael 1968).

    In each round and instance the `batch` nodes of least priority leave OPEN, all their children are generated, and
    those that CLOSED does not know by a path as short are evaluated and pushed. A goal has h = 0 and counts when it is
    popped.

    Args:
        h: states (N, L) uint8 to estimates (N,) of the cost to the goal.
        starts: (I, L) uint8.
        weight: of the path's cost, in [0, 1]; 0 is greedy best-first search.
        stop: "bound" when no node in OPEN can lead to a better path (priorities >= weight * cost), which is optimal at
            any `batch`; "first" when a goal is popped, as published, which is the same for `batch` 1.
        max_nodes: give an instance up after so many generated nodes; 0 never does.

    Raises:
        ConfigError: options out of range, or numba is not installed.
        DataError: starts of another shape.
        InvariantError: the heuristic says nan.
    """
    return _search(puzzle, h, starts, False, weight, batch, stop, max_nodes)


def q_star(
    puzzle: Puzzle,
    q: Heuristic,
    starts: np.ndarray,
    *,
    weight: float = 1.0,
    batch: int = 1,
    stop: Stop = "bound",
    max_nodes: int = 0,
) -> list[Solution]:
    """Q* search: one generated node for each popped edge, one evaluation for all edges of a node.

    In each round and instance the `batch` edges of least priority leave OPEN and the nodes behind them are generated;
    those that CLOSED does not know by a path as short are evaluated, and all their edges pushed. A goal counts when it
    is generated.

    Args:
        q: states (N, L) uint8 to estimates (N, A) of the cost to the goal by way of each action, kept as float32;
            infinite for an action that is not to be taken.
        starts: (I, L) uint8.
        weight: of the path's cost, in [0, 1]; 0 is greedy.
        stop: "bound" when the smallest popped priority reaches weight * cost of the best path: optimal for weight 1 and
            any `batch` where q <= c + h*. "first" with the first goal: optimal for `batch` 1 where also c <= q.
        max_nodes: give an instance up after so many generated nodes; 0 never does.

    Raises:
        ConfigError: options out of range, or numba is not installed.
        DataError: starts of another shape.
        InvariantError: the heuristic says nan.
    """
    return _search(puzzle, q, starts, True, weight, batch, stop, max_nodes)


def lookahead(puzzle: Puzzle, h: Heuristic) -> Heuristic:
    """q(s, a) = c(s, a) + h(s'), which looks at all children: for an h that is cheap, and for comparisons."""

    def q(states: np.ndarray) -> np.ndarray:
        children = puzzle.expand(states).reshape(-1, puzzle.places)
        return puzzle.costs + np.where(puzzle.solved(children), 0.0, h(children)).reshape(len(states), -1)

    return q


def deferred(puzzle: Puzzle, h: Heuristic, weight: float = 1.0) -> Heuristic:
    """The q with which `q_star` is A* with deferred evaluation: a child's priority is its path and its parent's h.

    It may overestimate where h does not, so that paths need not be shortest.
    """
    return lambda states: weight * puzzle.costs + h(states)[:, None]


def _search(
    puzzle: Puzzle,
    heuristic: Heuristic,
    starts: np.ndarray,
    edges: bool,
    weight: float,
    batch: int,
    stop: Stop,
    max_nodes: int,
) -> list[Solution]:
    check_range({"weight": weight}, "weight", high=1)
    check_range({"batch": batch, "max_nodes": max_nodes}, "batch", low=1)
    check_range({"max_nodes": max_nodes}, "max_nodes")
    starts = np.ascontiguousarray(starts)
    if starts.ndim != 2 or starts.shape[1] != puzzle.places or starts.dtype != np.uint8:
        raise DataError(
            f"starts are {starts.dtype} of shape {starts.shape}: {puzzle.name} has uint8 (N, {puzzle.places})."
        )
    began = time.perf_counter()
    frontier = _Frontier(puzzle, heuristic, starts, edges, weight, batch)
    seconds, active = np.zeros(len(starts)), np.flatnonzero(~frontier.pool.goal[: len(starts)])
    while len(active):
        frontier.step(active)
        seconds[active] = time.perf_counter() - began
        active = frontier.going(active, stop == "first", max_nodes)
    return [frontier.solution(i, float(seconds[i])) for i in range(len(starts))]


class _Frontier:
    """The pool of nodes and what lies in OPEN, with room for what a round may bring."""

    def __init__(
        self, puzzle: Puzzle, heuristic: Heuristic, starts: np.ndarray, edges: bool, weight: float, batch: int
    ) -> None:
        try:
            from guerdon.control.puzzles import kernels
        except ImportError as error:
            raise ConfigError(f"search needs numba: pip install 'guerdon[control]' ({error}).") from error
        self.kernels, self.heuristic, self.weight, self.batch = kernels, heuristic, float(weight), batch
        self.children = 1 if edges else puzzle.actions
        self.pop_some = kernels.pop_edges if edges else kernels.pop_nodes
        self.push_all = kernels.push_edges if edges else kernels.push_nodes
        self.dtype = np.float32 if edges else np.float64
        self.nothing = np.zeros((0, puzzle.actions) if edges else 0, self.dtype)
        self.tables = kernels.Moves(puzzle.moves, puzzle.flips, puzzle.costs, puzzle.goal, puzzle.zobrist)
        instances = len(starts)
        self.instances = kernels.Instances(
            root=np.full(instances, -1, np.int32),
            lower=np.full(instances, -np.inf),
            upper=np.full(instances, np.inf),
            best=np.full(instances, -1, np.int32),
            rounds=np.zeros(instances, np.int64),
            generated=np.zeros(instances, np.int64),
            evaluated=np.zeros(instances, np.int64),
        )
        self.pool: Any = kernels.Pool(
            states=np.empty((0, puzzle.places), np.uint8),
            keys=np.empty(0, np.uint64),
            g=np.empty(0, np.float64),
            parent=np.empty(0, np.int32),
            action=np.empty(0, np.int32),
            owner=np.empty(0, np.int32),
            goal=np.empty(0, np.bool_),
            priority=np.empty(0, np.float64),
            edge=np.empty(0, np.int32),
            child=np.empty(0, np.int32),
            sibling=np.empty(0, np.int32),
            q=np.empty((0, puzzle.actions if edges else 0), np.float32),
        )
        self.count = 0
        self.make_room(instances)
        self.count = kernels.start(self.pool, self.slots, self.tables, starts, self.instances)
        self.push(0)

    def make_room(self, more: int) -> None:
        """Have room for so many more nodes; memory that was never written to costs nothing."""
        room = len(self.pool.keys)
        if self.count + more <= room:
            return
        room = max(_FIRST_NODES, 2 * room, self.count + more)
        self.pool = self.kernels.Pool(*(_longer(column, self.count, room) for column in self.pool))
        self.slots = np.full(1 << (2 * room - 1).bit_length(), -1, np.int32)
        self.kernels.refill(self.pool, self.slots, self.count)

    def step(self, active: np.ndarray) -> None:
        """Pop from the active instances (I,), and push what that makes."""
        self.make_room(len(active) * self.batch * self.children)
        before, what = self.count, (self.pool, self.slots, self.tables, self.instances)
        self.count = self.pop_some(*what, active, self.weight, self.batch, before)
        self.push(before)

    def push(self, first: int) -> None:
        """Evaluate the nodes from the first on, but for goals, and put them, or their edges, into OPEN."""
        new = slice(first, self.count)
        states = self.pool.states[new][~self.pool.goal[new]]
        values = np.ascontiguousarray(self.heuristic(states), self.dtype) if len(states) else self.nothing
        if not self.push_all(self.pool, self.instances, first, self.count, values, self.weight):
            raise InvariantError("the heuristic says nan of a state, by which nothing can be ordered: was it trained?")

    def going(self, active: np.ndarray, first: bool, max_nodes: int) -> np.ndarray:
        """Those of the active instances that are not over."""
        return self.kernels.going(self.instances, active, self.weight, first, max_nodes)

    def solution(self, i: int, seconds: float) -> Solution:
        found, pool = self.instances, self.pool
        node, actions = int(found.best[i]), []
        while node >= 0 and pool.parent[node] >= 0:
            actions.append(int(pool.action[node]))
            node = int(pool.parent[node])
        kept, edges = int(np.count_nonzero(pool.owner[: self.count] == i)), pool.q[:1].nbytes
        return Solution(
            solved=bool(np.isfinite(found.upper[i])),
            cost=float(found.upper[i]),
            actions=actions[::-1],
            nodes_generated=int(found.generated[i]),
            heuristic_calls=int(found.evaluated[i]),
            iterations=int(found.rounds[i]),
            lower=float(min(found.lower[i], found.upper[i])),
            node_bytes=kept * (sum(column[:1].nbytes for column in pool) - edges),
            edge_bytes=kept * edges,
            seconds=seconds,
        )


def _longer(column: np.ndarray, count: int, room: int) -> np.ndarray:
    longer = np.empty((room, *column.shape[1:]), column.dtype)
    longer[:count] = column[:count]
    return longer
