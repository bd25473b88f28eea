from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guerdon.control.networks import CategoricalActor, GaussianActor, QEnsemble, initialise
from guerdon.control.policy import ControlPolicy
from guerdon.control.spaces import Spec
from guerdon.control.streams import Streams
from guerdon.errors import ConfigError, DataError

BODY = Spec((4,), False, False, 2, (-1.0, -2.0), (1.0, 2.0))
PLANES = Spec((3, 10, 10), True, True, 5, (), ())


def policy(normalizer=None) -> ControlPolicy:
    actor = GaussianActor(3, BODY, (16,))
    initialise(actor, [7, 8, 9])
    return ControlPolicy(actor, BODY, normalizer, "Hopper-v5", [7, 8, 9])


def scaling(*shape: int) -> SimpleNamespace:
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        mean=rng.normal(size=(*shape, 4)).astype(np.float32), std=rng.uniform(0.5, 3, (*shape, 4)).astype(np.float32)
    )


@pytest.mark.parametrize("normalizer", [None, scaling(), scaling(3)], ids=["none", "shared", "by seed"])
def test_saved_and_loaded_it_acts_bit_for_bit_alike(tmp_path, normalizer):
    mine, obs = policy(normalizer), np.random.default_rng(1).normal(size=(3, 6, 4))
    mine.save(tmp_path / "policy")
    again = ControlPolicy.load(tmp_path / "policy")
    assert (again.spec, again.env, again.seeds) == (BODY, "Hopper-v5", [7, 8, 9])
    assert np.array_equal(again.act(obs), mine.act(obs))
    assert np.array_equal(again.act(obs, Streams(mine.seeds)), mine.act(obs, Streams(mine.seeds)))
    assert {p.name for p in (tmp_path / "policy").iterdir()} == {"policy.json", "policy.safetensors"}


@pytest.mark.parametrize("normalizer", [scaling(), scaling(3)], ids=["shared", "by seed"])
def test_observations_are_normalised(normalizer):
    obs = np.random.default_rng(1).normal(size=(3, 6, 4)).astype(np.float32)
    mean, std = (x if x.ndim == 1 else x[:, None] for x in (normalizer.mean, normalizer.std))
    expected = policy().act((obs - mean) / std)
    np.testing.assert_allclose(policy(normalizer).act(obs), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(policy().act(obs) - expected).max() > 0.01


@pytest.mark.parametrize("normalizer", [scaling(), scaling(3)], ids=["shared", "by seed"])
def test_one_seed_taken_out_acts_as_before(normalizer):
    mine, obs = policy(normalizer), np.random.default_rng(1).normal(size=(3, 6, 4))
    one = mine.take(1)
    assert one.seeds == [8] and one.actor.seeds == 1
    np.testing.assert_allclose(one.act(obs[1:2]), mine.act(obs)[1:2], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        next(mine.actor.parameters()).zero_()
    assert next(one.actor.parameters()).all()  # a copy


def test_images_reach_the_actor_as_bytes():
    actor = CategoricalActor(1, PLANES, (8,))
    initialise(actor, [0])
    obs = np.random.default_rng(0).integers(0, 2, (1, 6, 3, 10, 10), dtype=np.uint8)
    action = ControlPolicy(actor, PLANES).act(obs)
    assert action.shape == (1, 6) and action.dtype == np.int64
    assert np.array_equal(action, actor.act(torch.from_numpy(obs)).numpy())


def test_what_cannot_be_read_says_why(tmp_path):
    with pytest.raises(DataError, match=r"holds no control policy: there is no policy.json"):
        ControlPolicy.load(tmp_path)
    policy().save(tmp_path)
    facts = json.loads((tmp_path / "policy.json").read_text())
    facts["actor"]["hidden"] = [17]
    (tmp_path / "policy.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="size mismatch"):
        ControlPolicy.load(tmp_path)
    (tmp_path / "policy.json").write_text("{")
    with pytest.raises(DataError, match="JSONDecodeError"):
        ControlPolicy.load(tmp_path)
    policy().save(tmp_path)
    (tmp_path / "policy.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="SafetensorError"):
        ControlPolicy.load(tmp_path)


def test_its_critic_comes_along_and_values_raw_observations(tmp_path):
    scales = scaling(3)
    critic = QEnsemble(3, BODY, (8,), 4)
    initialise(critic, [7, 8, 9])
    mine = policy(scales)
    mine.critic = critic
    mine.save(tmp_path / "policy")
    values, acts = ControlPolicy.load(tmp_path / "policy").attacked()
    obs, action = torch.randn(5, 4), torch.randn(5, 2)
    normal = (obs.numpy() - scales.mean[:, None]) / scales.std[:, None]
    expected = critic(torch.from_numpy(normal), action.expand(3, 5, 2))[0]
    torch.testing.assert_close(values(obs, action), expected)
    assert values(obs, action).shape == (4, 5)
    np.testing.assert_allclose(acts(obs).numpy(), mine.act(np.broadcast_to(obs.numpy(), (3, 5, 4)))[0], rtol=1e-5)
    seen = obs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(values(seen, acts(seen)).sum(), seen)
    assert gradient.abs().min() > 0
    with pytest.raises(ConfigError, match="has no critic"):
        policy().attacked()
