from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError, DataError, InvariantError
from guerdon.language.groups import Group, Segment
from guerdon.language.packing import pack
from guerdon.methods.policy_gradient import (
    check_clipping,
    check_first_ratio,
    cispo_surrogate,
    clipped_surrogate,
    completion_weights,
    finished,
    gae,
    group_advantages,
    group_scores,
    informative,
    kl_estimate,
    leave_one_out,
    overlong_penalty,
    path_kl,
    policy_metrics,
    whiten,
)


def test_group_advantages_by_hand():
    rewards = np.array([1.0, 0, 0, 0])
    np.testing.assert_allclose(group_advantages(rewards, "std", 0), [1.5, -0.5, -0.5, -0.5])
    np.testing.assert_allclose(group_advantages(rewards, "population-std", 0), np.array([3, -1, -1, -1]) / 3**0.5)
    np.testing.assert_allclose(group_advantages(rewards, "none", 0), [0.75, -0.25, -0.25, -0.25])
    std = torch.tensor(rewards).std()
    np.testing.assert_allclose(group_advantages(rewards, "std"), (rewards - 0.25) / (std.item() + 1e-4))


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [2.0]])
@pytest.mark.parametrize("scale", ["std", "population-std", "none"])
def test_a_group_that_says_nothing_has_no_advantages(rewards, scale):
    assert group_advantages(np.array(rewards), scale).tolist() == [0.0] * len(rewards)


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = np.random.default_rng(0).normal(size=5)
    others = [rewards[i] - np.delete(rewards, i).mean() for i in range(5)]
    np.testing.assert_allclose(leave_one_out(rewards), others)
    assert leave_one_out(np.array([3.0])).tolist() == [0.0]


def test_overlong_penalty_falls_over_the_buffer():
    lengths = np.array([50, 80, 90, 100, 120])
    np.testing.assert_allclose(overlong_penalty(lengths, 100, 0.2), [0, 0, -0.5, -1, -1])


def test_gae_is_the_discounted_sum_of_temporal_differences():
    rng = np.random.default_rng(0)
    lengths, gamma, lam = [4, 1, 3], 0.9, 0.8
    mask = np.arange(4) < np.array(lengths)[:, None]
    rewards, values = rng.normal(size=(3, 4)) * mask, rng.normal(size=(3, 4)) * mask
    found = gae(rewards, values, gamma, lam)
    for row, length in enumerate(lengths):
        v = [*values[row, :length], 0.0]
        delta = [rewards[row, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
            assert found[row, t] == pytest.approx(expected)
    assert not found[~mask].any()


def test_gae_at_lambda_one_is_return_minus_value_and_at_zero_the_td_error():
    rewards, values = np.array([[1.0, 2.0, 3.0]]), np.array([[0.5, 1.5, 2.5]])
    np.testing.assert_allclose(gae(rewards, values, 1.0, 1.0), [[5.5, 3.5, 0.5]])
    np.testing.assert_allclose(gae(rewards, values, 1.0, 0.0), [[2.0, 3.0, 0.5]])


def test_whiten_uses_bessels_variance():
    white = whiten(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(white, [-1, 0, 1], rtol=1e-7)
    assert np.isfinite(whiten(np.array([2.0]))).all()


def softmax_pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    return logits, logits.log_softmax(0), torch.randn(5, dtype=torch.float64).log_softmax(0)


def test_kl_estimates_as_values():
    _, logp, ref = softmax_pair()
    kl = (logp.exp() * (logp - ref)).sum()
    k2, k3 = kl_estimate(logp, ref, "k2"), kl_estimate(logp, ref, "k3")
    torch.testing.assert_close((logp.exp() * k3).sum(), kl)
    assert (k2 >= 0).all() and (k3 >= 0).all()
    torch.testing.assert_close(k2, 0.5 * (logp - ref) ** 2)
    near = ref + 1e-3 * torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(kl_estimate(near, ref, "k2"), kl_estimate(near, ref, "k3"), rtol=2e-3, atol=1e-12)


def test_kl_estimates_as_losses_have_the_gradients_that_are_documented():
    """Expectations over all five actions, exactly; samples are of the policy, so their weights carry no gradient."""
    logits, logp, ref = softmax_pair()

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    weight = logp.exp().detach()
    reverse = gradient((logp.exp() * (logp - ref)).sum())
    forward = gradient((ref.exp() * (ref - logp)).sum())
    torch.testing.assert_close(gradient((weight * kl_estimate(logp, ref, "k2")).sum()), reverse)
    torch.testing.assert_close(gradient((weight * kl_estimate(logp, ref, "k3")).sum()), forward)
    torch.testing.assert_close(gradient((weight * (logp - ref)).sum()), torch.zeros(5, dtype=torch.float64))
    old = torch.randn(5, dtype=torch.float64).log_softmax(0)
    corrected = (logp - old).exp() * kl_estimate(logp, ref, "k3")
    torch.testing.assert_close(gradient((old.exp() * corrected).sum()), reverse)
    in_reward = gradient((weight * -(logp - ref).detach() * logp).sum())
    torch.testing.assert_close(in_reward, -reverse)
    assert (reverse - forward).abs().max() > 0.05


def test_path_kl_sums_what_the_sampler_gained_on_the_reference():
    group = Group.of([1, 2], [[3, 4], [5]])
    group.segments[1].values = {"old_logps": np.array([-1.0, -2.0]), "ref_logps": np.array([-1.5, -1.0])}
    group.segments[2].values = {"old_logps": np.array([-0.5]), "ref_logps": np.array([-2.0])}
    np.testing.assert_allclose(path_kl(group), [0.5 - 1.0, 1.5])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "is_cut"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.5, 2.0, -2.56, 0.0, True),  # too likely already
        (1.5, -2.0, 3.0, 2.0, False),  # a bad answer may always be made less likely
        (0.5, 2.0, -1.0, -2.0, False),
        (0.5, -2.0, 1.6, 0.0, True),
        (0.9, -1.0, 0.9, 1.0, False),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, gradient, is_cut):
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    value, cut = clipped_surrogate(r, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.28)
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert r.grad.item() == pytest.approx(gradient)
    assert bool(cut) is is_cut


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "is_cut"),
    [
        (4.0, -2.0, 6.0, 0.0, True),  # three times as likely is enough to pull
        (2.9, -2.0, 5.8, 2.0, False),
        (4.0, 2.0, -2.56, 0.0, True),  # good answers know only the range
        (0.5, -2.0, 1.6, 0.0, True),
    ],
)
def test_dual_clipping_by_hand(ratio, advantage, loss, gradient, is_cut):
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    value, cut = clipped_surrogate(r, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.28, dual=3.0)
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert r.grad.item() == pytest.approx(gradient)
    assert bool(cut) is is_cut


@pytest.mark.parametrize(("ratio", "weight"), [(1.0, 1.0), (1.2, 1.2), (2.0, 1.28), (0.5, 0.8)])
def test_cispo_clips_the_weight_and_not_the_gradient(ratio, weight):
    old = torch.tensor([-2.0], dtype=torch.float64)
    logps = (old + np.log(ratio)).requires_grad_()
    value, cut = cispo_surrogate(logps, logps - old, torch.tensor([-3.0], dtype=torch.float64), 0.2, 0.28)
    value.sum().backward()
    assert logps.grad.item() == pytest.approx(3 * weight)
    assert bool(cut) is (weight != ratio)


def test_clipped_surrogate_takes_weights_into_the_advantage():
    torch.manual_seed(0)
    ratio, advantage, weight = torch.rand(50) * 2, torch.randn(50), torch.rand(50)
    apart, cut = clipped_surrogate(ratio, advantage, 0.2, 0.2)
    together, cut_too = clipped_surrogate(ratio, weight * advantage, 0.2, 0.2)
    torch.testing.assert_close(weight * apart, together)
    assert torch.equal(cut, cut_too)


def test_completion_weights_are_the_three_averages():
    groups = [Group.of([1], [[2, 3, 4], [5]]), Group.of([1], [[6, 7], [8, 9, 10, 11]])]
    batch = pack(groups, totals={"tokens": 10, "completions": 4})
    x = torch.arange(10.0)
    parts = x.split([3, 1, 2, 4])
    for how, expected in {
        "token": x.mean(),
        "sequence": torch.stack([p.mean() for p in parts]).mean(),
        "constant": x.sum() / (4 * 7),
    }.items():
        weights = completion_weights(batch, how, 7)
        torch.testing.assert_close((batch.spread(weights) * x).sum(), expected)


def test_what_groups_say():
    group = Group.of([1], [[2], [3]], values={"score": np.array([1.0, 0.0])}, key="q7")
    assert informative(group) and finished(group).tolist() == [True, True]
    group.values = {"score": np.array([1.0, 1.0]), "finished": np.array([1.0, 0.0])}
    assert not informative(group) and finished(group).tolist() == [True, False]
    with pytest.raises(DataError, match="'q7' has completions without scores"):
        group_scores(Group.of([1], [[2]], key="q7"))


def test_path_kl_follows_the_tree():
    root = Segment(np.array([1]), np.array([False]))
    shared = Segment(np.array([2]), np.array([True]), 0, {"old_logps": np.array([-1.0]), "ref_logps": np.array([-2.0])})
    ends = [
        Segment(np.array([3]), np.array([True]), 1, {"old_logps": np.array([-1.0]), "ref_logps": np.array([r])})
        for r in (-1.5, -0.5)
    ]
    np.testing.assert_allclose(path_kl(Group([root, shared, *ends], [2, 3])), [1.5, 0.5])


def test_metrics_are_values_without_gradients():
    log_ratio = torch.tensor([0.0, 0.1, -0.1], requires_grad=True)
    metrics = policy_metrics(log_ratio, torch.tensor([False, True, False]), kl=log_ratio**2)
    assert set(metrics) == {"policy/ratio", "policy/ratio_error", "policy/clip_share", "policy/kl"}
    assert not any(m.requires_grad for m in metrics.values())
    assert metrics["policy/ratio_error"].mean().item() == pytest.approx((np.expm1(0.1) - np.expm1(-0.1)) / 3)
    assert metrics["policy/clip_share"].mean().item() == pytest.approx(1 / 3)


def test_the_first_update_starts_from_the_policy_that_was_sampled():
    check_first_ratio({"policy/ratio_error": 1e-3, "policy/kl": 0.0})
    for error in (0.2, float("nan")):
        with pytest.raises(InvariantError, match="another temperature"):
            check_first_ratio({"policy/ratio_error": error})
    with pytest.raises(InvariantError, match="reference log-probs are wrong"):
        check_first_ratio({"policy/ratio_error": 0.0, "policy/kl": -0.1})


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (1.5, 0.2), (0.2, 0.0)])
def test_clipping_ranges_surround_one(low, high):
    with pytest.raises(ConfigError, match="clip_low"):
        check_clipping(low, high)
