from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.spaces.utils import flatten

from guerdon.control.environments import Environments, Step
from guerdon.control.simulators import encoding, make, spec_of
from guerdon.errors import ConfigError


class Walk(gymnasium.Env):
    """Ends when the sum of its actions reaches `goal`; sees (number drawn at the reset, sum, steps)."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Discrete(2, start=1)

    def __init__(self, goal: int = 5, chance: str = "seeded") -> None:
        self.goal, self.chance = goal, chance

    def _see(self) -> np.ndarray:
        return np.array([self.drawn, self.sum, self.steps], dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.drawn = self.np_random.random() if self.chance == "seeded" else np.random.random()
        self.sum = self.steps = 0
        return self._see(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert action in (1, 2)
        self.sum, self.steps = self.sum + action, self.steps + 1
        return self._see(), 0.5 * action, self.sum >= self.goal, False, {"success": self.sum == self.goal}


gymnasium.register("Walk-v0", Walk, max_episode_steps=4)
gymnasium.register("Drift-v0", Walk, max_episode_steps=4, kwargs={"chance": "global"})


def equal(a: Step, b: Step, seeds: slice = slice(None)) -> bool:
    return all(np.array_equal(x[seeds], y) for x, y in zip(a[:5], b[:5], strict=True))


def random_actions(environments: Environments, steps: int, seed: int = 0) -> list[np.ndarray]:
    rng, spec = np.random.default_rng(seed), environments.spec
    shape = (len(environments.seeds), environments.copies)
    if spec.discrete:
        return [rng.integers(spec.actions, size=shape) for _ in range(steps)]
    return [rng.uniform(spec.low, spec.high, (*shape, spec.actions)).astype(np.float32) for _ in range(steps)]


@pytest.mark.parametrize(
    ("id", "meant"),
    [
        ("CartPol-v1", "'CartPole-v1'"),
        ("Hopper-v9", "'Hopper-v"),
        ("ALE/Pongg-v5", "'ALE/Pong-v5'"),
        ("MinAtar/Brekout-v1", "'MinAtar/Breakout-v1'"),
        ("Minigrid-Empty-5x5-v0", "'MiniGrid-Empty-5x5-v0'"),
    ],
)
def test_near_ids_are_suggested(id: str, meant: str):
    with pytest.raises(ConfigError, match=meant):
        make(id)


def test_what_cannot_be_made_says_why():
    with pytest.raises(ConfigError, match=r"CartPole-v1 cannot be made.*wings"):
        make("CartPole-v1", wings=2)
    with pytest.raises(ConfigError, match=r"nowhere"):
        make("nowhere:CartPole-v1")


FLAT = [
    spaces.Discrete(5, start=3),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(4),
    spaces.Box(-1, 1, (2, 3)),
    spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 1, (2,))]),
    spaces.Dict({"b": spaces.Discrete(3), "a": spaces.Box(0, 255, (4, 4, 3), np.uint8)}),
]


@pytest.mark.parametrize("space", FLAT, ids=str)
def test_observations_are_flattened_as_gymnasium_does(space: spaces.Space):
    space.seed(0)
    seen = encoding(space, "here")
    for _ in range(5):
        x = space.sample()
        assert seen.encode is not None
        np.testing.assert_array_equal(seen.encode(x), flatten(space, x))
        assert seen.space.shape == flatten(space, x).shape and not seen.note


def test_images_have_channels_first():
    x = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    for space, given, shown in [
        (spaces.Box(0, 255, (6, 5, 3), np.uint8), x, x.transpose(2, 0, 1)),
        (spaces.Box(0, 255, (6, 5), np.uint8), x[..., 0], x[None, ..., 0]),
        (spaces.Box(0, 1, (6, 5, 3), bool), x > 7, (x > 7).transpose(2, 0, 1) * 255),
        (spaces.Dict({"image": spaces.Box(0, 255, (6, 5, 3), np.uint8)}), {"image": x}, x.transpose(2, 0, 1)),
    ]:
        seen = encoding(space, "here")
        assert seen.encode is not None
        found = seen.encode(given)
        assert found.dtype == np.uint8 and seen.space.shape == shown.shape
        np.testing.assert_array_equal(found, shown)
    assert encoding(spaces.Box(0, 255, (3, 6, 5), np.uint8), "here").encode is None
    assert encoding(spaces.Box(-1, 1, (3,)), "here").encode is None


def test_text_is_left_out_and_said():
    space = spaces.Dict({"say": spaces.Text(9), "n": spaces.Discrete(2), "x": spaces.Box(-1, 1, (1,))})
    seen = encoding(space, "here")
    assert seen.note == "here: policies do not see the text 'say'"
    assert seen.encode is not None
    np.testing.assert_array_equal(seen.encode({"say": "hi", "n": 1, "x": np.array([0.5])}), [0, 1, 0.5])


@pytest.mark.parametrize(
    "space", [spaces.Text(5), spaces.Sequence(spaces.Discrete(2)), spaces.Graph(spaces.Discrete(2), None)], ids=str
)
def test_what_no_network_fits(space: spaces.Space):
    with pytest.raises(ConfigError, match=r"here: no network fits the observations"):
        encoding(space, "here")


def test_specs():
    assert spec_of(make("Pendulum-v1")).__dict__ == {
        "observation": (3,),
        "image": False,
        "discrete": False,
        "actions": 1,
        "low": (-2.0,),
        "high": (2.0,),
    }
    assert spec_of(make("Pendulum-v1", frame_stack=3)).observation == (9,)
    assert spec_of(make("FrozenLake-v1")).observation == (16,)
    seaquest = spec_of(make("MinAtar/Seaquest-v1"))
    assert seaquest.observation == (10, 10, 10) and seaquest.image and seaquest.discrete and seaquest.actions == 6
    for space, told in [
        (spaces.MultiDiscrete([2, 2]), "no policy fits the actions"),
        (spaces.Box(-np.inf, 1, (2,)), "have no finite bounds"),
        (spaces.Box(0, 5, (2,), np.int64), "no policy fits the actions"),
    ]:
        env = make("CartPole-v1")
        env.action_space = space
        with pytest.raises(ConfigError, match=f"CartPole-v1: .*{told}"):
            spec_of(env)


def test_episodes_end_and_begin():
    environments = Environments("Walk-v0", [7, 8])
    first = environments.reset()
    assert first.shape == (2, 1, 3) and first.dtype == np.float32
    # seed 7 takes steps of 1 (time limit 4 before the goal 5), seed 8 of 2 (goal after 3, passed)
    for t in range(1, 4):
        step = environments.step(np.array([[0], [1]]))
        np.testing.assert_array_equal(step.reward, [[0.5], [1.0]])
        np.testing.assert_array_equal(step.final_obs[0, 0], [first[0, 0, 0], t, t])
    assert step.terminated.tolist() == [[False], [True]] and not step.truncated.any()
    assert step.finished == [(1, 0, 3.0, 3)] and step.success == [0.0]
    np.testing.assert_array_equal(step.final_obs[1, 0], [first[1, 0, 0], 6, 3])
    np.testing.assert_array_equal(step.obs[1, 0, 1:], [0, 0])
    assert step.obs[1, 0, 0] != first[1, 0, 0] and np.array_equal(step.obs[0], step.final_obs[0])
    before = step.obs.copy()
    following = environments.step(np.array([[0], [0]]))
    assert following.truncated.tolist() == [[True], [False]] and not following.terminated.any()
    assert following.finished == [(0, 0, 2.0, 4)]
    np.testing.assert_array_equal(step.obs, before)  # what was handed out is not written to


def test_success_is_what_was_ever_told():
    environments = Environments("Walk-v0", [0], goal=3)
    environments.reset()
    for action in (1, 0):
        step = environments.step(np.array([[action]]))
    assert step.success == [1.0] and step.finished == [(0, 0, 1.5, 2)]
    environments = Environments("CartPole-v1", [0])
    environments.reset()
    told = [x for a in random_actions(environments, 60) for x in environments.step(a).success]
    assert told and np.isnan(told).all()


def test_a_seed_does_the_same_alone_and_beside_others():
    three, alone = Environments("CartPole-v1", [3, 5, 9], 2), Environments("CartPole-v1", [5], 2)
    np.testing.assert_array_equal(three.reset()[1:2], alone.reset())
    ends = 0
    for actions in random_actions(three, 150):
        together, by_itself = three.step(actions), alone.step(actions[1:2])
        assert equal(together, by_itself, slice(1, 2))
        assert [f[1:] for f in together.finished if f.seed == 1] == [f[1:] for f in by_itself.finished]
        ends += len(by_itself.finished)
    assert ends > 5
    starts = three.reset().reshape(6, -1)
    assert len(np.unique(starts, axis=0)) == 6  # every copy has resets of its own


def test_resting_copies_stay_as_they_are():
    environments = Environments("Walk-v0", [0, 1], 2)
    environments.reset()
    step = environments.step(np.ones((2, 2), int), np.array([[True, False], [False, True]]))
    np.testing.assert_array_equal(step.obs[..., 2], [[1, 0], [0, 1]])
    np.testing.assert_array_equal(step.reward, [[1, 0], [0, 1]])


def test_actions_are_clipped_to_the_bounds():
    wild, tame = Environments("Pendulum-v1", [0]), Environments("Pendulum-v1", [0])
    wild.reset(), tame.reset()
    for action in (9.0, -3.0):
        assert equal(wild.step(np.full((1, 1, 1), action)), tame.step(np.full((1, 1, 1), np.clip(action, -2, 2))))


@pytest.mark.parametrize(
    ("id", "vector"),
    [
        ("CartPole-v1", "sync"),
        ("CartPole-v1", "async"),
        ("Hopper-v5", "sync"),
        ("LunarLander-v3", "sync"),
        ("MiniGrid-Empty-5x5-v0", "sync"),
        ("MinAtar/Seaquest-v1", "sync"),
        ("ALE/Breakout-v5", "sync"),
    ],
)
def test_state_comes_back_bit_for_bit(id: str, vector: Any):
    kept = Environments(id, [3, 4], 2, vector)
    kept.reset()
    for actions in random_actions(kept, 75):
        kept.step(actions)
    state = kept.state_dict()
    assert all(isinstance(x, torch.Tensor) for x in state.values())
    back = Environments(id, [3, 4], 2, vector)
    back.load_state_dict(state)
    assert back.restorable and back.notes == kept.notes
    np.testing.assert_array_equal(back.obs, kept.obs)
    for actions in random_actions(kept, 75, seed=1):
        a, b = kept.step(actions), back.step(actions)
        assert equal(a, b) and a.finished == b.finished
    kept.close(), back.close()


def test_what_cannot_be_restored_goes_on_with_a_new_episode_and_says_so():
    np.random.seed(0)
    environments = Environments("Drift-v0", [0, 1])
    environments.reset()
    environments.step(np.zeros((2, 1), int))
    state = environments.state_dict()
    environments.load_state_dict(state)
    assert not environments.restorable
    assert "Drift-v0 cannot be restored" in environments.notes[0] and "2 of 2 copies" in environments.notes[0]
    np.testing.assert_array_equal(environments.obs[..., 1:], 0)
    finished = [f for _ in range(4) for f in environments.step(np.zeros((2, 1), int)).finished]
    assert finished == [(0, 0, 2.0, 4), (1, 0, 2.0, 4)]  # nothing of the lost episode is counted


def test_processes_do_the_same():
    here, there = Environments("CartPole-v1", [0, 1, 2]), Environments("CartPole-v1", [0, 1, 2], vector="async")
    np.testing.assert_array_equal(here.reset(), there.reset())
    for actions in random_actions(here, 60):
        a, b = here.step(actions), there.step(actions)
        assert equal(a, b) and a.finished == b.finished
    there.close()
    with pytest.raises(ConfigError, match="CartPole-v1"):
        Environments("CartPol-v1", [0], vector="async")


def test_atari_shows_four_frames():
    environments = Environments("ALE/Pong-v5", [0])
    obs = environments.reset()
    assert environments.spec.observation == (4, 84, 84) and obs.dtype == np.uint8
    np.testing.assert_array_equal(obs[0, 0, :3], obs[0, 0, 1:])
    for actions in random_actions(environments, 30):
        step = environments.step(actions)
        np.testing.assert_array_equal(step.obs[:, :, :3], obs[:, :, 1:])
        obs = step.obs
    assert (obs[0, 0, 3] != obs[0, 0, 0]).any()
    other = Environments("ALE/Pong-v5", [1])
    other.reset()
    for actions in random_actions(other, 30):
        step = other.step(actions)
    assert (step.obs != obs).any()  # no-ops and sticky actions follow the seed


def test_minigrid_says_what_is_not_seen():
    environments = Environments("MiniGrid-Empty-5x5-v0", [0])
    assert environments.spec.observation == (7 * 7 * 3 + 4,)
    assert environments.notes == ["MiniGrid-Empty-5x5-v0: policies do not see the text 'mission'"]
