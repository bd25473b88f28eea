"""A* and Q* search as one would write them down, one instance at a time, and graphs as puzzles."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from guerdon.control.puzzles.puzzle import Puzzle


def graph_puzzle(targets: np.ndarray, costs: Sequence[float], goal: int) -> Puzzle:
    """A graph as a puzzle: action a leads from node s to `targets[s, a]`; node s is the state with its 0 in place s."""
    nodes, actions = targets.shape
    moves = np.tile(np.arange(nodes), (nodes, actions, 1))
    for s in range(nodes):
        for a, target in enumerate(targets[s]):
            moves[s, a, [s, target]] = target, s
    return Puzzle.of("graph", node_states(nodes, [goal])[0], moves, range(actions), nodes, costs=costs)


def node_states(nodes: int, which: Sequence[int]) -> np.ndarray:
    return (np.arange(nodes) != np.asarray(which)[:, None]).astype(np.uint8)


def reference(
    puzzle: Puzzle,
    heuristic: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    q_star: bool,
    weight: float = 1.0,
    batch: int = 1,
    stop: str = "bound",
    max_nodes: float = math.inf,
) -> dict[str, Any]:
    """With q_star the heap holds edges, else nodes; ties are broken by insertion."""
    heap: list[Any] = []
    closed = {start.tobytes(): 0.0}
    pushed = calls = iterations = 0
    generated, lower, upper, best = 1, -math.inf, math.inf, None

    def push(nodes: list[tuple[np.ndarray, float, tuple[int, ...]]]) -> None:
        nonlocal pushed, calls
        for state, g, path in nodes:
            goal = bool(puzzle.solved(state))
            if goal and q_star:
                continue
            values = np.zeros(1) if goal else heuristic(state[None])
            calls += not goal
            for a, value in enumerate(values[0].astype(np.float32) if q_star else values):
                heapq.heappush(heap, (weight * g + float(value), pushed, state, g, path, a))
                pushed += 1

    if puzzle.solved(start):
        upper, best = 0.0, ()
    else:
        push([(start, 0.0, ())])
    while heap:
        iterations += 1
        popped = [heapq.heappop(heap) for _ in range(min(batch, len(heap)))]
        lower = max(lower, popped[0][0])
        new = []
        for _, _, state, g, path, edge in popped:
            if puzzle.solved(state):
                upper, best = min((upper, best), (g, path), key=lambda found: found[0])
                continue
            for a in [edge] if q_star else range(puzzle.actions):
                generated += 1
                child, cost = puzzle.next(state[None], np.array([a]))[0], g + float(puzzle.costs[a])
                if closed.get(child.tobytes(), math.inf) <= cost:
                    continue
                closed[child.tobytes()] = cost
                new.append((child, cost, (*path, a)))
                if q_star and puzzle.solved(child) and cost < upper:
                    upper, best = cost, (*path, a)
        push(new)
        if (best is not None and (stop == "first" or lower >= weight * upper)) or generated >= max_nodes:
            break
    return {
        "solved": best is not None,
        "cost": upper,
        "actions": list(best or ()),
        "nodes_generated": generated,
        "heuristic_calls": calls,
        "iterations": iterations,
    }
