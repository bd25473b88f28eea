from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from guerdon.errors import DataError
from guerdon.exact.fixed_points import (
    advantage_weighted,
    expectile,
    huber_location,
    in_sample_backup,
    in_sample_fixed_point,
)
from guerdon.exact.mdp import evaluate, policy_iteration, uniform
from guerdon.exact.robust_grid import LEARNERS, corrupted, robust_grid, robust_grid_scores
from guerdon.exact.samples import Samples, bootstrap, sample
from guerdon.exact.worlds import chain, gridworld, random_mdp

RNG = np.random.default_rng(0)


# Expectile and location.


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.7, 0.9, 0.99])
def test_expectile_of_two_points_is_a_weighted_mean(tau):
    np.testing.assert_allclose(expectile(np.array([[3.0, -1.0]]), tau, np.ones(2)), [4 * tau - 1])
    np.testing.assert_allclose(  # weights 1 and 3: tau * 1 * (3 - v) = (1 - tau) * 3 * (v + 1)
        expectile(np.array([3.0, -1.0]), tau, np.array([1.0, 3.0])), (3 * tau - 3 * (1 - tau)) / (tau + 3 * (1 - tau))
    )


@pytest.mark.parametrize("tau", [0.05, 0.4, 0.5, 0.7, 0.95])
def test_expectile_has_no_gradient_and_ignores_what_has_no_weight(tau):
    x, weights = RNG.normal(size=(300, 7)), RNG.integers(0, 4, size=(300, 7)).astype(float)
    weights[:, 0] += 1
    v = expectile(x, tau, weights)[:, None]
    np.testing.assert_allclose((weights * np.where(x < v, 1 - tau, tau) * (x - v)).sum(-1), 0, atol=1e-12)
    x[weights == 0] = 1e6
    np.testing.assert_allclose(expectile(x, tau, weights)[:, None], v)


def test_expectile_goes_from_the_mean_to_the_maximum():
    x = RNG.normal(size=(50, 6))
    np.testing.assert_allclose(expectile(x, 0.5, np.ones(6)), x.mean(-1))
    np.testing.assert_allclose(expectile(x, 1 - 1e-9, np.ones(6)), x.max(-1), atol=1e-6)
    np.testing.assert_allclose(expectile(x, 0.3, np.ones(6)), -expectile(-x, 0.7, np.ones(6)))
    assert expectile(x[0], 0.7, np.zeros(6)) == 0


@pytest.mark.parametrize("delta", [0.05, 0.5, 3.0])
def test_huber_location_minimises_the_loss_of_torch(delta):
    for _ in range(60):
        n = RNG.integers(1, 8)
        y, weights = RNG.normal(size=n) * 2, RNG.integers(0, 4, size=n).astype(float)
        weights[0] += 1

        def loss(q: float, y: np.ndarray = y, weights: np.ndarray = weights) -> float:
            target = torch.from_numpy(y)
            losses = torch.nn.functional.smooth_l1_loss(
                torch.full_like(target, q), target, beta=delta, reduction="none"
            )
            return float(losses.numpy() @ weights)

        searched = minimize_scalar(loss, bounds=(-10, 10), method="bounded", options={"xatol": 1e-10}).fun
        assert loss(float(huber_location(y, delta, weights))) <= searched + 1e-9


def test_huber_location_is_the_mean_for_wide_and_the_median_for_narrow_thresholds():
    y = RNG.normal(size=(40, 9))
    for delta in (math.inf, 100.0):
        np.testing.assert_allclose(huber_location(y, delta, np.ones(9)), y.mean(-1), atol=1e-12)
    np.testing.assert_allclose(huber_location(y, 1e-9, np.ones(9)), np.median(y, -1), atol=1e-8)
    assert huber_location(np.array([0.0, 0.0, 10.0, 10.0]), 1.0, np.ones(4)) == 5  # two equal camps: the middle
    assert huber_location(np.array([2.0]), 1.0, np.ones(1)) == 2


def test_huber_location_moves_with_its_values_and_never_against_one():
    y, bump = RNG.normal(size=(200, 1, 8)), RNG.exponential(size=(200, 1, 8))
    weights = RNG.integers(0, 3, size=(200, 4, 8)) + np.eye(8)[0]
    at = huber_location(y, 0.3, weights)
    assert at.shape == (200, 4)
    np.testing.assert_allclose(huber_location(y + 5, 0.3, weights), at + 5)
    np.testing.assert_allclose(huber_location(-y, 0.3, weights), -at, atol=1e-9)
    assert (huber_location(y + bump, 0.3, weights) >= at - 1e-9).all()


# Samples.


def test_samples_follow_the_mdp():
    mdp = gridworld(["S..", ".#G"], 0.9, slip=0.4, reward=3.0)
    samples = sample(mdp, 4000, seed=1)
    assert samples.rewards.shape == (5, 4, 4000)
    alive = ~mdp.terminal
    assert samples.counts[alive].tolist() == [[4000] * 4] * 4 and not samples.seen[mdp.terminal].any()
    shares = (samples.next_states[..., None] == np.arange(5)).mean(-2)
    np.testing.assert_allclose(shares[alive], mdp.transitions[alive], atol=0.03)
    assert ((shares > 0) <= (mdp.transitions > 0))[alive].all()
    np.testing.assert_array_equal(samples.terminated, samples.next_states == 4)
    np.testing.assert_array_equal(samples.rewards[alive], 3.0 * samples.terminated[alive])
    again, other = sample(mdp, 4000, seed=1), sample(mdp, 4000, seed=2)
    assert (again.next_states == samples.next_states).all() and (other.next_states != samples.next_states).any()


def test_logged_rows_become_a_table():
    states, actions = np.array([1, 0, 1, 1]), np.array([0, 1, 0, 1])
    rewards, following = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 1, 2, 2])
    table = Samples.of(states, actions, rewards, following, following == 2, (3, 2))
    assert table.counts.tolist() == [[0, 1], [2, 1], [0, 0]]
    assert table.rewards[1, 0].tolist() == [1, 3] and table.next_states[1, 0].tolist() == [0, 2]
    assert table.terminated[1].tolist() == [[False, True], [True, False]]
    np.testing.assert_allclose(table.behaviour, [[0, 1], [2 / 3, 1 / 3], [0, 0]])
    with pytest.raises(DataError, match="no transitions"):
        Samples.of(*(np.zeros(0, int),) * 5, (3, 2))


def test_bootstrap_draws_as_many_as_there_are():
    table = Samples.of(*np.array([[0, 0, 0, 1], [0, 0, 1, 1], [1, 2, 3, 4], [1, 1, 1, 1], [0, 0, 0, 0]]), (2, 2))
    weights = bootstrap(table, 2000, seed=0)
    assert (weights.sum(-1) == table.counts).all() and (weights[:, ~table.seen] == 0).all()
    assert (weights[:, 0, 0, 0] == 1).mean() == pytest.approx(0.5, abs=0.05)  # binomial(2, 1/2)


# Fixed points.


def logged(mdp, rows: int, seed: int) -> Samples:
    """A table with unequal counts and unseen pairs."""
    rng = np.random.default_rng(seed)
    states, actions = rng.integers(0, mdp.states, rows), rng.integers(0, mdp.actions, rows)
    drawn = sample(mdp, 1, seed)
    following = drawn.next_states[states, actions, 0]
    noise = rng.normal(size=rows)
    return Samples.of(states, actions, noise, following, mdp.terminal[following], (mdp.states, mdp.actions))


OPERATORS = [{}, {"tau": 0.9, "delta": 0.5}, {"tau": 0.6, "delta": 2.0, "alpha": 0.25}, {"alpha": 0.0}]


@pytest.mark.parametrize("operator", OPERATORS)
def test_fixed_points_stay_where_they_are_and_rounds_contract(operator):
    samples = logged(random_mdp(8, 3, 0.9, seed=3), rows=40, seed=3)
    replicates = bootstrap(samples, 4, seed=0) if "alpha" in operator else None
    found = in_sample_fixed_point(samples, 0.9, replicates=replicates, **operator)

    def again(values: np.ndarray) -> np.ndarray:
        return in_sample_backup(samples, values, 0.9, replicates=replicates, **operator).values

    assert np.abs(again(found.values) - found.values).max() <= 1e-9 * max(1, np.abs(found.values).max())
    assert (found.q == -np.inf).sum() == (samples.counts == 0).sum() > 0
    a, b = RNG.normal(size=(2, 100, 8)) * 3
    for x, y in zip(a, b, strict=True):
        assert np.abs(again(x) - again(y)).max() <= 0.9 * np.abs(x - y).max() + 1e-9


def test_expectile_one_half_evaluates_the_behaviour_on_the_empirical_mdp():
    mdp = gridworld(["S..", ".#G"], 0.9, slip=0.3)
    samples = sample(mdp, 50, seed=0)
    found = in_sample_fixed_point(samples, 0.9, tau=0.5)
    model = gridworld(["S..", ".#G"], 0.9)
    model.transitions[:] = (samples.next_states[..., None] == np.arange(5)).mean(-2)
    empirical = type(mdp)(model.transitions, mdp.rewards, 0.9, mdp.start, mdp.terminal)
    np.testing.assert_allclose(found.values, evaluate(empirical, uniform(mdp)).values, atol=1e-8)
    greedy_limit = in_sample_fixed_point(samples, 0.9, tau=1 - 1e-10)
    np.testing.assert_allclose(greedy_limit.values, policy_iteration(empirical).values, atol=1e-7)


def test_one_action_in_closed_form():
    """A chain that always steps right: V(d) is the discounted end, whatever location, quantile and expectile."""
    samples = sample(chain(5, 0.9), 3, seed=0)
    right = Samples(*(getattr(samples, name)[:, 1:] for name in ("rewards", "next_states", "terminated", "seen")))
    for operator in OPERATORS:
        found = in_sample_fixed_point(right, 0.9, **operator)
        np.testing.assert_allclose(found.values, [0.9**3, 0.81, 0.9, 1, 0], atol=1e-9)


def test_the_quantile_over_critics_is_that_of_torch():
    samples = logged(random_mdp(5, 2, 0.9, seed=1), rows=60, seed=1)
    found = in_sample_backup(samples, RNG.normal(size=5), 0.9, alpha=0.3, replicates=bootstrap(samples, 5, seed=1))
    expected = torch.quantile(torch.from_numpy(found.critics), 0.3, dim=0)
    np.testing.assert_allclose(found.q, expected, atol=1e-12)
    assert (found.critics.std(0) > 0).any()


def test_a_batch_of_tables_is_each_of_them():
    mdp = random_mdp(6, 2, 0.9, seed=2)
    tables = [corrupted(mdp, sample(mdp, 6, seed), "reward", 0.3, seed) for seed in range(3)]
    weights = np.stack([bootstrap(table, 3, seed=7) for table in tables])
    whole = in_sample_fixed_point(Samples.stack(tables), 0.9, delta=1.0, alpha=0.25, replicates=weights)
    for i, table in enumerate(tables):
        one = in_sample_fixed_point(table, 0.9, delta=1.0, alpha=0.25, replicates=weights[i])
        np.testing.assert_allclose(one.q, whole.q[i], atol=1e-6)
        np.testing.assert_allclose(one.critics, whole.critics[i], atol=1e-6)


def test_advantage_weighted_policy():
    behaviour = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0]])
    advantages = np.array([[0.0, math.log(3) / 3, 5.0], [50.0, 0.0, -1000.0], [-np.inf] * 3])
    policy = advantage_weighted(behaviour, advantages)
    np.testing.assert_allclose(policy, [[0.25, 0.75, 0], [20 / 20.3, 0.3 / 20.3, 0], [1 / 3] * 3])
    np.testing.assert_allclose(advantage_weighted(behaviour, advantages, beta=0.0)[0], behaviour[0])


# The robust grid.


def test_the_grid_of_the_experiment():
    mdp = robust_grid()
    assert (mdp.states, mdp.actions, mdp.discount) == (36, 4, 0.95)
    np.testing.assert_allclose(
        mdp.transitions[0, 1], np.eye(36)[1] * 0.925 + np.eye(36)[0] * 0.05 + np.eye(36)[6] * 0.025
    )
    assert (mdp.transitions[35] == mdp.start).all() and mdp.reward.sum() == 400


def test_corruption_hits_the_stated_share_of_one_element():
    mdp = robust_grid()
    clean = sample(mdp, 100, seed=0)
    dynamics = corrupted(mdp, clean, "dynamics", 0.3, seed=1)
    assert (dynamics.next_states != clean.next_states).mean() == pytest.approx(0.3 * 35 / 36, abs=0.01)
    assert dynamics.rewards is clean.rewards
    reward = corrupted(mdp, clean, "reward", 0.3, seed=1)
    hit = reward.rewards != clean.rewards
    assert hit.mean() == pytest.approx(0.3, abs=0.01) and np.abs(reward.rewards[hit]).max() <= 300
    assert reward.rewards[hit].std() == pytest.approx(600 / 12**0.5, rel=0.02)
    worst = corrupted(mdp, clean, "worst-state", 0.3, seed=1).next_states
    assert set(worst[worst != clean.next_states]) == {policy_iteration(mdp).values.argmin()}
    assert corrupted(mdp, clean, "none", 0.3, seed=1) is clean


def test_a_seed_scores_the_same_alone():
    learners = {name: LEARNERS[name] for name in ("iql", "riql")}
    together = robust_grid_scores("dynamics", 5, [3, 4], learners)
    alone = robust_grid_scores("dynamics", 5, [4], learners)
    for name in learners:
        assert together[name].shape == (2,) and together[name][1] == pytest.approx(alone[name][0], abs=1e-9)
