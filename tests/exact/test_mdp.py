from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from scipy.sparse import csgraph

from guerdon.errors import ConfigError, DataError
from guerdon.exact.mdp import (
    TabularMDP,
    average_occupancy,
    evaluate,
    greedy,
    occupancy,
    policy_iteration,
    reachable,
    shortest_paths,
    successor,
    uniform,
    value_iteration,
)
from guerdon.exact.token_mdp import END, TokenMDP, kl_regularised_optimum, soft_optimum, token_tree
from guerdon.exact.worlds import chain, from_gymnasium, gridworld, random_mdp

RNG = np.random.default_rng(0)
GRID = ["S.##", ".#..", "...G"]


def random_policy(*shape: int) -> np.ndarray:
    return RNG.dirichlet(np.ones(shape[-1]), size=shape[:-1])


# Optima and values.


@pytest.mark.parametrize("temperature", [0.0, 0.05, 2.0])
def test_policy_iteration_is_value_iteration_on_a_batch(temperature):
    mdp = random_mdp(12, 3, 0.9, seed=1, batch=(4, 2))
    prior = random_policy(4, 2, 12, 3)
    swept = value_iteration(mdp, temperature, prior, tolerance=1e-12)
    solved = policy_iteration(mdp, temperature, prior)
    assert solved.values.shape == (4, 2, 12) and solved.q.shape == solved.policy.shape == (4, 2, 12, 3)
    np.testing.assert_allclose(swept.values, solved.values, atol=1e-10)
    np.testing.assert_allclose(swept.policy, solved.policy, atol=1e-8)
    judged = evaluate(mdp, solved.policy, temperature, prior)
    np.testing.assert_allclose(judged.values, solved.values, atol=1e-10)


def test_the_optimum_satisfies_bellmans_equation_and_beats_every_other_policy():
    mdp = random_mdp(6, 3, 0.95, seed=2)
    best = policy_iteration(mdp)
    np.testing.assert_allclose(mdp.backup(best.values).max(-1), best.values, atol=1e-11)
    assert best.advantages.max() <= 1e-11 and (best.policy * best.advantages).sum(-1) == pytest.approx(0, abs=1e-11)
    others = np.concatenate([random_policy(200, 6, 3), np.eye(3)[RNG.integers(0, 3, (500, 6))]])
    assert (evaluate(mdp, others).values <= best.values + 1e-10).all()


def test_value_iteration_keeps_its_tolerance_near_discount_one():
    mdp = random_mdp(5, 2, 0.999, seed=3)
    exact = policy_iteration(mdp).values
    for tolerance in (1e-3, 1e-7):
        found = value_iteration(mdp, tolerance=tolerance).values
        assert np.abs(found - exact).max() <= tolerance * max(1, np.abs(exact).max())


def test_chain_in_closed_form():
    mdp = chain(6, 0.9)
    values = [0.9**4, 0.9**3, 0.81, 0.9, 1, 0]
    np.testing.assert_allclose(value_iteration(mdp).values, values, atol=1e-12)
    np.testing.assert_allclose(policy_iteration(mdp).values, values, atol=1e-12)
    right = np.tile([0.0, 1.0], (6, 1))
    np.testing.assert_allclose(evaluate(mdp, right).values, values, atol=1e-12)
    assert occupancy(mdp, right)[:, 1].tolist() == pytest.approx([1, 0.9, 0.81, 0.9**3, 0.9**4, 0])


def test_without_a_discount_a_random_walk_takes_quadratically_long():
    steps = TabularMDP(chain(6, 1.0).transitions, -np.ones((6, 2)), 1.0, np.eye(6)[0], chain(6, 1.0).terminal)
    np.testing.assert_allclose(
        evaluate(steps, uniform(steps)).values, [-30, -28, -24, -18, -10, 0]
    )  # -(n - s)(n + 1 + s)
    np.testing.assert_allclose(policy_iteration(steps).values, [-5, -4, -3, -2, -1, 0])
    np.testing.assert_allclose(value_iteration(steps).values, [-5, -4, -3, -2, -1, 0])


def test_without_a_discount_what_never_ends_is_refused():
    left = np.tile([1.0, 0.0], (4, 1))
    for function in (evaluate, occupancy, successor):
        with pytest.raises(ConfigError, match="go on for ever"):
            function(chain(4, 1.0), left)
    endless = random_mdp(3, 2, 1.0, seed=0)
    with pytest.raises(ConfigError, match="do not settle"):
        value_iteration(endless)


def test_a_batch_is_its_members_and_rewards_broadcast_over_moves():
    mdp = random_mdp(7, 2, 0.9, seed=4, batch=(3,))
    whole = policy_iteration(mdp)
    for i in range(3):
        one = TabularMDP(mdp.transitions[i], mdp.rewards[i], 0.9)
        np.testing.assert_allclose(policy_iteration(one).values, whole.values[i], atol=1e-11)
    rewards = RNG.normal(size=(5, 7, 2))
    many = TabularMDP(mdp.transitions[:1], rewards, 0.9)
    single = TabularMDP(mdp.transitions[0], rewards[3], 0.9)
    np.testing.assert_allclose(value_iteration(many).values[3], value_iteration(single).values, atol=1e-8)


def test_rewards_of_moves_count_by_their_probability():
    transitions = np.array([[[0.25, 0.75]], [[1.0, 0.0]]])
    rewards = np.array([[[4.0, 8.0]], [[0.0, 100.0]]])
    mdp = TabularMDP(transitions, rewards, 0.5)
    assert mdp.reward.tolist() == [[7.0], [0.0]]
    v0 = 7 / (1 - 0.125 - 0.75 * 0.25)
    np.testing.assert_allclose(value_iteration(mdp).values, [v0, v0 / 2])


# Soft and regularised optima.


def test_soft_values_come_down_to_the_hard_ones():
    mdp = random_mdp(8, 4, 0.9, seed=5)
    hard = policy_iteration(mdp)
    gaps = [policy_iteration(mdp, temperature).values - hard.values for temperature in (1.0, 0.1, 0.01, 1e-4)]
    for gap, temperature in zip(gaps, (1.0, 0.1, 0.01, 1e-4), strict=True):
        assert (gap >= -1e-10).all() and gap.max() <= temperature * np.log(4) / (1 - 0.9) + 1e-10
    assert gaps[0].min() > 0.1
    np.testing.assert_allclose(value_iteration(mdp, 1e-4).policy, hard.policy, atol=1e-8)


def test_a_uniform_prior_takes_the_entropy_bonus_down_by_a_constant():
    mdp = random_mdp(5, 3, 0.8, seed=6)
    bonus = policy_iteration(mdp, 0.3)
    penalty = policy_iteration(mdp, 0.3, uniform(mdp))
    np.testing.assert_allclose(bonus.values - penalty.values, 0.3 * np.log(3) / (1 - 0.8), atol=1e-10)
    np.testing.assert_allclose(bonus.policy, penalty.policy, atol=1e-10)


def test_one_step_is_the_bandit_of_the_closed_form():
    reward, prior = RNG.normal(size=5), random_policy(5)
    transitions = np.zeros((2, 5, 2))
    transitions[..., 1] = 1
    mdp = TabularMDP(transitions, np.stack([reward, np.full(5, 7.0)]), 1.0, terminal=np.array([False, True]))
    logps, value = kl_regularised_optimum(reward, np.log(prior), beta=0.4)
    found = value_iteration(mdp, 0.4, np.stack([prior, prior]))
    np.testing.assert_allclose(found.policy[0], np.exp(logps), atol=1e-12)
    assert found.values.tolist() == pytest.approx([value, 0.0])


def test_a_tree_of_tokens_is_the_same_optimum():
    child = token_tree(actions=3, steps=3)
    ref = np.log(random_policy(len(child), 3))
    tokens = TokenMDP(child, RNG.normal(size=child.shape), ref)
    end = len(child)
    transitions = np.concatenate([np.eye(end + 1)[np.where(child == END, end, child)], np.eye(end + 1)[[[end] * 3]]])
    rewards = np.concatenate([tokens.reward, np.ones((1, 3))])
    mdp = TabularMDP(transitions, rewards, 1.0, np.eye(end + 1)[0], np.arange(end + 1) == end)
    expected = soft_optimum(tokens, 0.5)
    found = policy_iteration(mdp, 0.5, np.concatenate([np.exp(ref), np.full((1, 3), 1 / 3)]))
    np.testing.assert_allclose(found.values[:-1], expected.values, atol=1e-12)
    np.testing.assert_allclose(np.log(found.policy[:-1]), expected.logps, atol=1e-12)


def test_actions_outside_the_prior_are_never_taken():
    mdp = random_mdp(4, 3, 0.9, seed=7)
    prior = np.tile([0.5, 0.5, 0.0], (4, 1))
    found = policy_iteration(mdp, 0.2, prior)
    assert (found.policy[:, 2] == 0).all() and np.isfinite(found.values).all()
    inside = TabularMDP(mdp.transitions[:, :2], mdp.reward[:, :2], 0.9)
    np.testing.assert_allclose(found.values, policy_iteration(inside, 0.2, prior[:, :2]).values, atol=1e-10)


# Occupancies.


def test_occupancies_sum_to_the_horizon_and_price_the_policy():
    mdp = random_mdp(9, 3, 0.95, seed=8, batch=(2,))
    policy = random_policy(2, 9, 3)
    visits = occupancy(mdp, policy)
    np.testing.assert_allclose(visits.sum((-1, -2)), 20)
    np.testing.assert_allclose((visits * mdp.reward).sum((-1, -2)), (evaluate(mdp, policy).values * mdp.start).sum(-1))
    inflow = np.einsum("bsa,bsat->bt", visits, mdp.transitions)
    np.testing.assert_allclose(visits.sum(-1), mdp.start + 0.95 * inflow)
    seen = successor(mdp, policy)
    np.testing.assert_allclose(seen.sum(-1), 20)
    np.testing.assert_allclose((mdp.start @ seen)[..., None] * policy, visits)
    np.testing.assert_allclose((seen @ (policy * mdp.reward).sum(-1)[..., None])[..., 0], evaluate(mdp, policy).values)


def test_successor_measure_of_four_states():
    moves = np.array([[0.1, 0.9, 0, 0], [0, 0.2, 0.8, 0], [0, 0, 0.3, 0.7], [0.5, 0, 0, 0.5]])
    mdp = TabularMDP(moves[:, None], np.zeros((4, 1)), 0.9)
    measure = moves @ successor(mdp, np.ones((4, 1)))  # P (I - gamma P)^-1: visits from the next step on
    np.testing.assert_allclose(measure.sum(-1), 10)
    np.testing.assert_allclose(measure @ [0, 0, 1, 0.5], [4.1748, 4.6902, 4.2305, 3.8703], atol=5e-5)


def test_long_run_shares_are_stationary_also_with_a_period_and_with_episodes():
    mdp = random_mdp(6, 2, 0.9, seed=9)
    policy = random_policy(6, 2)
    share = average_occupancy(mdp, policy)
    assert share.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.einsum("sa,sat->t", share, mdp.transitions), share.sum(-1), atol=1e-14)
    near = TabularMDP(mdp.transitions, mdp.rewards, 1 - 1e-7)
    np.testing.assert_allclose(occupancy(near, policy) * 1e-7, share, atol=1e-6)

    swing = TabularMDP(np.array([[[0.0, 1.0]], [[1.0, 0.0]]]), np.zeros((2, 1)), 0.9, np.array([1.0, 0.0]))
    np.testing.assert_allclose(average_occupancy(swing, np.ones((2, 1))), [[0.5], [0.5]])

    walk = average_occupancy(chain(4, 0.9), np.tile([0.0, 1.0], (4, 1)))
    np.testing.assert_allclose(walk, [[0, 1 / 3], [0, 1 / 3], [0, 1 / 3], [0, 0]], atol=1e-14)


def test_long_run_shares_of_separate_classes_depend_on_the_start():
    transitions = np.zeros((3, 1, 3))
    transitions[0, 0] = [0, 0.3, 0.7]
    transitions[1, 0, 1] = transitions[2, 0, 2] = 1
    mdp = TabularMDP(transitions, np.zeros((3, 1)), 0.9, np.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(average_occupancy(mdp, np.ones((3, 1)))[:, 0], [0, 0.3, 0.7], atol=1e-14)


# Graphs.


def test_shortest_paths_are_those_of_breadth_first_search_and_dijkstra():
    graph = RNG.random((3, 25, 25)) < 0.08
    costs = np.where(graph, RNG.uniform(0.1, 2, graph.shape), np.inf)
    for i in range(3):
        steps = csgraph.shortest_path(graph[i].astype(float), method="D", unweighted=True)
        np.testing.assert_array_equal(shortest_paths(graph)[i], steps)
        assert np.isinf(steps).any() and steps[np.isfinite(steps)].max() >= 4
        np.testing.assert_allclose(shortest_paths(costs)[i], csgraph.dijkstra(np.where(graph[i], costs[i], 0)))
    with pytest.raises(DataError, match="at least 0"):
        shortest_paths(-costs)


def test_distances_of_a_grid_go_round_its_walls_and_price_its_steps():
    mdp = gridworld(GRID, 0.9)
    steps = shortest_paths(mdp.graph)[:, -1]
    assert steps.tolist() == [5, 6, 4, 2, 1, 3, 2, 1, 0]
    values = value_iteration(mdp).values
    np.testing.assert_allclose(values[:-1], 0.9 ** (steps[:-1] - 1))
    assert np.isinf(shortest_paths(mdp.graph)[-1, :-1]).all()  # nothing follows the end


def test_reachable_states():
    mdp = gridworld(["S.#.", "..#G"], 0.9)
    assert reachable(mdp).tolist() == [True, True, False, True, True, False]
    right = np.tile(np.eye(4)[1], (6, 1))
    assert reachable(mdp, right).tolist() == [True, True, False, False, False, False]
    assert reachable(chain(3, 0.9), np.tile([0.0, 1.0], (3, 1))).all()


# Worlds.


def test_moves_of_a_slippery_grid():
    mdp = gridworld(GRID, 0.9, slip=0.4)
    assert mdp.states == 9 and mdp.terminal.tolist() == [False] * 8 + [True]
    np.testing.assert_allclose(mdp.transitions[0, 1], [0.2, 0.7, 0.1, 0, 0, 0, 0, 0, 0])  # up, left: off the grid
    np.testing.assert_allclose(mdp.reward[7], [0.1, 0.7, 0.1, 0.1])
    assert mdp.start.tolist() == [1] + [0] * 8


def test_a_goal_may_bring_back_or_stay():
    back = gridworld(["S.G"], 0.5, reward=8.0, goal="teleport")
    np.testing.assert_allclose(value_iteration(back).values, np.array([2, 4, 8]) / (1 - 0.5**3))
    assert back.transitions[2].tolist() == [[1, 0, 0]] * 4 and not back.terminal.any()
    stay = gridworld(["S.G"], 0.5, reward=8.0, goal="stay")
    np.testing.assert_allclose(value_iteration(stay).values, [4, 8, 16])


@pytest.mark.parametrize("layout", [["S.", "."], ["Sx"], []])
def test_a_layout_that_is_no_grid_is_refused(layout):
    with pytest.raises(DataError, match="layout"):
        gridworld(layout, 0.9)


def test_random_mdps_differ_within_a_batch_and_can_be_sharp():
    mdp = random_mdp(10, 2, 0.9, seed=0, concentration=0.01, batch=(2,))
    np.testing.assert_allclose(mdp.transitions.sum(-1), 1)
    assert np.median(mdp.transitions.max(-1)) > 0.9
    assert not np.allclose(mdp.transitions[0], mdp.transitions[1])


def rollout_return(env: gymnasium.Env, policy: np.ndarray, discount: float, episodes: int) -> np.ndarray:
    returns = np.zeros(episodes)
    for episode in range(episodes):
        state, _ = env.reset(seed=episode)
        factor, over = 1.0, False
        while not over and factor > 1e-6:
            state, reward, over, _, _ = env.step(int(policy[state].argmax()))
            returns[episode] += factor * float(reward)
            factor *= discount
    return returns


@pytest.mark.parametrize(("name", "terminals"), [("FrozenLake-v1", 5), ("Taxi-v4", 4), ("CliffWalking-v1", 1)])
def test_gymnasium_tables_predict_the_returns_of_the_environment(name, terminals):
    env = gymnasium.make(name).unwrapped
    mdp = from_gymnasium(env, 0.9)
    assert mdp.terminal.sum() == terminals
    best = policy_iteration(mdp)
    returns = rollout_return(env, best.policy, 0.9, 300)
    assert abs(returns.mean() - best.values @ mdp.start) <= 4 * returns.std() / 300**0.5 + 1e-5


def test_frozen_lake_has_its_known_optimum():
    lake = from_gymnasium(gymnasium.make("FrozenLake-v1"), 1.0)
    assert value_iteration(lake, tolerance=1e-10).values[0] == pytest.approx(14 / 17, abs=1e-5)
    sure = from_gymnasium(gymnasium.make("FrozenLake-v1", is_slippery=False), 0.9)
    assert value_iteration(sure).values[0] == pytest.approx(0.9**5)


def test_environments_without_a_table_are_refused():
    with pytest.raises(DataError, match="no table of its moves"):
        from_gymnasium(gymnasium.make("CartPole-v1"), 0.9)


def test_a_state_that_is_and_is_not_the_end_is_refused():
    class Odd:
        P = {0: {0: [(1.0, 1, 0.0, True)], 1: [(1.0, 1, 0.0, False)]}, 1: {0: [(1.0, 0, 0.0, False)], 1: []}}
        initial_state_distrib = np.array([1.0, 0.0])
        unwrapped = property(lambda self: self)

    with pytest.raises(DataError, match=r"state 1 of .* ends an episode"):
        from_gymnasium(Odd(), 0.9)


# What is no MDP.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"transitions": np.ones((2, 3, 4))}, r"\(\.\.\., S, A, S\)"),
        ({"transitions": np.full((3, 2, 3), 0.4)}, r"transitions\[0, 0\] is no distribution"),
        ({"rewards": np.zeros((3, 3))}, "rewards have shape"),
        ({"rewards": np.full((3, 2), np.nan)}, "not finite"),
        ({"start": np.array([0.5, 0.6, 0.0])}, "start is no distribution"),
        ({"start": np.array([1.0])}, "start has shape"),
        ({"terminal": np.array([True])}, "terminal has shape"),
        ({"start": np.eye(3)[0], "terminal": np.array([True, False, False])}, "terminal state"),
        ({"discount": 1.5}, "discount is 1.5"),
    ],
)
def test_what_is_no_mdp_is_refused(changed, message):
    good = {"transitions": np.full((3, 2, 3), 1 / 3), "rewards": np.zeros((3, 2)), "discount": 0.9}
    with pytest.raises((DataError, ConfigError), match=message):
        TabularMDP(**(good | changed))


def test_greedy_takes_the_first_of_equals():
    assert greedy(np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])).tolist() == [[0, 1, 0], [1, 0, 0]]
