"""Error bars are judged by how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from guerdon.errors import ConfigError
from guerdon.evaluation.statistics import (
    Difference,
    bootstrap,
    holm,
    iqm,
    mean,
    needed,
    paired_difference,
    pass_at_k,
    probability_of_improvement,
    score_interval,
    t_cdf,
    t_quantile,
    wilson,
)


def binary_scores(rng, seeds, items, *, seed_effects, level=0.0, difficulty=None):
    """Right or wrong answers: logit = level + seed effect + item difficulty + luck of the seed on the item."""
    difficulty = rng.normal(0, 1.5, items) if difficulty is None else difficulty
    logits = level + rng.normal(0, seed_effects, (seeds, 1)) + difficulty + rng.normal(0, 0.7, (seeds, items))
    return (rng.random((seeds, items)) < 1 / (1 + np.exp(-logits))).astype(float)


def expected_score(level, seed_effects):
    points, weights = np.polynomial.hermite_e.hermegauss(101)
    spread = math.sqrt(seed_effects**2 + 1.5**2 + 0.7**2)
    return float((weights / (1 + np.exp(-(level + spread * points)))).sum() / weights.sum())


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("seed_effects", [0.1, 0.4])
def test_score_intervals_hold_as_often_as_they_say(seeds, seed_effects):
    rng = np.random.default_rng(seeds)
    truth, repeats = expected_score(0.0, seed_effects), 500
    for items in (50, 200):
        held = 0
        for _ in range(repeats):
            found = score_interval(binary_scores(rng, seeds, items, seed_effects=seed_effects), span=(0, 1))
            held += found.low <= truth <= found.high
        assert held / repeats >= 0.92


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_difference_intervals_hold_and_false_alarms_are_rare(seeds):
    rng = np.random.default_rng(seeds)
    truth = expected_score(0.5, 0.3) - expected_score(0.0, 0.3)
    held = alarms = 0
    repeats = 600
    for _ in range(repeats):
        difficulty = rng.normal(0, 1.5, 100)
        a, b, c = (
            binary_scores(rng, seeds, 100, seed_effects=0.3, level=level, difficulty=difficulty)
            for level in (0.5, 0.0, 0.0)
        )
        found = paired_difference(a, b, bounded=True)
        held += found.low <= truth <= found.high
        alarms += paired_difference(b, c, bounded=True).p <= 0.05
    assert held / repeats >= 0.92
    assert alarms / repeats <= 0.07


def test_percentile_bootstrap_alone_would_not_hold():
    """Why there is a t-quantile: seeds resampled with replacement hardly show a spread when there are two."""
    rng = np.random.default_rng(0)
    truth = expected_score(0.0, 0.6)
    plain = stretched = 0
    for _ in range(100):
        scores = binary_scores(rng, 2, 100, seed_effects=0.6)
        by_seed = scores.mean(1)
        low, high = np.percentile(by_seed[rng.integers(2, size=(500, 2))].mean(1), [2.5, 97.5])
        plain += low <= truth <= high
        found = bootstrap(scores, mean, resamples=500)
        stretched += found.low <= truth <= found.high
    assert plain < 70
    assert stretched >= 92


def test_intervals_at_all_or_nothing_do_not_collapse():
    nothing = score_interval(np.zeros((2, 100)), span=(0, 1))
    assert nothing.low == 0 and nothing.high == pytest.approx(wilson(0, 100).high, abs=0.002)
    everything = score_interval(np.ones((2, 100)), span=(0, 1))
    assert everything.high == 1 and everything.low == pytest.approx(wilson(100, 100).low, abs=0.002)
    apart = paired_difference(np.ones((2, 100)), np.zeros((1, 100)), bounded=True)
    assert apart.low > 0.9 and apart.p < 1e-6
    alike = paired_difference(np.ones((2, 100)), np.ones((2, 100)), bounded=True)
    assert alike.p == 1 and alike.low < 0 < alike.high


def test_one_seed_gives_the_paired_t_interval_over_items():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, (1, 40)), rng.normal(0, 1, (1, 40))
    found = paired_difference(a, b)
    expected = stats.ttest_rel(a[0], b[0])
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-3)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-4)
    assert found.trained == 0 and found.seed_variance == 0


def test_many_alike_items_give_welchs_t_interval_over_seeds():
    """With no variance over items the seeds are all there is."""
    a, b = np.array([[0.5], [0.6], [0.8]]), np.array([[0.2], [0.25], [0.3]])
    items = np.ones((1, 50))
    found = paired_difference(a * items, b * items)
    expected = stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-3)
    paired = paired_difference(a * items, b * items, paired_seeds=True)
    assert paired.p == pytest.approx(stats.ttest_rel(a[:, 0], b[:, 0]).pvalue, rel=1e-3)


def test_pairing_over_items_removes_their_difficulty():
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0, 5, 100)
    a, b = (shift + difficulty + rng.normal(0, 0.1, (3, 100)) for shift in (0.1, 0.0))
    found = paired_difference(a, b)
    assert 0.05 < found.low < 0.1 < found.high < 0.15
    assert score_interval(a).high - score_interval(a).low > 1


def test_variance_components_are_found():
    rng = np.random.default_rng(2)
    shape = (200, 300)
    a = rng.normal(0, 0.5, (200, 1)) + rng.normal(0, 2, (1, 300)) + rng.normal(0, 1, shape)
    found = paired_difference(a, np.zeros((1, 300)))
    assert found.seed_variance == pytest.approx(0.25, rel=0.25)
    assert found.item_variance == pytest.approx(4, rel=0.25)
    assert found.rest_variance == pytest.approx(1, rel=0.05)


def test_needed_is_what_the_power_formula_says():
    only_items = Difference(0.1, -0.1, 0.3, 0.3, 2, 50, 2, 0.0, 1.0, 0.0)
    n = needed(only_items)
    expected = ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / 0.1) ** 2
    assert n.seeds is None
    assert n.items == pytest.approx(expected, rel=0.01)
    only_seeds = Difference(0.1, -0.1, 0.3, 0.3, 2, 50, 2, 0.02, 0.0, 0.0)
    n = needed(only_seeds)
    assert n.items is None
    # two groups with variance 0.01 each: what a two-sample t-test needs
    assert n.seeds == pytest.approx(16.7, abs=1)


def test_needed_numbers_reach_the_power_they_promise():
    rng = np.random.default_rng(3)

    def trial(seeds, items):
        difficulty = rng.normal(0, 1, items)
        noise = [rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 0.5, (seeds, items)) for _ in "ab"]
        own = [rng.normal(0, 0.2, items) for _ in "ab"]
        return paired_difference(0.1 + difficulty + own[0] + noise[0], difficulty + own[1] + noise[1])

    asked = needed(Difference(0.1, 0, 0.2, 0.3, 3, 100, 2, 2 * 0.01, 2 * 0.04, 2 * 0.25))
    assert asked.seeds is not None
    share = np.mean([trial(asked.seeds, 100).p <= 0.05 for _ in range(300)])
    assert 0.72 <= share <= 0.9


def test_needed_says_nothing_of_seeds_where_there_is_one():
    assert needed(Difference(0.1, -0.1, 0.3, 0.3, 1, 50, 0, 0.0, 1.0, 0.0)).seeds is None


def test_iqm():
    rng = np.random.default_rng(0)
    for n in (4, 8, 20):
        x = rng.normal(size=(7, n))
        np.testing.assert_allclose(iqm(x), stats.trim_mean(x, 0.25, axis=-1), rtol=1e-12)
    assert iqm(np.array([1.0, 3.0])) == pytest.approx(2.0)
    assert iqm(np.array([9.0, 0.0, 3.0])) == pytest.approx(0 / 6 + 2 * 3 / 3 + 9 / 6)
    assert iqm(np.array([0.0, 1.0, 2.0, 3.0, 100.0])) == pytest.approx((0.75 * 1 + 2 + 0.75 * 3) / 2.5)


def test_bootstrap_of_the_iqm_resists_a_failed_seed():
    scores = np.full((8, 50), 0.5)
    scores[0] = 0.0
    assert bootstrap(scores, iqm).value == 0.5
    assert bootstrap(scores, mean).value == pytest.approx(0.4375)
    assert bootstrap(scores, iqm, seed=4) == bootstrap(scores, iqm, seed=4)


def test_probability_of_improvement():
    a, b = np.repeat([[1.0], [2.0], [3.0]], 10, axis=1), np.repeat([[0.0], [2.0]], 10, axis=1)
    found = probability_of_improvement(a, b)
    assert found.value == pytest.approx((3 + 0.5 + 1) / 6)
    assert found.low <= found.value <= found.high
    assert probability_of_improvement(a, a).value == 0.5
    assert probability_of_improvement(a + 5, b) == probability_of_improvement(a + 9, b)


def test_pass_at_k_is_the_mean_over_all_subsets():
    from itertools import combinations

    n, k = 7, 3
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        exact = np.mean([any(right[i] for i in chosen) for chosen in combinations(range(n), k)])
        assert pass_at_k(n, c, k) == pytest.approx(exact)
    np.testing.assert_allclose(pass_at_k(10, np.array([0, 3, 10]), 1), [0, 0.3, 1])
    assert pass_at_k(10_000, 1, 5000) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="pass@8 needs at least 8 completions per item; there are 4"):
        pass_at_k(4, 2, 8)


def test_wilson():
    for successes, n in ((0, 10), (3, 10), (10, 10), (81, 263)):
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        found = wilson(successes, n)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize("df", [1, 1.4, 2, 5.5, 30, 1000, 1e7])
def test_students_distribution(df):
    for probability in (0.6, 0.8, 0.975, 0.9995):
        assert t_quantile(probability, df) == pytest.approx(stats.t.ppf(probability, df), rel=1e-4)
    for t in (-2.5, 0.3, 4.0):
        assert t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), abs=1e-5)


def test_one_item_has_the_variance_of_the_seeds():
    """Where a run gives one number, the interval is Student's over the seeds."""
    x = np.array([[1.0], [2.0], [4.0], [7.0]])
    found = score_interval(x)
    low, high = stats.t.interval(0.95, 3, loc=x.mean(), scale=x.std(ddof=1) / 2)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-5)
    assert paired_difference(x, 1.1 * x + 1, paired_seeds=False).p > 0.05
