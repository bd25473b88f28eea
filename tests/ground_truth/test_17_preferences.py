"""Tulu 3 (arXiv 2411.15124): length-normalised DPO, supervised fine-tuning by tokens, binarised ratings."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guerdon.language.forward import GroupModel, Outputs
from guerdon.language.groups import Group
from guerdon.language.packing import pack
from guerdon.methods.base import pairs_from_scores
from guerdon.methods.demonstrations.sft import SFT
from guerdon.methods.preferences.dpo import DPO, DPONorm, implicit_rewards, preference_loss


@pytest.mark.parametrize(("method", "margin", "loss"), [(DPONorm(), 1.25, 0.251929), (DPO(), 0.3, 0.554355)])
def test_1_dpo_norm_and_plain_dpo(method, margin, loss):
    group = Group.of([1], [[2] * 10, [3] * 20], values={"score": np.array([1, 0], dtype=np.float32)})
    [group] = method.credit([group], np.random.default_rng(0))
    batch = pack([group], totals=method.totals([group]))
    batch.token_values["ref_logps"] = torch.tensor([-22 / 10] * 10 + [-29 / 20] * 20)
    logps = torch.tensor([-20 / 10] * 10 + [-30 / 20] * 20)
    found, metrics = method.loss(Outputs(logps=logps), batch)
    assert metrics["preference/margin"].item() == pytest.approx(margin, abs=1e-5)
    assert found.item() == pytest.approx(loss, abs=1e-6)


def test_1_equal_lengths_make_dpo_norm_dpo_at_beta_over_length():
    logratios = torch.tensor([3.0, -2.0, 0.5, -7.0], dtype=torch.float64)
    lengths = torch.full((4,), 8.0, dtype=torch.float64)
    norm = implicit_rewards(logratios, lengths, "sigmoid_norm", beta=5.0)
    plain = implicit_rewards(logratios, lengths, "sigmoid", beta=5.0 / 8)
    torch.testing.assert_close(
        preference_loss(norm[:2], norm[2:], "sigmoid_norm", 5.0),
        preference_loss(plain[:2], plain[2:], "sigmoid", 5 / 8),
    )


def test_4_tokens_weigh_the_same_in_one_batch_and_in_two():
    groups = [Group.of([1, 2], [[3, 4, 5]]), Group.of([1], [[6, 7, 8, 9, 1, 2, 3, 4]])]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GroupModel(LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes)))
    method = SFT()

    def gradient(parts: list[list[Group]], totals: list[dict[str, float]]) -> torch.Tensor:
        model.zero_grad()
        for part, total in zip(parts, totals, strict=True):
            batch = pack(part, totals=total)
            method.loss(model(batch), batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    total = method.totals(groups)
    whole = gradient([groups], [total])
    split = gradient([[g] for g in groups], [total, total])
    torch.testing.assert_close(split, whole, atol=1e-7, rtol=1e-5)
    # The mean of each micro-batch's mean weighs tokens of short answers more.
    own = [{name: 2 * n for name, n in method.totals([g]).items()} for g in groups]
    of_means = gradient([[g] for g in groups], own)
    assert (of_means - whole).norm() > 0.05 * whole.norm()


def test_5_binarisation_takes_the_best_against_any_other():
    rng = np.random.default_rng(0)
    counts = Counter(pairs_from_scores(np.array([4.0, 2, 3, 1]), "best-random", rng)[0] for _ in range(3000))
    assert set(counts) == {(0, 1), (0, 2), (0, 3)}
    assert all(abs(n - 1000) < 120 for n in counts.values())  # four standard deviations are 103
    ties = [pairs_from_scores(np.array([2.0, 4, 4, 1]), "best-random", rng)[0] for _ in range(20)]
    assert {better for better, _ in ties} == {1} and {worse for _, worse in ties} == {0, 3}
