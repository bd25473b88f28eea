"""Episodes of policies in real environments, as datasets that are read back."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from guerdon.control.collect import collect
from guerdon.control.datasets import read_transitions
from guerdon.control.networks import GreedyQ, initialise
from guerdon.control.policy import ControlPolicy
from guerdon.control.simulators import make, spec_of
from guerdon.errors import ConfigError, DataError

SCRIPT = """
import numpy as np

def right(observation):
    return 1

def push(observation):
    return np.array([9.0])

def upright(observation):
    assert observation.shape == (4,)
    return int(observation[2] + observation[3] > 0)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "scripted.py").write_text(SCRIPT)
    return tmp_path


def policy_of(env: str, seeds: list[int]) -> ControlPolicy:
    made = make(env)
    actor = GreedyQ(len(seeds), spec_of(made), (8,))
    initialise(actor, seeds, "torch", name="q")
    return ControlPolicy(actor, spec_of(made), None, env, seeds)


def test_a_script_does_what_the_data_says():
    told = []
    summary = collect(
        "CartPole-v1", policies=["python:scripted.upright"], out="cart", episodes=3, seed=4,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    data = read_transitions("cart")
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert summary["episodes"] == 3 and summary["steps"] == len(data)
    assert summary["return"] == pytest.approx(data.returns().mean())
    assert summary["policies"] == {"python:scripted.upright": summary["return"]}
    assert data.env == "CartPole-v1" and data.spec.actions == 2
    np.testing.assert_array_equal(data.actions, (data.observations[:, 2] + data.observations[:, 3] > 0).astype(int))
    # The rows are what the simulator does: played again, it shows the same.
    env = gymnasium.make("CartPole-v1").unwrapped
    for row in (0, len(data) // 2, len(data) - 1):
        env.reset(seed=0)
        env.state = data.observations[row].astype(np.float64)
        after, _, terminated, _, _ = env.step(int(data.actions[row]))
        np.testing.assert_allclose(after, data.next_observations[row], atol=1e-5)
        assert terminated == data.terminated[row]
    assert (data.terminated | data.truncated).sum() == 3


def test_the_same_call_collects_the_same_and_another_seed_something_else():
    for out, seed in (("first", 1), ("again", 1), ("other", 2)):
        collect("CartPole-v1", policies=["random"], out=out, episodes=4, seed=seed)
    digests = [read_transitions(out).digest for out in ("first", "again", "other")]
    assert digests[0] == digests[1] != digests[2]


def test_policies_and_their_seeds_take_turns(here):
    policy = policy_of("CartPole-v1", [5, 6])
    policy.save(here / "run" / "policy")
    summary = collect("CartPole-v1", policies=["python:scripted.right", "run"], out="mixed", episodes=5)
    data = read_transitions("mixed")
    assert list(summary["policies"]) == ["python:scripted.right", "run"]
    returns = data.returns()
    assert summary["policies"]["python:scripted.right"] == pytest.approx(returns[[0, 2, 4]].mean())
    assert summary["policies"]["run"] == pytest.approx(returns[[1, 3]].mean())
    assert summary["return"] == pytest.approx(returns.mean())
    for episode, seed in ((1, 0), (3, 1)):
        rows = data.episode == episode
        expected = policy.take(seed).act(data.observations[rows][None])[0]
        np.testing.assert_array_equal(data.actions[rows], expected)
    assert (data.actions[data.episode == 0] == 1).all()


def test_noise_is_the_share_of_random_actions():
    collect("MountainCar-v0", policies=["python:scripted.right"], out="quiet", episodes=2)
    names = ["python:scripted.right"] * 2
    collect("MountainCar-v0", policies=names, noises=[0.6], out="noisy", episodes=10)
    collect("MountainCar-v0", policies=names, noises=[0.0, 1.0], out="each", episodes=10)
    assert (read_transitions("quiet").actions == 1).all()
    share = (read_transitions("noisy").actions != 1).mean()
    assert share == pytest.approx(0.6 * 2 / 3, abs=0.05)
    each = read_transitions("each")
    assert (each.actions[each.episode % 2 == 0] == 1).all()
    assert (each.actions[each.episode % 2 == 1] != 1).mean() == pytest.approx(2 / 3, abs=0.06)
    assert not each.terminated.any() and each.truncated.sum() == 10  # never reaches the goal within 200 steps


def test_continuous_actions_are_within_the_bounds():
    collect("Pendulum-v1", policies=["random"], out="random", episodes=2)
    actions = read_transitions("random").actions
    assert actions.shape == (400, 1) and -2 <= actions.min() < -1.9 and 1.9 < actions.max() <= 2
    assert abs(actions.mean()) < 0.2
    collect("Pendulum-v1", policies=["python:scripted.push"], out="pushed", episodes=1)
    pushed = read_transitions("pushed")
    assert (pushed.actions == 2).all()  # what the environment made of 9
    assert pushed.rewards.sum() == pytest.approx(pushed.returns()[0])


def test_a_minari_id_and_images():
    pytest.importorskip("minatar")
    collect("MinAtar/Breakout-v1", policies=["random"], out="minari:tests/bricks-v0", episodes=2)
    data = read_transitions("minari:tests/bricks-v0")
    assert data.spec.image and data.observations.shape[1:] == (4, 10, 10) and data.env == "MinAtar/Breakout-v1"
    assert set(np.unique(data.observations)) == {0, 255}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": ["nothing"]}, "there is no policy 'nothing'"),
        (
            {"policies": ["python:scripted.nothing"]},
            r"python:scripted\.nothing: .*scripted\.py has no function 'nothing'",
        ),
        ({"policies": ["python:no_such_module.act"]}, "no_such_module"),
        ({"policies": ["python:act"]}, "'python:act' has to be python:module.function"),
        ({"noises": [1.5]}, r"noise is 1\.5"),
        ({"policies": ["random"] * 3, "noises": [0.1, 0.2]}, "3 policies and 2 values of noise"),
        ({"env": "CartPole-v7"}, "CartPole-v"),
    ],
)
def test_what_cannot_be_collected(options, message):
    with pytest.raises(ConfigError, match=message):
        collect(**{"env": "CartPole-v1", "policies": ["random"], "out": "out", "episodes": 1, **options})
    assert not Path("out").exists()


def test_a_policy_of_another_environment(here):
    policy_of("Acrobot-v1", [0]).save(here / "run" / "policy")
    with pytest.raises(ConfigError, match="the policy of run is for Acrobot-v1, not for this one"):
        collect("CartPole-v1", policies=["run"], out="out", episodes=1)


def test_nothing_is_written_over_and_nothing_half_is_left(here):
    collect("CartPole-v1", policies=["random"], out="out", episodes=1)
    before = read_transitions("out").digest
    with pytest.raises(DataError, match="exists already"):
        collect("CartPole-v1", policies=["random"], out="out", episodes=2, seed=1)
    assert read_transitions("out").digest == before

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect("CartPole-v1", policies=["random"], out="stopped", episodes=3, progress=stop)
    assert sorted(path.name for path in here.iterdir() if path.name not in ("minari", "__pycache__")) == [
        "out",
        "scripted.py",
    ]
