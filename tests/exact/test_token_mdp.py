from __future__ import annotations

import itertools

import numpy as np
import pytest

from guerdon.exact.token_mdp import END, TokenMDP, kl_regularised_optimum, soft_optimum, token_tree


def random_tree(actions: int, steps: int, seed: int) -> TokenMDP:
    rng = np.random.default_rng(seed)
    child = token_tree(actions, steps)
    ref = rng.normal(size=child.shape)
    ref -= np.logaddexp.reduce(ref, axis=1, keepdims=True)
    return TokenMDP(child, rng.normal(size=child.shape), ref)


def test_token_tree_counts_states_level_by_level():
    assert token_tree(2, 1).tolist() == [[END, END]]
    assert token_tree(2, 2).tolist() == [[1, 2], [END, END], [END, END]]
    assert token_tree(3, 3).shape == (13, 3)
    mdp = random_tree(3, 3, seed=0)
    assert mdp.path(np.array([2, 0, 1])).tolist() == [0, 3, 10]


@pytest.mark.parametrize("beta", [0.1, 0.7, 3.0])
def test_token_optimum_is_the_bandit_optimum_over_whole_answers(beta):
    mdp = random_tree(3, 3, seed=1)
    answers = [np.array(a) for a in itertools.product(range(3), repeat=3)]
    reward = np.array([mdp.along(mdp.reward, a).sum() for a in answers])
    ref = np.array([mdp.along(mdp.ref_logps, a).sum() for a in answers])
    expected, value = kl_regularised_optimum(reward, ref, beta)

    found = soft_optimum(mdp, beta)

    np.testing.assert_allclose([mdp.along(found.logps, a).sum() for a in answers], expected, atol=1e-12)
    assert found.values[0] == pytest.approx(value, abs=1e-12)
    np.testing.assert_allclose([mdp.along(found.advantages, a).sum() + value for a in answers], reward, atol=1e-12)
    np.testing.assert_allclose(found.advantages, beta * (found.logps - mdp.ref_logps), atol=1e-12)


def test_answers_of_unequal_length_and_tokens_that_cannot_be_taken():
    # a ends at once with reward 1; b goes on, and from there only b can be taken, with reward 2.
    child = np.array([[END, 1], [END, END]])
    reward = np.array([[1.0, 0.0], [0.0, 2.0]])
    with np.errstate(divide="ignore"):
        ref = np.log([[0.5, 0.5], [0.0, 1.0]])
    found = soft_optimum(TokenMDP(child, reward, ref), beta=1.0)
    assert found.values.tolist() == pytest.approx([np.log((np.e + np.e**2) / 2), 2.0])
    np.testing.assert_allclose(np.exp(found.logps), [[1 / (1 + np.e), np.e / (1 + np.e)], [0, 1]])
    assert np.isnan(found.advantages[1, 0])


def test_a_state_that_is_met_again_is_refused():
    mdp = TokenMDP(np.array([[0, END]]), np.ones((1, 2)), np.log([[0.5, 0.5]]))
    with pytest.raises(ValueError, match="met again"):
        soft_optimum(mdp, beta=1.0)


def test_bandit_optimum_attains_its_value_and_nothing_beats_it():
    rng = np.random.default_rng(0)
    reward, beta = rng.normal(size=(4, 5)), 0.3
    ref = rng.normal(size=(4, 5))
    ref -= np.logaddexp.reduce(ref, axis=-1, keepdims=True)

    def objective(logps: np.ndarray) -> np.ndarray:
        return (np.exp(logps) * (reward - beta * (logps - ref))).sum(-1)

    best, value = kl_regularised_optimum(reward, ref, beta)
    np.testing.assert_allclose(np.exp(best).sum(-1), 1)
    np.testing.assert_allclose(objective(best), value, atol=1e-12)
    for _ in range(50):
        other = best + rng.normal(size=best.shape) * 0.1
        other -= np.logaddexp.reduce(other, axis=-1, keepdims=True)
        assert (objective(other) < value).all()
