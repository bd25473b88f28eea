from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError, DataError
from guerdon.methods.base import get_method
from guerdon.methods.verifiers.nft import NFT, nft_loss

SCORES = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
RNG = np.random.default_rng(0)


def test_name_and_published_settings():
    method = get_method("nft")()
    assert isinstance(method, NFT) and not method.needs_reference()
    assert (method.lr, method.weight_decay, method.max_grad_norm, method.epochs) == (1e-6, 0.1, 1.0, 1)
    assert (method.group_size, method.prompts_per_round, method.batch_size, method.rounds) == (16, 512, 32, 320)
    assert method.warmup * 320 * 16 == pytest.approx(10, abs=0.5)
    assert (method.clamp_negative, method.normalize, method.neg_weight, method.normalizer) == (1.0, 1, 1.0, 1000)


@pytest.mark.parametrize("options", [{"group_size": 1}, {"neg_weight": -0.5}, {"clamp_negative": 0.0}])
def test_contradictions_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        NFT(**options).check()


def test_pass_rate_is_that_of_all_answers_and_truncated_ones_are_wrong(sampled):
    groups = sampled(SCORES)
    groups[0].values["finished"] = np.array([0, 1, 1, 1], np.float32)
    groups[1].values["finished"] = np.array([1, 0, 1, 1], np.float32)
    (kept,) = NFT().credit(groups, RNG)
    assert kept.key == "prompt 0"
    assert kept.values["correct"].tolist() == [0, 0, 0, 1] and kept.values["pass_rate"].tolist() == [0.25] * 4
    assert kept.subset([3]).values["pass_rate"].tolist() == [0.25]


@pytest.mark.parametrize("score", [-1.0, 0.5, float("nan")])
def test_scores_that_are_not_binary_are_refused(sampled, score):
    with pytest.raises(DataError, match=r"prompt 'prompt 0'.*binary verifier"):
        NFT().credit(sampled([[1.0, score]]), RNG)


def test_weights_of_prompts():
    q = torch.tensor([0.25, 0.25])
    for normalize, weight in ((0, 1.0), (1, 0.75), (2, 3**0.5)):
        log_ratio = torch.tensor([0.1, -0.2], requires_grad=True)
        nft_loss(log_ratio, torch.tensor([1.0, 0.0]), q, normalize)[0].sum().backward()
        wrong = 0.25 * np.exp(-0.2) / (1 - 0.25 * np.exp(-0.2))
        np.testing.assert_allclose(log_ratio.grad, [-weight, weight * wrong], rtol=1e-5)


def test_negatives_count_as_much_as_asked():
    log_ratio = torch.tensor([0.1, -0.2], requires_grad=True)
    said = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.25])
    gradients = []
    for weight in (1.0, 0.5, 0.0):
        (gradient,) = torch.autograd.grad(nft_loss(log_ratio, *said, neg_weight=weight)[0].sum(), log_ratio)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], (gradients[0] + gradients[2]) / 2)
    assert gradients[2][1] == 0 and gradients[0][1] > 0 and gradients[0][0] == gradients[2][0] == -0.75


def test_clamping_right_answers_keeps_their_gradient_and_lifts_the_value():
    log_ratio = torch.tensor([0.5]).log().requires_grad_()
    losses, _ = nft_loss(log_ratio, torch.ones(1), torch.tensor([0.25]), clamp_positive=0.8)
    losses.sum().backward()
    assert losses.item() == pytest.approx(-0.75 * np.log(0.8))
    assert log_ratio.grad.item() == pytest.approx(-0.75 * 0.5 / 0.8)


def test_extreme_ratios_and_pass_rates_stay_finite():
    log_ratio = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    losses, clamped = nft_loss(log_ratio, torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(log_ratio.grad).all()
    assert losses[0].item() == pytest.approx(-0.98 * 10)  # held at +10, the pass rate at 0.02
    assert clamped.tolist() == [False, False, True, False]


def test_rejection_fine_tuning_is_likelihood_of_right_answers(sampled, on):
    method = NFT(neg_weight=0.0, normalize=0)
    groups = method.credit(sampled(SCORES), RNG)
    _, gradients, _ = on(method, groups)
    correct = np.concatenate([g.values["correct"] for g in groups])
    for gradient, right in zip(gradients, correct, strict=True):
        np.testing.assert_allclose(gradient, -right / (1000 * 8), rtol=1e-6)


def test_clipped_fallback_has_the_same_gradient_at_the_start_and_clips_later(sampled, on):
    for normalize in (0, 1, 2):
        smooth, clipped = NFT(normalize=normalize), NFT(normalize=normalize, neg_weight=-1)
        groups = smooth.credit(sampled(SCORES, drift=0.0), RNG)
        for a, b in zip(on(smooth, groups)[1], on(clipped, groups)[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    groups = smooth.credit(sampled(SCORES, drift=1.0), RNG)
    _, gradients, metrics = on(clipped, groups)
    cut = float(metrics["policy/clip_share"].mean())
    assert 0.1 < cut < 0.9 and np.mean(np.concatenate(gradients) == 0) == pytest.approx(cut)


def test_sequence_ratio_is_the_product_over_an_answer(sampled, on):
    method = NFT(ratio="sequence")
    groups = method.credit(sampled(SCORES), RNG)
    loss, gradients, _ = on(method, groups)
    expected, row = 0.0, 0
    for group in groups:
        q = group.values["pass_rate"][0]
        for i, leaf in enumerate(group.leaves):
            v = group.segments[leaf].values
            log_ratio = float((v["new_logps"] - v["old_logps"]).sum())
            odds = (1 - q * np.exp(log_ratio)) / (1 - q)
            right = group.values["correct"][i]
            expected -= (1 - q) * (log_ratio if right else np.log(max(odds, 1.0))) / 8
            slope = -(1 - q) if right else q * np.exp(log_ratio) / max(odds, 1.0)
            np.testing.assert_allclose(gradients[row], slope / 8, rtol=1e-4)
            row += 1
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_cut_and_order_change_nothing(sampled, on, ratio):
    method, groups = NFT(ratio=ratio), sampled(SCORES)
    credited = method.credit(groups, RNG)
    whole, gradients, _ = on(method, credited)
    totals = method.totals(credited)
    parts = [on(method, [p], totals) for p in (credited[0].subset([1]), credited[0].subset([3, 0, 2]), credited[1])]
    assert sum(part[0] for part in parts) == pytest.approx(whole, rel=1e-4)
    np.testing.assert_allclose(parts[1][1][0], gradients[3], atol=1e-6)
    permuted = on(method, method.credit([g.subset([2, 0, 3, 1]) for g in groups], RNG))
    assert permuted[0] == pytest.approx(whole, rel=1e-4)
    np.testing.assert_allclose(permuted[1][0], gradients[2], atol=1e-6)


def test_length_does_not_weigh(sampled, on):
    """Twice the constant, half the gradient; a longer answer has the same gradient per token."""
    method = NFT()
    groups = method.credit(sampled(SCORES, drift=0.0), RNG)
    _, gradients, metrics = on(method, groups)
    _, halved, _ = on(replace(method, normalizer=2000.0), groups)
    assert len({len(g) for g in gradients}) > 1
    for gradient, half, right in zip(gradients[:4], halved[:4], groups[0].values["correct"], strict=True):
        np.testing.assert_allclose(gradient, (-0.5 if right else 0.5) / 8000, rtol=1e-5)
        np.testing.assert_allclose(half, gradient / 2, rtol=1e-5)
    assert metrics["policy/pass_rate"].mean() == pytest.approx(0.375)
    method.check_first({name: values.mean() for name, values in metrics.items()})
