from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from guerdon.control.tabular import TabularEnv, as_transitions
from guerdon.errors import ConfigError
from guerdon.exact.mdp import policy_iteration
from guerdon.exact.samples import Samples, sample
from guerdon.exact.worlds import gridworld, random_mdp

MDP = gridworld(["S..", ".#G"], 0.9, slip=0.3, reward=2.0)


def test_the_environment_keeps_gymnasiums_rules():
    check_env(TabularEnv(MDP), skip_render_check=True)


def test_returns_are_those_of_the_exact_values():
    env, best = TabularEnv(MDP), policy_iteration(MDP)
    returns = np.zeros(2000)
    for episode in range(len(returns)):
        observation, info = env.reset(seed=episode)
        factor, over = 1.0, False
        while not over:
            assert observation.argmax() == info["state"] and observation.sum() == 1
            observation, reward, over, truncated, info = env.step(int(best.policy[info["state"]].argmax()))
            assert not truncated and (reward == 2) == over == MDP.terminal[info["state"]]
            returns[episode] += factor * reward
            factor *= 0.9
    assert returns.mean() == pytest.approx(best.values @ MDP.start, abs=4 * returns.std() / 2000**0.5)


def test_a_reset_seed_and_the_actions_give_the_episode_again():
    def play() -> list[int]:
        env = TabularEnv(random_mdp(10, 2, 0.9, seed=0))
        return [env.reset(seed=5)[1]["state"], *(env.step(t % 2)[4]["state"] for t in range(30))]

    assert play() == play() and len(set(play())) > 5


def test_a_batch_is_no_environment():
    with pytest.raises(ConfigError, match=r"batch of shape \(3,\)"):
        TabularEnv(random_mdp(4, 2, 0.9, seed=0, batch=(3,)))


def test_transitions_hold_every_row_of_the_table_and_give_it_back():
    samples = sample(MDP, 7, seed=0)
    rows = as_transitions(samples)
    assert len(rows) == 7 * 4 * 4 and rows.spec.observation == (5,) and rows.spec.actions == 4
    assert (rows.terminated ^ rows.truncated).all() and (rows.lengths() == 1).all()
    states, following = rows.observations.argmax(-1), rows.next_observations.argmax(-1)
    again = Samples.of(states, rows.actions, rows.rewards, following, rows.terminated, (5, 4))
    for name in ("rewards", "next_states", "terminated", "seen"):
        alive = ~MDP.terminal
        np.testing.assert_array_equal(getattr(again, name)[alive], getattr(samples, name)[alive])
