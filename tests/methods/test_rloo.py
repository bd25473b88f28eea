from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError
from guerdon.language.forward import GroupModel
from guerdon.language.packing import pack
from guerdon.methods.base import get_method
from guerdon.methods.verifiers.rloo import RLOO

SCORES = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
RNG = np.random.default_rng(0)


def test_name_and_refusals():
    assert get_method("rloo") is RLOO and RLOO().needs_reference() and not RLOO(kl_coef=0.0).needs_reference()
    with pytest.raises(ConfigError, match="group_size=1"):
        RLOO(group_size=1).check()
    with pytest.raises(ConfigError, match="clip_high"):
        RLOO(clip_high=0.0).check()


def test_advantages_by_hand(sampled):
    groups = RLOO(kl_coef=0.0).credit(sampled(SCORES), RNG)
    np.testing.assert_allclose(groups[0].values["advantage"], [1, -0.5, -0.5])
    np.testing.assert_allclose(groups[1].values["advantage"], [-1, 0.5, 0.5])
    assert not groups[2].values["advantage"].any()
    assert len(RLOO(max_draws=2).credit(sampled(SCORES), RNG)) == 2
    assert RLOO(max_draws=2).credit(sampled(SCORES[2:]), RNG) == []


def test_the_kl_of_a_completion_is_taken_off_its_reward(sampled):
    groups = sampled(SCORES)
    rewards = [
        group.values["score"][i]
        - 0.3 * float((group.segments[leaf].values["old_logps"] - group.segments[leaf].values["ref_logps"]).sum())
        for group in groups
        for i, leaf in enumerate(group.leaves)
    ]
    credited = RLOO(kl_coef=0.3).credit(groups, RNG)
    assert credited[1].values["advantage"][0] == pytest.approx(rewards[3] - (rewards[4] + rewards[5]) / 2, abs=1e-5)


def test_normalised_advantages_have_mean_zero_and_deviation_one_over_the_round(sampled):
    groups = RLOO(normalize_advantages=True).credit(sampled(SCORES), RNG)
    advantages = np.concatenate([g.values["advantage"] for g in groups])
    assert advantages.mean() == pytest.approx(0, abs=1e-6) and advantages.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_on_policy_gradient_is_that_of_reinforce(sampled, on):
    method = RLOO()
    groups = method.credit(sampled(SCORES, drift=0.0), RNG)
    loss, gradients, metrics = on(method, groups)
    advantages = np.concatenate([g.values["advantage"] for g in groups])
    assert loss == pytest.approx(-advantages.mean(), abs=1e-6)
    for gradient, advantage in zip(gradients, advantages, strict=True):
        np.testing.assert_allclose(gradient, -advantage / 9, atol=1e-6)
    method.check_first({name: values.mean() for name, values in metrics.items()})


def test_cut_and_order_change_nothing(sampled, on):
    method, groups = RLOO(), sampled(SCORES)
    credited = method.credit(groups, RNG)
    whole, gradients, _ = on(method, credited)
    totals = method.totals(credited)
    parts = [
        on(method, [part], totals) for part in (credited[0].subset([1]), credited[0].subset([2, 0]), *credited[1:])
    ]
    assert sum(part[0] for part in parts) == pytest.approx(whole, abs=1e-6)
    permuted = on(method, method.credit([g.subset([2, 0, 1]) for g in groups], RNG))
    assert permuted[0] == pytest.approx(whole, abs=1e-6)
    np.testing.assert_allclose(permuted[1][0], gradients[2], atol=1e-6)
    np.testing.assert_allclose(parts[1][1][0], gradients[2], atol=1e-6)


def test_loss_and_gradients_equal_trl(sampled, tmp_path):
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    from guerdon.language.models import load_model

    causal, tokenizer = load_model("tiny:layers=2,width=32,heads=2")
    config = RLOOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=2, num_generations=2,
        max_completion_length=9, gradient_checkpointing=False, beta=0.0,
    )  # fmt: skip
    trainer = RLOOTrainer(
        causal, lambda completions, **_: [0.0] * len(completions), config, Dataset.from_dict({"prompt": ["a"] * 4}),
        processing_class=tokenizer,
    )  # fmt: skip
    method, groups = RLOO(), sampled(SCORES, seed=3, longest=9)
    segments = [s for g in groups for s in g.segments[1:]]
    with torch.no_grad():
        logps = GroupModel(trainer.model)(pack(groups)).logps.split([len(s) for s in segments])
    for i, (segment, near) in enumerate(zip(segments, logps, strict=True)):
        segment.values["old_logps"] = near.numpy() + np.float32(0.1 * (i % 5 - 2))
    groups = method.credit(groups, RNG)
    segments = [s for g in groups for s in g.segments[1:]]

    def right(arrays):
        return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(a) for a in arrays], batch_first=True)

    trainer.model.set_attn_implementation("sdpa")
    prompts = torch.stack([torch.as_tensor(g.segments[0].tokens) for g in groups for _ in g.leaves])
    theirs = trainer._compute_loss(
        trainer.model.eval(),
        {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": right([s.tokens for s in segments]),
            "completion_mask": right([np.ones(len(s), dtype=np.int64) for s in segments]),
            "advantages": torch.tensor(np.concatenate([g.values["advantage"] for g in groups])),
            "old_logps": torch.tensor([s.values["old_logps"].sum() for s in segments]),
        },
    )
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    model, batch = GroupModel(trainer.model), pack(groups, totals=method.totals(groups))
    ours, metrics = method.loss(model(batch, method.wants), batch)
    ours.backward()
    assert 0 < metrics["policy/clip_share"].mean() < 1
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)
