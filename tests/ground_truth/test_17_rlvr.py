"""Sheet of Tulu 3 (arXiv 2411.15124), reinforcement learning with verifiable rewards."""

from __future__ import annotations

import numpy as np

from guerdon.language.groups import Group
from guerdon.methods.policy_gradient import gae, whiten
from guerdon.methods.verifiers.ppo import PPO


def test_2_the_scores_of_a_verifier_are_three():
    values = {"score": np.array([1.0, 0.0, 1.0, 0.0]), "finished": np.array([1.0, 1.0, 0.0, 0.0])}
    assert PPO().score(Group.of([1], [[2], [3], [4], [5]], values=values)).tolist() == [10, 0, -10, -10]


def test_3_generalised_advantages_returns_and_whitening():
    rewards = -0.05 * np.array([[0.2, -0.1, 0.4]])
    rewards[0, -1] += 10
    np.testing.assert_allclose(rewards[0], [-0.01, 0.005, 9.98])
    values = np.array([[1.0, 2.0, 3.0]])
    advantages = gae(rewards, values, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages[0], [8.2442, 7.636, 6.98], atol=5e-5)
    np.testing.assert_allclose((advantages + values)[0], [9.2442, 9.636, 9.98], atol=5e-5)
    np.testing.assert_allclose(whiten(advantages[0]), [0.9872, 0.0252, -1.0124], atol=5e-5)


def test_3_the_same_from_a_group_as_the_sampler_leaves_it():
    group = Group.of([1, 2], [[3, 4, 5]], values={"score": np.array([1.0]), "finished": np.array([1.0])})
    reference = np.array([-1.0, -2.0, -0.5])
    group.segments[1].values = {
        "old_logps": reference + np.array([0.2, -0.1, 0.4]),
        "ref_logps": reference,
        "values": np.array([1.0, 2.0, 3.0]),
    }
    (credited,) = PPO().credit_values([group])
    np.testing.assert_allclose(credited.segments[1].values["returns"], [9.2442, 9.636, 9.98], atol=5e-5)
    np.testing.assert_allclose(credited.segments[1].values["advantage"], [0.9872, 0.0252, -1.0124], atol=5e-5)
