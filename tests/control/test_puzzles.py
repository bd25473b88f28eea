"""Puzzles against what is known of them: sizes, distances, orders of sequences of moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from guerdon.control.puzzles.domains import make_puzzle
from guerdon.control.puzzles.environment import PuzzleEnv
from guerdon.control.puzzles.puzzle import Distances, Tables
from guerdon.errors import ConfigError
from guerdon.exact.mdp import shortest_paths

NAMES = ("cube2", "cube3", "lightsout3", "puzzle8", "pancake8", "cube3?meta=2", "puzzle8?meta=2", "lightsout3?meta=2")


def mixed(name: str, count: int = 40, seed: int = 0) -> np.ndarray:
    puzzle, rng = make_puzzle(name), np.random.default_rng(seed)
    return puzzle.walk(rng.integers(0, puzzle.scramble + 1, count), rng)


@pytest.mark.parametrize(
    ("name", "limit", "counts"),
    [
        ("cube3", 4, [1, 12, 114, 1068, 10011]),
        ("cube2", 6, [1, 6, 27, 120, 534, 2256, 8969]),
        ("lightsout3", None, [math.comb(9, k) for k in range(10)]),  # every set of presses does something else
        ("pancake7", None, [1, 6, 30, 149, 543, 1357, 1903, 1016, 35]),
    ],
)
def test_states_at_each_distance(name, limit, counts):
    assert Distances(make_puzzle(name), limit).counts == counts


def test_the_8_puzzle_has_half_of_the_arrangements_and_two_that_are_farthest():
    distances = Distances(make_puzzle("puzzle8"))
    assert sum(distances.counts) == math.factorial(9) // 2
    assert len(distances.counts) == 32 and distances.counts[-1] == 2
    swapped = np.array([[2, 1, 3, 4, 5, 6, 7, 8, 0]], np.uint8)
    assert distances.of(swapped).tolist() == [-1]


@pytest.mark.slow
def test_the_cube_of_two_layers_to_its_last_state():
    found = Distances(make_puzzle("cube2")).counts
    assert sum(found) == 3_674_160
    assert found[7:] == [33058, 114149, 360508, 930588, 1350852, 782536, 90280, 276]


def test_distances_are_shortest_paths():
    puzzle = make_puzzle("lightsout3")
    states = (np.arange(512)[:, None] >> np.arange(9) & 1).astype(np.uint8)
    graph = np.zeros((512, 512), dtype=bool)
    graph[np.arange(512)[:, None], puzzle.expand(states) @ (1 << np.arange(9))] = True
    np.testing.assert_array_equal(Distances(puzzle).of(states), shortest_paths(graph)[:, 0])


def test_distances_need_moves_of_cost_1():
    puzzle = make_puzzle("pancake5")
    costly = type(puzzle).of("costly", puzzle.goal, puzzle.moves, puzzle.inverse, 5, costs=[1, 1, 1, 2])
    with pytest.raises(ConfigError, match="costly"):
        Distances(costly)


@pytest.mark.parametrize(("moves", "order"), [([0], 4), ([0, 4], 105), ([0, 4, 1, 5], 6), ([0, 2], 4)])
def test_orders_of_sequences_of_the_cube(moves, order):
    """A quarter turn, two of neighbouring faces, their commutator, and two of opposite faces."""
    puzzle = make_puzzle("cube3")
    state, repeats = puzzle.goal[None], 0
    while repeats == 0 or not puzzle.solved(state)[0]:
        for a in moves:
            state = puzzle.next(state, np.array([a]))
        repeats += 1
    assert repeats == order


def test_moves_have_the_names_that_people_use():
    cube = make_puzzle("cube3")
    assert cube.names == ("R'", "R", "L'", "L", "U'", "U", "D'", "D", "F'", "F", "B'", "B")
    turned = cube.next(cube.goal[None], np.array([cube.names.index("R")]))[0]
    assert turned[18:27].tolist() == [2] * 6 + [4] * 3  # clockwise, the right column of the front comes up
    sliding = make_puzzle("puzzle8?meta=2")
    moved = sliding.next(sliding.goal[None], np.array([sliding.names.index("up")]))[0]
    assert moved.tolist() == [1, 2, 3, 4, 5, 0, 7, 8, 6]
    assert make_puzzle("pancake4").names == ("2", "3", "4")
    lamps = make_puzzle("lightsout3")
    pressed = lamps.next(lamps.goal[None], np.array([lamps.names.index("1,3")]))[0]
    assert pressed.tolist() == [0, 1, 1, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_next_expand_and_the_device_agree(name):
    puzzle, states = make_puzzle(name), mixed(name)
    expanded = puzzle.expand(states)
    tables = Tables(puzzle, "cpu")
    np.testing.assert_array_equal(tables.expand(torch.from_numpy(states)[None])[0].numpy(), expanded)
    for a in range(0, puzzle.actions, 7):
        actions = np.full(len(states), a)
        np.testing.assert_array_equal(puzzle.next(states, actions), expanded[:, a])
        moved = tables.next(torch.from_numpy(states), torch.from_numpy(actions))
        np.testing.assert_array_equal(moved.numpy(), expanded[:, a])
    assert expanded.dtype == np.uint8 and expanded.max() < puzzle.values


@pytest.mark.parametrize("name", NAMES[:5])
def test_moves_are_undone(name):
    puzzle, states = make_puzzle(name), mixed(name)
    for a, inverse in enumerate(puzzle.inverse):
        there = puzzle.next(states, np.full(len(states), a))
        moved = (there != states).any(1)  # a blank against a wall stays
        back = puzzle.next(there, np.full(len(states), inverse))
        np.testing.assert_array_equal(back[moved], states[moved])
        assert moved.sum() > len(states) / 3


@pytest.mark.parametrize(
    ("name", "actions"),
    [
        ("cube3?meta=2", 156),
        ("cube3?meta=3", 1884),
        ("pancake8?meta=2", 49),
        ("pancake14?meta=2", 169),
        ("puzzle8?meta=2", 20),
    ],
)
def test_meta_actions_are_their_primitive_moves(name, actions):
    puzzle, states = make_puzzle(name), mixed(name, 5)
    assert puzzle.actions == actions
    expanded = puzzle.expand(states)
    for a in range(0, actions, 1 + actions // 60):
        moves, reached = puzzle.primitive([a]), states
        for move in moves:
            reached = puzzle.next(reached, np.full(len(states), move))
        np.testing.assert_array_equal(reached, expanded[:, a])
        assert puzzle.costs[a] == len(moves)
    assert len({tuple(puzzle.primitive([a])) for a in range(actions)}) == actions


def test_walks_lead_back_to_the_goal_and_are_the_same_on_a_device():
    puzzle, rng = make_puzzle("puzzle8"), np.random.default_rng(0)
    distances, lengths = Distances(puzzle), rng.integers(0, 30, 500)
    found = distances.of(puzzle.walk(lengths, rng))
    assert (found >= 0).all() and (found <= lengths).all() and found.max() > 10
    choices = torch.from_numpy(rng.integers(0, 4, (6, 50)))
    states = Tables(puzzle, "cpu").walk(torch.full((50,), 6), choices)
    undone = puzzle.goal[None].repeat(50, axis=0)
    for choice in choices.numpy():
        undone = puzzle.next(undone, puzzle.inverse[choice])
    np.testing.assert_array_equal(states.numpy(), undone)


def test_keys_tell_states_apart():
    puzzle = make_puzzle("pancake8")
    states = np.unique(mixed("pancake8", 20_000), axis=0)
    assert len(np.unique(puzzle.keys(states))) == len(states) > 5_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qube3", "Did you mean 'cube3'"),
        ("cube4", "2 or 3 layers"),
        ("puzzle14", "3, 8, 15"),
        ("pancake1", "2 to 255"),
        ("cube3?meta=x", "meta=D"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ConfigError, match=message):
        make_puzzle(name)


def test_an_episode_ends_at_the_goal_or_after_twice_the_scramble():
    env = PuzzleEnv("puzzle:pancake5?meta=2", scramble=3)
    env.reset(seed=3)
    distances = Distances(env.puzzle)
    total = before = int(distances.of(env.state)[0])
    paid = 0.0
    for _ in range(before):  # by primitive moves that come closer
        closer = distances.of(env.puzzle.expand(env.state)[0][:4]).argmin()
        obs, reward, terminated, truncated, info = env.step(closer)
        paid += reward
        assert obs.reshape(5, 5).argmax(1).tolist() == env.state[0].tolist()
    assert terminated and not truncated and info["success"] and paid == -total
    env.reset(seed=3)
    for step in range(6):
        *_, terminated, truncated, info = env.step(3)  # the last flip, again and again
        assert truncated == (step == 5) and not info["success"]


def test_episodes_are_those_of_their_seed():
    first, second = PuzzleEnv("cube2"), PuzzleEnv("cube2")
    assert (first.reset(seed=5)[0] == second.reset(seed=5)[0]).all()
    assert (first.reset()[0] == second.reset()[0]).all()
