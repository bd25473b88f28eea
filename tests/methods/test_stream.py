"""Streaming methods in a run: they learn, resume exactly, and say what they cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.control.policy import ControlPolicy
from guerdon.control.streaming import learners
from guerdon.errors import ConfigError
from guerdon.methods.base import get_method
from guerdon.training.config import ControlTraining
from guerdon.training.control import ControlRun
from guerdon.training.distributed import Distribution


def started(tmp_path, name: str = "stream-q", env: str = "CartPole-v1", steps: int = 400, seeds: int = 2, **options):
    """A method and its run, set up."""
    method = get_method(name)(**options)
    config = ControlTraining(env=env, max_samples=steps, seeds=seeds, log_every=200)
    config.check()
    method.check_loop(config)
    method.check()
    run = ControlRun(method, config, Distribution(), tmp_path)
    method.setup(run)
    return method, run


def learned(method, run) -> list[dict[str, list[float]]]:
    return list(method.learn(run))


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("stream-q", "CartPole-v1"),
        ("stream-sarsa", "Acrobot-v1"),
        ("stream-ac", "CartPole-v1"),
        ("stream-ac", "Pendulum-v1"),
        ("stream-td", "CartPole-v1"),
        ("stream-td", "Pendulum-v1"),
    ],
)
def test_a_run(tmp_path, name, env):
    method, run = started(tmp_path, name, env)
    rows = learned(method, run)
    assert len(rows) == 2
    assert (run.cursor.step, run.cursor.samples) == (400, 400)
    assert all(len(values) == 2 for values in rows[-1].values())
    assert all(np.isfinite(values).all() for name, values in rows[-1].items() if not name.startswith("episode/"))
    assert ("policy/entropy" in rows[-1]) == (name == "stream-ac")
    obs = np.zeros((2, 3, *run.spec.observation), np.float32)
    actions = run.policy.act(obs)
    assert actions.shape == ((2, 3) if run.spec.discrete else (2, 3, run.spec.actions))


def test_the_exported_policy_is_what_was_learned(tmp_path):
    method, run = started(tmp_path)
    learned(method, run)
    assert torch.equal(run.policy.actor.weights, method.learner.weights("value"))
    np.testing.assert_allclose(run.policy.normalizer.mean, method.learner.statistics()[0], rtol=1e-6)


def test_actor_critic_learns_to_balance(tmp_path):
    method, run = started(tmp_path, "stream-ac", steps=8000, seeds=3)
    rows = learned(method, run)
    late = np.nanmean([row["episode/return"] for row in rows[-5:]], axis=0)
    assert (late > 150).all()  # at random some 20


@pytest.mark.parametrize(("name", "env"), [("stream-q", "CartPole-v1"), ("stream-ac", "Pendulum-v1")])
def test_a_run_goes_on_bit_for_bit(tmp_path, name, env):
    method, whole = started(tmp_path, name, env, steps=800)
    rows = learned(method, whole)
    half_method, half = started(tmp_path, name, env, steps=800)
    steps = half_method.learn(half)
    first = [next(steps), next(steps)]
    half.save(tmp_path)
    again_method, again = started(tmp_path, name, env, steps=800)
    again.restore(tmp_path)
    np.testing.assert_equal(first + learned(again_method, again), rows)
    for network in method.learner.outputs:
        assert torch.equal(again_method.learner.weights(network), method.learner.weights(network))


def test_an_environment_that_cannot_be_restored_begins_anew(tmp_path, monkeypatch):
    for restorable in (True, False):
        method, run = started(tmp_path)
        next(method.learn(run))
        run.envs.restorable = restorable
        begun = []
        monkeypatch.setattr(method.learner, "begin", lambda obs, begun=begun: begun.append(obs))
        next(method.learn(run))
        assert len(begun) == (0 if restorable else 1)


@pytest.mark.parametrize("cls", [learners.TorchLearner, learners.KernelLearner])
def test_beginning_anew_forgets_the_traces(tmp_path, cls, monkeypatch):
    monkeypatch.setattr(learners, "find_spec", lambda name: cls is learners.KernelLearner or None)
    method, run = started(tmp_path, seeds=1)
    next(method.learn(run))
    learner = method.learner
    assert isinstance(learner, cls)
    learner.begin(run.envs.obs[:, 0])
    if cls is learners.KernelLearner:
        assert not learner.nets["value"].rows[:, 1].any()
    else:
        assert not any(state["trace"].any() for state in learner.agents[0].optimizer.state.values())


def test_without_numba_the_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(learners, "find_spec", lambda name: None)
    method, run = started(tmp_path, steps=20)
    assert any("numba is not installed" in note for note in run.notes)
    learned(method, run)


def test_layers_that_begin_at_zero_are_told(tmp_path):
    assert any("32 of stream-q's units" in note for note in started(tmp_path)[1].notes)
    assert not started(tmp_path, connect_all=True)[1].notes


def test_options_are_those_that_mean_something():
    assert "batch_size" not in get_method("stream-q")().options()
    assert get_method("stream-ac")().options()["kappa_policy"] == 3.0
    assert "entropy_coef" not in get_method("stream-q")().options()


def test_atari_frames_are_told_apart(tmp_path):
    _, run = started(tmp_path, "stream-q", "ALE/Pong-v5", steps=10, seeds=1)
    assert run.parts["learner"].frames == 4
    assert run.policy.normalizer.mean.shape == (1, 4, 84, 84)


@pytest.mark.parametrize(
    ("name", "env", "said"),
    [("stream-q", "Pendulum-v1", "stream-q acts with discrete actions"), ("stream-ac", "CartPol-v1", "CartPole-v1")],
)
def test_environments_that_do_not_fit(tmp_path, name, env, said):
    with pytest.raises(ConfigError, match=said):
        started(tmp_path, name, env)


def test_data_is_refused():
    with pytest.raises(ConfigError, match="give env instead of"):
        get_method("stream-q")().check_loop(ControlTraining(data="minari:x", env="CartPole-v1"))


def test_the_policy_is_read_back(tmp_path):
    method, run = started(tmp_path)
    learned(method, run)
    run.export(tmp_path / "policy")
    policy = ControlPolicy.load(tmp_path / "policy")
    obs = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    np.testing.assert_array_equal(policy.act(obs), run.policy.act(obs))
    np.testing.assert_array_equal(policy.take(1).act(obs[1:]), run.policy.act(obs)[1:])
