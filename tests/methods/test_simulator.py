"""Episodes that are brought back, and played by search."""

from __future__ import annotations

import json
import math
from typing import Any

import gymnasium
import numpy as np
import pytest

from guerdon.cli import main
from guerdon.errors import ConfigError, GuerdonError
from guerdon.methods.planning.mcts import MCTS
from guerdon.methods.planning.simulator import Simulator, play


def played(simulator: Simulator, actions: list[Any]) -> list[Any]:
    seen = []
    for action in actions:
        seen.append(simulator.step(action)[:4])
        if any(seen[-1][2:]):
            break
    return seen


def same(one: list[Any], other: list[Any]) -> bool:
    assert len(one) == len(other)
    return all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("name", "replays"),
    [
        ("CartPole-v1", False),
        ("CliffWalking-v1", False),
        ("Taxi-v4", False),
        ("Blackjack-v1", False),
        ("puzzle:lightsout3", False),
        ("MiniGrid-DoorKey-6x6-v0", False),
        ("HalfCheetah-v5", False),
        ("Ant-v5", False),  # rewards are made of what the last step left behind
        ("Humanoid-v5", False),
        ("ALE/Breakout-v5", False),  # sticky actions, no-ops and stacked frames
        ("LunarLander-v3", True),  # Box2D cannot be copied
    ],
)
def test_an_episode_comes_back_to_the_last_bit(name, replays):
    if name.startswith("ALE/"):
        pytest.importorskip("ale_py")
    simulator, rng = Simulator(name, seed=3), np.random.default_rng(0)
    assert simulator.replays == replays
    space = simulator.env.action_space

    def drawn(count: int) -> list[Any]:
        if simulator.actions:
            return rng.integers(simulator.actions, size=count).tolist()
        return list(rng.uniform(space.low, space.high, (count, *space.shape)).astype(np.float32))

    first = simulator.reset()
    start = simulator.snapshot()
    before = played(simulator, drawn(5)) if name != "Blackjack-v1" else []
    assert not before or not any(before[-1][2:])
    there, onwards = simulator.snapshot(), drawn(12)
    seen = played(simulator, onwards)
    assert np.array_equal(simulator.restore(there), before[-1][0] if before else first)
    assert same(played(simulator, onwards), seen)
    simulator.restore(start)
    played(simulator, drawn(7))
    simulator.restore(there)  # from elsewhere, and for the second time
    assert same(played(simulator, onwards), seen)
    simulator.close()


def test_an_environment_of_ones_own_with_its_limit_of_steps():
    simulator = Simulator(gymnasium.make("MountainCar-v0", max_episode_steps=20), seed=1)
    simulator.reset()
    played(simulator, [0] * 15)
    there = simulator.snapshot()
    for _ in range(2):
        assert [step[3] for step in played(simulator, [2] * 9)] == [False] * 4 + [True]
        simulator.restore(there)
    assert not simulator.replays


class Elsewhere(gymnasium.Env):
    """Its chance is nobody's, and a generator cannot be copied; `count` says how many steps there ever were."""

    observation_space = gymnasium.spaces.Discrete(1000)
    action_space = gymnasium.spaces.Discrete(2, start=1)
    chance = True

    def __init__(self) -> None:
        self.steps = iter(range(1000))
        self.held = (x for x in ())

    def reset(self, **how: Any) -> Any:
        if not self.chance:
            self.steps = iter(range(1000))
        return next(self.steps), {}

    def step(self, action: int) -> Any:
        assert action in (1, 2)
        return next(self.steps), 0.0, False, False, {}


def test_what_cannot_be_copied_is_played_again_and_what_does_not_come_back_is_refused():
    env = Elsewhere()
    env.chance = False
    simulator = Simulator(env)
    simulator.reset()
    played(simulator, [0, 1, 1])
    there, seen = simulator.snapshot(), played(simulator, [0, 0])
    assert simulator.replays and simulator.restore(there) == 3 and same(played(simulator, [0, 0]), seen)
    simulator = Simulator(Elsewhere())
    simulator.reset()
    there = simulator.snapshot()
    simulator.step(0)
    with pytest.raises(GuerdonError, match=r"Elsewhere.*: the same reset and actions lead elsewhere"):
        simulator.restore(there)


def best_return(env: Any) -> float:
    """Of an episode from where a tabular environment stands, in which every action leads to one state."""
    values = np.zeros(len(env.P))
    for _ in range(100):
        values = np.array(
            [max(r + (0 if over else values[to]) for ((_, to, r, over),) in env.P[s].values()) for s in env.P]
        )
    return float(values[env.s])


def test_chance_comes_back_too():
    simulator = Simulator("FrozenLake-v1", seed=3)
    simulator.reset()
    there, ways = simulator.snapshot(), set()
    for _ in range(3):
        ways.add(tuple(int(step[0].argmax()) for step in played(simulator, [2] * 6)))
        simulator.restore(there)
    (way,) = ways
    assert way != (1, 2, 3, 3, 3, 3)[: len(way)]  # it slips


@pytest.mark.parametrize(
    ("name", "seed", "options", "how", "length"),
    [
        ("FrozenLake-v1", 0, {"is_slippery": False}, {"iterations": 60, "max_depth": 7}, 6),
        ("Taxi-v4", 34, {}, {"iterations": 200, "max_depth": 15, "weight": 20.0}, 6),
    ],
)
def test_search_finds_the_optimum_of_a_small_environment(name, seed, options, how, length):
    simulator = Simulator(name, seed, **options)
    simulator.reset()
    optimum = best_return(simulator.env.unwrapped)
    found = play(simulator, MCTS(goal=math.inf, unfinished=None, **how), steps=20)
    assert (found.ret, len(found.actions), found.terminated) == (optimum, length, True)
    simulator.reset()
    assert math.fsum(step[1] for step in played(simulator, found.actions)) == optimum


def test_a_puzzle_is_solved_from_the_command_line(capsys):
    argv = ["solve", "random", "--env", "puzzle:lightsout3", "--search", "mcts", "--instances", "2", "--seed", "2"]
    assert main([*argv, "--steps", "6", "--iterations", "150", "--max-depth", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [episode["terminated"] for episode in found["episodes"]] == [True, True]
    assert found["return"] == np.mean([episode["ret"] for episode in found["episodes"]]) <= -1
    assert main([*argv, "--steps", "2", "--iterations", "2"]) == 0
    assert "mean return -2" in capsys.readouterr().out
    assert main(["solve", "random", "--env", "Pendulum-v1", "--search", "mcts"]) == 2
    assert "Pendulum-v1: a search tries every action" in capsys.readouterr().err
    assert main([*argv, "--instances", "0"]) == 2 and "instances is 0" in capsys.readouterr().err
    assert main(["solve", "mcts", "--env", "puzzle15"]) == 2  # a run of that name, which there is not
    assert "mcts is neither a run of davi or qstar" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="iterations"):
        play(Simulator("CartPole-v1"), MCTS(iterations=0))
