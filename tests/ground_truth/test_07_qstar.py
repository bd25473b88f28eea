"""Sheet of Q* search (arXiv 2102.04518): equal costs, few nodes, when to stop, and what is learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.control.puzzles.domains import make_puzzle
from guerdon.control.puzzles.heuristics import gap
from guerdon.control.puzzles.puzzle import Distances, Puzzle, Tables
from guerdon.control.streams import Streams
from guerdon.methods.planning import a_star, lookahead, q_star
from guerdon.methods.planning.qstar import QStar
from search_reference import graph_puzzle, node_states


@pytest.mark.parametrize(
    ("name", "actions", "ratio"),
    [("pancake10", 9, 5), ("pancake10?meta=2", 81, 30), ("pancake14", 13, 8), ("pancake14?meta=2", 169, 50)],
)
def test_1_equal_costs_and_far_fewer_nodes(name, actions, ratio):
    puzzle, rng = make_puzzle(name), np.random.default_rng(0)
    assert puzzle.actions == actions
    starts = np.array([rng.permutation(puzzle.places) for _ in range(10)], np.uint8)
    nodes = a_star(puzzle, gap, starts)
    edges = q_star(puzzle, lookahead(puzzle, gap), starts)
    assert [found.cost for found in nodes] == [found.cost for found in edges]
    for what in ("nodes_generated", "heuristic_calls"):
        a, q = (np.mean([getattr(s, what) for s in found]) for found in (nodes, edges))
        assert a / q > ratio, what


@pytest.mark.parametrize(("q_sb", "first"), [(1, 3), (3, 2)])
def test_2_when_to_stop(q_sb, first):
    """S -a-> A (1), A -x-> G (1), S -b-> G (3): q(S, b) = 1 is below its cost, as the lower bound alone allows."""
    puzzle = graph_puzzle(np.array([[1, 0, 2], [1, 2, 1], [2, 2, 2]]), [1, 1, 3], goal=2)
    estimates = np.array([[2, 9, q_sb], [9, 1, 9], [0, 0, 0]], float)
    q = lambda states: estimates[(states == 0).argmax(1)]  # noqa: E731
    start = node_states(3, [0])
    assert q_star(puzzle, q, start, stop="first")[0].cost == first
    assert q_star(puzzle, q, start, stop="bound")[0].cost == 2


def test_3_exact_q_generates_the_path_alone():
    puzzle = make_puzzle("pancake7")
    distances = Distances(puzzle)
    exact = lookahead(puzzle, lambda states: distances.of(states).astype(float))
    starts = puzzle.walk(np.full(300, 8), np.random.default_rng(0))
    unique = np.array([_paths(puzzle, distances, s[None]) == 1 for s in starts])
    assert unique.sum() > 20
    for found, d in zip(q_star(puzzle, exact, starts[unique]), distances.of(starts[unique]), strict=True):
        assert (found.cost, found.nodes_generated) == (d, d + 1)
    for found in q_star(puzzle, exact, starts, weight=0.0):  # greedy: the edge of least cost to go is never wrong here
        assert found.nodes_generated == found.cost + 1


def _paths(puzzle: Puzzle, distances: Distances, state: np.ndarray) -> int:
    """Shortest paths from a state."""
    d = distances.of(state)[0]
    if d == 0:
        return 1
    children = puzzle.expand(state)[0]
    return sum(_paths(puzzle, distances, c[None]) for c in children[distances.of(children) == d - 1])


def test_4_targets_on_a_chain():
    """0 (goal) - 1 - 2 with moves left and right; a move against an end stays."""
    puzzle = graph_puzzle(np.array([[0, 1], [0, 2], [1, 2]]), [1, 1], goal=0)
    learner = QStar(backed_up="uniform", batch_size=60)
    learner.puzzle, learner.tables, learner.streams = puzzle, Tables(puzzle, "cpu"), Streams([0])
    twin = Streams([0])  # draws the same actions
    learner.followed = torch.ones(1)
    table = torch.zeros(3, 2)
    learner.followers = [lambda states: table[(states == 0).byte().argmax(-1)]]
    which = torch.arange(60) % 3
    states = torch.from_numpy(node_states(3, which.numpy()))[None]
    for _ in range(6):
        _, target = learner.backup(states, torch.zeros(1, 60, 2))
        target = target.masked_fill(learner.tables.solved(states), 0.0)
        table = table.clone()
        table[which, twin.integers("action", 2, 60)[0]] = target[0]
    assert table.tolist() == [[0, 0], [1, 3], [2, 3]]


def test_5_nodes_are_popped_edges_and_the_start():
    puzzle = make_puzzle("puzzle8")
    starts = puzzle.walk(np.full(20, 30), np.random.default_rng(0))
    for found in q_star(puzzle, lookahead(puzzle, lambda s: np.zeros(len(s))), starts, max_nodes=2000):
        assert found.nodes_generated == 1 + found.iterations  # one edge in each round
        assert found.heuristic_calls <= found.nodes_generated
