"""Sheet of RIQL (arXiv 2310.12955): what the exact tabular operators say of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from guerdon.exact.fixed_points import advantage_weighted, huber_location, in_sample_backup
from guerdon.exact.robust_grid import LEARNERS, robust_grid_scores
from guerdon.exact.samples import Samples


def one_pair(rewards: np.ndarray) -> Samples:
    """Transitions of one state with one action that end at once with these rewards."""
    rewards = np.asarray(rewards, dtype=float)[None, None]
    ones = np.ones(rewards.shape, dtype=bool)
    return Samples(rewards, np.zeros(rewards.shape, dtype=int), ones, ones)


@pytest.mark.parametrize(
    ("critics", "alpha", "expected"),
    [
        ([1, 2, 4, 8, 16], 0.0, 1),
        ([1, 2, 4, 8, 16], 0.1, 1.4),
        ([1, 2, 4, 8, 16], 0.25, 2),
        ([1, 2, 4, 8, 16], 0.5, 4),
        ([1, 2, 4], 0.1, 1.2),
        ([1, 2, 4], 0.25, 1.5),
        ([1, 2], 0.0, 1),
    ],
)
def test_2_quantile_over_critics(critics, alpha, expected):
    replicates = np.eye(len(critics))[:, None, None]  # critic k sees the k-th transition alone
    found = in_sample_backup(one_pair(critics), np.zeros(1), 0.9, alpha=alpha, replicates=replicates)
    assert found.critics.ravel().tolist() == critics
    assert [found.q.item(), found.values.item()] == pytest.approx([expected, expected])


@pytest.mark.parametrize(("delta", "expected"), [(math.inf, -2), (4, -0.71429), (1, 0.57143), (0.1, 0.95714)])
def test_3_location_of_seven_and_three_targets(delta, expected):
    targets = np.array([1.0] * 7 + [-9.0] * 3)
    assert huber_location(targets, delta, np.ones(10)) == pytest.approx(expected, abs=5e-6)
    q = in_sample_backup(one_pair(targets), np.zeros(1), 0.9, delta=delta).q.item()
    assert q == pytest.approx(expected, abs=5e-6)


def test_4_wide_threshold_two_critics_and_their_minimum_are_iql():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=9) * 5
    replicates = rng.integers(1, 3, size=(2, 1, 1, 9)).astype(float)
    wide = in_sample_backup(one_pair(targets), np.zeros(1), 0.9, delta=1e6, alpha=0.0, replicates=replicates)
    means = (replicates * targets).sum(-1) / replicates.sum(-1)
    np.testing.assert_allclose(wide.critics, means)
    assert wide.q.item() == pytest.approx(means.min())


def test_5_advantage_weights():
    advantages = np.array([-1, 0, 0.5, 1, 2])
    weights = advantage_weighted(np.ones(5), advantages)
    np.testing.assert_allclose(weights / weights[1], [0.04979, 1, 4.48169, 20.08554, 100], atol=5e-6)


def test_laptop_claim_on_two_seeds_of_each_setting():
    """Eight seeds and more belong to the claim; two show its direction with a wide margin."""
    learners = {name: LEARNERS[name] for name in ("iql", "riql")}
    for corruption in ("dynamics", "reward"):
        scores = robust_grid_scores(corruption, 20, [0, 1], learners)
        assert scores["riql"].mean() > scores["iql"].mean() + 0.2
    clean = robust_grid_scores("none", 5, [0, 1], learners)
    assert clean["riql"].mean() > clean["iql"].mean() - 0.05 and clean["iql"].min() > 0.95
    worst = robust_grid_scores("worst-state", 20, [0, 1], learners)
    assert min(worst["iql"].min(), worst["riql"].min()) > 0.95
