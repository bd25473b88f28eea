from __future__ import annotations

import io
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image
from scipy import stats

from guerdon.control.environments import Environments
from guerdon.control.networks import CategoricalActor, GaussianActor, initialise
from guerdon.control.policy import ControlPolicy
from guerdon.control.rollout import evaluate, film, normalized, random_policy
from guerdon.control.simulators import make, spec_of
from guerdon.errors import ConfigError


class Reach(gymnasium.Env):
    """Succeeds where the number drawn at the reset is above one half; lasts longer the greater it is."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.drawn, self.steps = self.np_random.random(), 0
        return np.array([self.drawn], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        over = self.steps > 10 * self.drawn
        info = {"is_success": self.drawn > 0.5} if over else {}
        return np.array([self.drawn], np.float32), self.drawn, over, False, info

    def render(self) -> np.ndarray:
        raise RuntimeError("no screen")


gymnasium.register("Reach-v0", Reach)


def policy_for(id: str, seeds: list[int]) -> ControlPolicy:
    spec = spec_of(make(id))
    kind = CategoricalActor if spec.discrete else GaussianActor
    actor = kind(len(seeds), spec, (16,))
    initialise(actor, seeds)
    return ControlPolicy(actor, spec, env=id, seeds=seeds)


def test_scores_are_those_of_a_plain_loop():
    policy = policy_for("Pendulum-v1", [0, 1])
    found = evaluate(policy, "Pendulum-v1", 3, seed=5)
    assert set(found) == {"return", "length"} and found["return"].shape == (2, 3)
    assert (found["length"] == 200).all()
    env = make("Pendulum-v1")
    seeing = Environments("Pendulum-v1", [(1 << 40) + 5], 3)
    first = seeing.reset()[0]
    for e in range(3):
        for k in range(2):
            env.reset(seed=0)
            env.unwrapped.state = np.array([np.arctan2(first[e, 1], first[e, 0]), first[e, 2]])  # the same start
            obs, total = first[e], 0.0
            for _ in range(200):
                action = policy.act(np.tile(obs, (2, 1, 1)))[k, 0]
                obs, reward, _, _, _ = env.step(action)
                total += reward
            assert found["return"][k, e] == pytest.approx(total, rel=1e-3)


def test_an_episode_is_the_same_whoever_plays_it():
    both, second = policy_for("CartPole-v1", [0, 1]), policy_for("CartPole-v1", [1])
    with torch.no_grad():
        for p, q in zip(both.actor.parameters(), second.actor.parameters(), strict=True):
            torch.testing.assert_close(p[1:], q)
    many = evaluate(both, "CartPole-v1", 20)
    for episodes in (4, 17):
        few = evaluate(second, "CartPole-v1", episodes)
        np.testing.assert_array_equal(few["return"][0], many["return"][1, :episodes])
    assert len(set(many["return"][0])) > 1
    other = evaluate(both, "CartPole-v1", 20, seed=1)
    assert (other["return"] != many["return"]).any()


def test_success_is_told_and_shared_starts_are_shared():
    found = evaluate(policy_for("Reach-v0", [0, 1, 2]), "Reach-v0", 40)
    drawn = found["return"] / found["length"]
    np.testing.assert_array_equal(found["success"], drawn > 0.5)
    assert (drawn == drawn[0]).all() and 0 < found["success"].mean() < 1
    np.testing.assert_array_equal(found["length"], np.floor(10 * drawn) + 1)


def test_normalized_scores():
    np.testing.assert_allclose(normalized("Hopper-v5", np.array([-20.272305, 3234.3, 1607.0138475])), [0, 100, 50])
    assert normalized("Hopping-v5", np.zeros(1)) is None and normalized("CartPole-v1", np.zeros(1)) is None
    found = evaluate(policy_for("HalfCheetah-v5", [0]), "HalfCheetah-v5", 1)
    np.testing.assert_allclose(found["normalized"], 100 * (found["return"] + 280.178953) / (12135.0 + 280.178953))


@pytest.mark.parametrize(
    ("id", "told"),
    [
        ("LunarLander-v3", r"observations of shape \(4,\).*\(8,\)"),
        ("MountainCar-v0", r"observations of shape \(4,\).*\(2,\)"),
        ("CartPol-v1", "CartPole-v1"),
    ],
)
def test_a_policy_that_does_not_fit(id: str, told: str):
    with pytest.raises(ConfigError, match=told):
        evaluate(policy_for("CartPole-v1", [0]), id, 1)


def test_films():
    policy = policy_for("CartPole-v1", [0, 1])
    scores = evaluate(policy, "CartPole-v1", 1, seed=3)
    for index in range(2):
        strip = film(policy, "CartPole-v1", index=index, seed=3, frames=5, height=60)
        assert (strip.ret, strip.length) == (scores["return"][index, 0], scores["length"][index, 0])
        image = Image.open(io.BytesIO(strip.data))
        assert image.format == "PNG" and image.size == (5 * 90, 60) and not strip.note
        stills = np.asarray(image).reshape(60, 5, 90, 3)
        assert (stills[:, 0] != stills[:, 4]).any()  # the pole has moved
    moving = Image.open(io.BytesIO(film(policy, "CartPole-v1", kind="gif", height=40).data))
    assert moving.format == "GIF" and moving.size == (60, 40) and moving.n_frames > 3
    small = film(policy_for("MinAtar/Breakout-v1", [0]), "MinAtar/Breakout-v1", frames=2, height=40)
    assert Image.open(io.BytesIO(small.data)).size == (80, 40)


def test_what_cannot_be_drawn_is_noted():
    shown = film(policy_for("Reach-v0", [0]), "Reach-v0")
    assert shown.data == b"" and "Reach-v0 cannot be drawn here (RuntimeError: no screen)" in shown.note
    assert shown.length > 0


def test_an_episode_without_end_is_cut():
    assert film(policy_for("Pendulum-v1", [0]), "Pendulum-v1", limit=7, frames=1, height=20).length == 7


def test_random_policies():
    policy = random_policy("Pendulum-v1", [3, 4])
    actions = policy.act(np.zeros((2, 500, 3)))
    assert actions.shape == (2, 500, 1) and stats.kstest(actions.ravel() / 4 + 0.5, "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(random_policy("Pendulum-v1", [4]).act(np.zeros((1, 500, 3)))[0], actions[1])
    found = evaluate(random_policy("CartPole-v1", [0, 1]), "CartPole-v1", 100)["return"]
    assert 18 < found.mean() < 27 and (found[0] != found[1]).any()  # a random CartPole lasts about 22 steps
    assert film(random_policy("CartPole-v1", [0, 1]), "CartPole-v1", index=1, frames=2, height=20).data
