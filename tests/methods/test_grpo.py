from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError
from guerdon.language.forward import GroupModel
from guerdon.language.packing import pack
from guerdon.methods.base import get_method
from guerdon.methods.policy_gradient import group_advantages
from guerdon.methods.verifiers.grpo import DAPO, GRPO, DrGRPO

SCORES = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
METHODS = [
    GRPO(),
    GRPO(kl="k2", entropy_coef=0.01, scale="population-std"),
    GRPO(ratio="sequence", kl="k3-corrected"),
    GRPO(kl="k1", aggregate="token"),
    DrGRPO(max_new_tokens=7),
    DAPO(max_draws=1, max_new_tokens=7),
]
RNG = np.random.default_rng(0)


def test_names_and_their_defaults():
    assert get_method("grpo") is GRPO and get_method("dr-grpo") is DrGRPO and get_method("dapo") is DAPO
    assert (GRPO().scale, GRPO().aggregate, GRPO().kl_coef, GRPO().kl) == ("std", "sequence", 0.04, "k3")
    assert (DrGRPO().scale, DrGRPO().aggregate, DrGRPO().kl_coef) == ("none", "constant", 0)
    assert (DAPO().clip_high, DAPO().aggregate, DAPO().kl_coef, DAPO().max_draws) == (0.28, "token", 0, 10)
    assert GRPO().needs_reference() and not DrGRPO().needs_reference()


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 1},
        {"clip_low": 0.0},
        {"clip_high": -1.0},
        {"truncated_buffer": 0.0},
        {"dual_clip": 1.1},
        {"sampler_cap": -1.0},
        {"surrogate": "cispo", "ratio": "sequence"},
        {"surrogate": "cispo", "dual_clip": 3.0},
    ],
)
def test_contradictions_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        GRPO(**options).check()


def test_on_policy_loss_and_gradient_by_hand(sampled, on):
    """Rewards (1, 0, 0, 0), equal policies: gradient -A / (length * 4) on every token, loss -mean A = 0."""
    groups = sampled([[1.0, 0.0, 0.0, 0.0]], drift=0.0)
    method = GRPO(kl_coef=0.0, advantage_eps=0.0)
    groups = method.credit(groups, RNG)
    loss, gradients, metrics = on(method, groups)
    assert loss == pytest.approx(0, abs=1e-6)
    for gradient, advantage in zip(gradients, [1.5, -0.5, -0.5, -0.5], strict=True):
        np.testing.assert_allclose(gradient, -advantage / (4 * len(gradient)), rtol=1e-5)
    method.check_first({name: values.mean() for name, values in metrics.items()})
    assert metrics["policy/clip_share"].sum() == 0


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_cut_into_micro_batches_changes_nothing(method, sampled, on):
    groups = method.credit(sampled(SCORES), RNG)
    totals = method.totals(groups)
    whole, gradients, _ = on(method, groups)
    parts = [groups[0].subset([2]), groups[0].subset([0, 3, 1]), groups[1], groups[2]]
    losses, pieces = zip(*(on(method, [part], totals)[:2] for part in parts), strict=True)
    assert sum(losses) == pytest.approx(whole, abs=1e-6)
    found = [pieces[1][0], pieces[1][2], pieces[0][0], pieces[1][1], *pieces[2], *pieces[3]]
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_order_of_completions_means_nothing(method, sampled, on):
    order = [2, 0, 3, 1]
    groups = sampled(SCORES)
    first, gradients, _ = on(method, method.credit(groups, RNG))
    second, permuted, _ = on(method, method.credit([g.subset(order) for g in groups], RNG))
    assert first == pytest.approx(second, abs=1e-6)
    for g in range(len(SCORES)):
        for new, old in enumerate(order):
            np.testing.assert_allclose(permuted[4 * g + new], gradients[4 * g + old], atol=1e-6)


def test_equal_scores_stay_in_the_averages_unless_others_are_drawn(sampled):
    kept = GRPO().credit(sampled(SCORES), RNG)
    assert len(kept) == 3 and not kept[2].values["advantage"].any()
    assert [g.key for g in GRPO(max_draws=2).credit(sampled(SCORES), RNG)] == ["prompt 0", "prompt 1"]


def test_completions_that_were_cut_off(sampled):
    groups = sampled([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0]])
    groups[0].values["finished"] = np.array([1, 0, 1, 1], np.float32)
    groups[1].values["finished"] = np.zeros(2, np.float32)
    keep, mask = GRPO().credit(groups, RNG), GRPO(truncated="mask").credit(groups, RNG)
    assert [len(g) for g in keep] == [4, 2] and [len(g) for g in mask] == [3]
    np.testing.assert_array_equal(mask[0].values["advantage"], keep[0].values["advantage"][[0, 2, 3]])
    method = GRPO(truncated="penalty", max_new_tokens=5, truncated_buffer=0.4, scale="none")
    for before, after in zip(groups, method.credit(groups, RNG), strict=True):
        rewards = before.values["score"] - np.clip((before.lengths() - 3) / 2, 0, 1)
        np.testing.assert_allclose(after.values["advantage"], rewards - rewards.mean(), atol=1e-6)


def test_k1_is_taken_off_the_reward(sampled, on):
    groups = sampled(SCORES)
    method = GRPO(kl="k1", kl_coef=0.5, scale="none")
    credited = method.credit(groups, RNG)
    gains = [float((s.values["old_logps"] - s.values["ref_logps"]).sum()) for s in groups[0].segments[1:]]
    rewards = groups[0].values["score"] - 0.5 * np.array(gains)
    np.testing.assert_allclose(credited[0].values["advantage"], rewards - rewards.mean(), atol=1e-5)
    without = replace(method, kl_coef=0.0)
    assert on(method, credited)[0] == pytest.approx(on(without, credited)[0])


def test_entropy_is_rewarded_per_token(sampled, on):
    groups = GRPO().credit(sampled(SCORES), RNG)
    totals = GRPO().totals(groups)
    plain, bonus = on(GRPO(kl_coef=0.0), groups), on(GRPO(kl_coef=0.0, entropy_coef=0.1), groups)
    mean = float(bonus[2]["policy/entropy"].mean())
    assert bonus[0] == pytest.approx(plain[0] - 0.1 * mean, abs=1e-6)
    for a, b in zip(plain[1], bonus[1], strict=True):
        np.testing.assert_allclose(b, a - 0.1 / totals["tokens"], atol=1e-7)


class TestEqualToTRL:
    """Loss and gradients of TRL's own trainer object on the same tiny model and the same samples."""

    @pytest.fixture(scope="class")
    def trainer(self, tmp_path_factory):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        from guerdon.language.models import load_model

        model, tokenizer = load_model("tiny:layers=2,width=32,heads=2")
        directory = str(tmp_path_factory.mktemp("trl"))
        config = GRPOConfig(
            directory, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=4, num_generations=4,
            max_completion_length=9, gradient_checkpointing=False,
        )  # fmt: skip
        prompts = Dataset.from_dict({"prompt": ["a"] * 4})
        return GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), config, prompts,
                           processing_class=tokenizer)  # fmt: skip

    @pytest.mark.parametrize(
        ("loss_type", "level", "method"),
        [
            ("grpo", "token", GRPO(kl_coef=0.0)),
            ("grpo", "token", GRPO(kl_coef=0.1)),
            ("grpo", "token", GRPO(kl_coef=0.1, kl="k3-corrected")),
            ("dr_grpo", "token", DrGRPO(max_new_tokens=9)),
            ("dr_grpo", "token", DrGRPO(max_new_tokens=9, kl_coef=0.1)),
            ("dapo", "token", DAPO(max_draws=1, truncated="keep")),
            ("dapo", "token", DAPO(max_draws=1, truncated="keep", kl_coef=0.1, kl="k3-corrected")),
            ("bnpo", "token", GRPO(aggregate="token", kl_coef=0.1)),
            ("grpo", "sequence", GRPO(ratio="sequence", clip_low=0.05, clip_high=0.05, kl_coef=0.1)),
            ("grpo", "token", GRPO(dual_clip=1.25, kl_coef=0.0)),
            ("dapo", "token", DAPO(max_draws=1, truncated="keep", sampler_cap=1.1)),
            ("grpo", "sequence", GRPO(ratio="sequence", clip_low=0.05, clip_high=0.05, kl_coef=0.1, sampler_cap=1.05)),
            ("cispo", "token", GRPO(surrogate="cispo", aggregate="token", clip_low=1.0, kl_coef=0.1)),
        ],
    )
    def test_loss_and_gradients(self, trainer, sampled, loss_type, level, method):
        trainer.loss_type, trainer.importance_sampling_level, trainer.beta = loss_type, level, method.kl_coef
        trainer.args.use_bias_correction_kl = method.kl == "k3-corrected"
        trainer.epsilon_low, trainer.epsilon_high = method.clip_low, method.clip_high + (loss_type == "cispo")
        trainer.args.delta = method.dual_clip or None
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = method.sampler_cap > 0
        model = GroupModel(trainer.model)
        groups = method.credit(at_the_model(model, sampled(SCORES, seed=3, longest=9)), RNG)

        trainer.model.zero_grad()
        model.model.set_attn_implementation("sdpa")
        theirs = trainer._compute_loss(trainer.model.eval(), trl_inputs(groups, method))
        theirs.backward()
        expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

        trainer.model.zero_grad()
        model = GroupModel(trainer.model)
        batch = pack(groups, totals=method.totals(groups))
        ours, metrics = method.loss(model(batch, method.wants), batch)
        ours.backward()
        assert 0.05 < metrics["policy/clip_share"].mean() < 0.9
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def at_the_model(model, groups):
    """Old and reference log-probs around the model's own, so that ratios straddle the clipping range."""
    batch = pack(groups)
    with torch.no_grad():
        logps = iter(model(batch).logps.split([len(s) for g in groups for s in g.segments[1:]]))
    for group in groups:
        for segment in group.segments[1:]:
            near = next(logps).numpy()
            for name in ("old_logps", "ref_logps", "sampler_logps"):
                noise = np.random.default_rng([*segment.tokens, *name.encode()]).normal(size=len(near))
                segment.values[name] = (near + 0.2 * noise).astype(np.float32)
    return groups


def trl_inputs(groups, method):
    """The same groups as TRL holds them: prompts padded left, completions padded right, advantages by its formula."""
    rows = [(g, leaf) for g in groups for leaf in g.leaves]
    segments = [g.segments[leaf] for g, leaf in rows]

    def right(arrays):
        return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(a) for a in arrays], batch_first=True)

    rewards = torch.tensor([g.values["score"].tolist() for g in groups])
    advantages = rewards - rewards.mean(1, keepdim=True)
    if method.scale == "std":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    gap = right([s.values["old_logps"] - s.values["sampler_logps"] for s in segments])
    if method.ratio == "sequence":
        gap = (gap.sum(1) / torch.tensor([len(s) for s in segments]))[:, None]
    return {
        "importance_sampling_ratio": gap.exp().clamp(max=method.sampler_cap),
        "prompt_ids": torch.stack([torch.as_tensor(g.segments[0].tokens) for g, _ in rows]),
        "prompt_mask": torch.ones(len(rows), len(rows[0][0].segments[0]), dtype=torch.long),
        "completion_ids": right([s.tokens for s in segments]),
        "completion_mask": right([np.ones(len(s), dtype=np.int64) for s in segments]),
        "advantages": advantages.flatten(),
        "old_per_token_logps": right([s.values["old_logps"] for s in segments]),
        "ref_per_token_logps": right([s.values["ref_logps"] for s in segments]),
        "num_items_in_batch": torch.tensor(sum(len(s) for s in segments)),
    }


def test_an_uninformative_batch_moves_nothing_without_a_reference(sampled, on):
    groups = GRPO().credit(sampled([[1.0, 1.0], [0.0, 0.0]]), RNG)
    loss, gradients, _ = on(GRPO(kl_coef=0.0), groups)
    assert loss == 0 and not any(g.any() for g in gradients)


def test_whole_completion_ratios_agree_with_token_ratios_on_one_token(sampled, on):
    groups = sampled(SCORES, longest=1)
    a, b = GRPO(ratio="token"), GRPO(ratio="sequence")
    credited = a.credit(groups, RNG)
    assert on(a, credited)[0] == pytest.approx(on(b, credited)[0], abs=1e-6)
    for x, y in zip(on(a, credited)[1], on(b, credited)[1], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_on_policy_gradient_of_a_model_is_that_of_reinforce(sampled):
    from guerdon.language.models import load_model

    model = GroupModel(load_model("tiny:layers=1,width=32,heads=2")[0])
    method = DrGRPO(max_new_tokens=6)
    groups = sampled(SCORES)
    batch = pack(groups)
    with torch.no_grad():
        logps = model(batch).logps.split([len(s) for g in groups for s in g.segments[1:]])
    for segment, old in zip((s for g in groups for s in g.segments[1:]), logps, strict=True):
        segment.values["old_logps"] = old.numpy()
    groups = method.credit(groups, RNG)
    batch = pack(groups, totals=method.totals(groups))
    outputs = model(batch, method.wants)
    loss, metrics = method.loss(outputs, batch)
    method.check_first({name: values.mean() for name, values in metrics.items()})
    parameters = list(model.parameters())
    ours = torch.autograd.grad(loss, parameters, retain_graph=True)
    advantage = np.concatenate([group_advantages(g.values["score"], "none") for g in groups])
    reinforce = -(torch.tensor(advantage).float() * batch.per_completion(outputs.logps)).sum() / (12 * 6)
    for a, b in zip(ours, torch.autograd.grad(reinforce, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
