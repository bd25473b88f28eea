from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError
from guerdon.methods.base import get_method
from guerdon.methods.policy_gradient import gae, whiten
from guerdon.methods.verifiers.ppo import PPO, clipped_value_loss

SCORES = [[1.0], [0.0], [1.0, 0.0]]
RNG = np.random.default_rng(0)


def test_name_published_settings_and_refusals():
    method = get_method("ppo")()
    assert (method.lr, method.kl_coef, method.epochs, method.group_size, method.adam_eps) == (3e-7, 0.05, 4, 1, 1e-5)
    assert (method.gamma, method.gae_lambda, method.value_coef) == (1.0, 0.95, 0.1)
    assert method.needs_reference() and not PPO(kl_coef=0.0).needs_reference()
    with pytest.raises(ConfigError, match="gae_lambda=2"):
        PPO(gae_lambda=2).check()


def test_scores_are_the_three_of_the_paper(sampled):
    group = sampled([[1.0, 0.0, 1.0]])[0]
    group.values["finished"] = np.array([1, 1, 0], np.float32)
    assert PPO().score(group).tolist() == [10, 0, -10]


def test_a_reward_model_adds_to_what_the_verifier_says_or_speaks_alone(sampled):
    group = sampled([[1.0, 0.0, 1.0]])[0]
    group.values |= {"finished": np.array([1, 1, 0], np.float32), "rated": np.array([0.5, -2.0, 3.0], np.float32)}
    assert PPO().score(group).tolist() == [10.5, -2, -10]
    assert PPO(bonus=0.0, reward_model_coef=2.0).score(group).tolist() == [1, -4, -10]


def test_credit_of_each_completion_is_its_own_gae_whitened_over_the_round(sampled):
    method, groups = PPO(gamma=0.9), sampled(SCORES)
    credited = method.credit_values(groups)
    raw, returns = [], []
    for group in groups:
        for i, leaf in enumerate(group.leaves):
            v = group.segments[leaf].values
            rewards = -0.05 * (v["old_logps"] - v["ref_logps"])
            rewards[-1] += 10 * group.values["score"][i]
            raw.append(gae(rewards[None], v["values"][None], 0.9, 0.95)[0])
            returns.append(raw[-1] + v["values"])
    leaves = [g.segments[leaf].values for g in credited for leaf in g.leaves]
    np.testing.assert_allclose(np.concatenate([v["advantage"] for v in leaves]), whiten(np.concatenate(raw)), atol=1e-5)
    np.testing.assert_allclose(np.concatenate([v["returns"] for v in leaves]), np.concatenate(returns), rtol=1e-5)
    assert "advantage" not in groups[0].segments[1].values


def test_the_critic_speaks_before_credit_is_given(sampled):
    method, groups = PPO(), sampled(SCORES)

    class Critic:
        def values(self, groups):
            for s in (s for g in groups for s in g.segments[1:]):
                s.values["values"] = np.full(len(s), 2.0, np.float32)

    method.critic = Critic()
    credited = method.credit(groups, RNG)
    assert credited[0].segments[1].values["returns"][-1] == pytest.approx(
        10 - 0.05 * float((groups[0].segments[1].values["old_logps"] - groups[0].segments[1].values["ref_logps"])[-1]),
        abs=1e-5,
    )
    assert method.credit([], RNG) == []


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),
        (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9),
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # moved towards the target by more than 0.2: held
        (0.0, 1.0, 3.0, 0.5 * 3.0**2, -3.0),  # moved away: pulled back
        (4.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),
        (9.0, 1.0, 3.0, 0.5 * 6.0**2, 6.0),
    ],
)
def test_clipped_value_loss_by_hand(value, old, target, loss, gradient):
    v = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    losses, cut = clipped_value_loss(v, torch.tensor([old]).double(), torch.tensor([target]).double(), 0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert v.grad.item() == pytest.approx(gradient)
    assert bool(cut) is (gradient == 0)


def test_losses_are_means_over_tokens(sampled, on):
    method = PPO()
    groups = method.credit_values(sampled(SCORES, drift=0.0))
    leaves = [g.segments[leaf].values for g in groups for leaf in g.leaves]
    tokens = sum(len(v["values"]) for v in leaves)
    loss, gradients, metrics = on(method, groups)
    assert loss == pytest.approx(0, abs=1e-6)  # whitened advantages have mean zero
    for gradient, v in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, -v["advantage"] / tokens, atol=1e-6)
    method.check_first({name: values.mean() for name, values in metrics.items()})
    value, gradients, _ = on(method, groups, loss=method.value_loss)
    unclipped = np.concatenate([(v["new_values"] - v["returns"]) ** 2 for v in leaves])
    held = [v["values"] + np.clip(v["new_values"] - v["values"], -0.2, 0.2) - v["returns"] for v in leaves]
    expected = 0.1 * 0.5 * np.maximum(unclipped, np.concatenate(held) ** 2).mean()
    assert value == pytest.approx(expected, rel=1e-5)


def test_a_cut_into_micro_batches_changes_nothing(sampled, on):
    method = PPO()
    groups = method.credit_values(sampled(SCORES))
    totals = method.totals(groups)
    for loss in (method.loss, method.value_loss):
        whole = on(method, groups, loss=loss)[0]
        parts = [groups[2].subset([1]), *groups[:2], groups[2].subset([0])]
        assert sum(on(method, [p], totals, loss)[0] for p in parts) == pytest.approx(whole, abs=1e-6)


def test_value_model_from_a_reward_model_keeps_its_head(tmp_path):
    from safetensors.torch import save_file

    from guerdon.language.models import load_model, save_model

    model, tokenizer = load_model("tiny:layers=1,width=32,heads=2", seed=5)
    save_model(model, tokenizer, tmp_path)
    save_file({"weight": torch.full((1, 32), 0.5)}, tmp_path / "head.safetensors")
    start, given = load_model("tiny:layers=1,width=32,heads=2", seed=1), []
    run = SimpleNamespace(load_start=lambda: start, add_critic=lambda *args: given.append(args))
    PPO(value_model=str(tmp_path), value_lr=1e-5).setup(run)
    PPO().setup(run)
    (from_reward, lr, head), (from_policy, _, no_head) = given
    torch.testing.assert_close(
        from_reward.get_input_embeddings().weight, model.get_input_embeddings().weight, rtol=0, atol=0
    )
    assert lr == 1e-5 and head.tolist() == [[0.5] * 32]
    assert from_policy is start[0] and no_head is None
