"""From r to Q* (arXiv 2404.12358): two tokens {a, b}, two steps, uniform reference, beta 0.5."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.exact.token_mdp import SoftOptimum, TokenMDP, soft_optimum, token_tree
from guerdon.methods.preferences.dpo import implicit_rewards, preference_loss
from guerdon.methods.preferences.token_q import beam_search, expected_advantage, soft_q_from_logits

BETA = 0.5
START, AFTER_A, AFTER_B = 0, 1, 2
ANSWERS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])  # aa, ab, ba, bb
MDP = TokenMDP(
    child=token_tree(actions=2, steps=2),
    reward=np.array([[0, 0.2], [1, 0], [0, 0]]),
    ref_logps=np.full((3, 2), np.log(0.5)),
)


@pytest.fixture(scope="module")
def optimum() -> SoftOptimum:
    return soft_optimum(MDP, BETA)


class TabularDecoder:
    """The policy of a token MDP, given by its logits (S, A)."""

    def __init__(self, logits: np.ndarray):
        self.logits = torch.from_numpy(logits)

    def start(self, prompts):
        self.states = torch.zeros(len(prompts), dtype=torch.long)
        return self.logits[self.states]

    def step(self, rows, tokens):
        self.states = torch.from_numpy(MDP.child)[self.states[rows], tokens]
        return self.logits[self.states]


def test_1_values_and_policies(optimum):
    np.testing.assert_allclose(optimum.values, [0.5224609, 0.71689, 0], atol=5e-6)
    np.testing.assert_allclose(
        np.exp(optimum.logps), [[0.737648, 0.262352], [0.880797, 0.119203], [0.5, 0.5]], atol=5e-7
    )


def test_2_implicit_returns_recover_the_rewards(optimum):
    ratios = BETA * (optimum.logps - MDP.ref_logps)
    returns = np.array([MDP.along(ratios, a).sum() for a in ANSWERS])
    np.testing.assert_allclose(returns, [0.4775391, -0.5224609, -0.3224609, -0.3224609], atol=5e-8)
    np.testing.assert_allclose(returns + optimum.values[START], [1, 0, 0.2, 0.2], atol=1e-12)


def test_3_token_advantages_sum_to_the_returns(optimum):
    expected = [[0.194429, -0.322461], [0.28311, -0.71689], [0, 0]]
    np.testing.assert_allclose(optimum.advantages, expected, atol=5e-6)
    read = soft_q_from_logits(torch.from_numpy(optimum.q / BETA), torch.from_numpy(MDP.ref_logps), BETA)
    np.testing.assert_allclose(read.advantages.numpy(), optimum.advantages, atol=1e-12)
    np.testing.assert_allclose(read.values.numpy(), optimum.values, atol=1e-12)
    np.testing.assert_allclose(read.q.numpy(), optimum.q, atol=1e-12)
    sums = [MDP.along(optimum.advantages, a).sum() for a in ANSWERS]
    np.testing.assert_allclose(sums, [0.4775391, -0.5224609, -0.3224609, -0.3224609], atol=5e-8)


def test_4_a_hard_max_backup_is_another_policy(optimum):
    after = MDP.reward[[AFTER_A, AFTER_B]].max(1)
    hard = np.exp((MDP.reward[START] + after) / BETA)
    hard /= hard.sum()
    np.testing.assert_allclose(hard, [0.832018, 0.167982], atol=5e-7)
    assert abs(np.exp(optimum.logps[START, 0]) - hard[0]) > 0.09


@pytest.mark.parametrize("gauge", [[0, 0, 0], [3.0, -7.0, 11.0]])
def test_5_full_beam_finds_the_best_answer_in_every_gauge(optimum, gauge):
    logits = optimum.q / BETA + np.array(gauge)[:, None]
    [found] = beam_search(TabularDecoder(logits), [[]], beams=4, max_new_tokens=2, keep=4)
    assert found[0].tokens == (0, 0) and {h.tokens for h in found} == set(map(tuple, ANSWERS.tolist()))
    np.testing.assert_allclose(optimum.values[START] + BETA * found[0].logp, 0.3068528, atol=5e-8)
    np.testing.assert_allclose(optimum.values[START] + BETA * found[0].logp, 1 + 2 * BETA * np.log(0.5), atol=1e-12)
    assert np.exp([h.logp for h in found]).sum() == pytest.approx(1)

    read = soft_q_from_logits(torch.from_numpy(logits), torch.from_numpy(MDP.ref_logps), BETA)
    np.testing.assert_allclose(read.advantages.numpy(), optimum.advantages, atol=1e-12)
    np.testing.assert_allclose(read.values.numpy(), optimum.values + BETA * np.array(gauge), atol=1e-12)


def test_6_expected_advantage_is_minus_beta_kl_and_never_positive(optimum):
    logits, ref = torch.from_numpy(optimum.logps), torch.from_numpy(MDP.ref_logps)
    kl = (ref.exp() * (ref - logits)).sum(-1)
    found = expected_advantage(logits, ref, BETA)
    torch.testing.assert_close(found, -BETA * kl)
    assert (found[:2] < 0).all() and found[2] == pytest.approx(0, abs=1e-15)
    other = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    assert (expected_advantage(other, other.roll(1, 0), BETA) < 0).all()


def test_dpo_on_whole_answers_finds_the_token_level_optimum(optimum):
    """Response-level preferences and the DPO loss alone recover pi* and the advantage of every token."""
    returns = torch.tensor([MDP.along(MDP.reward, a).sum() for a in ANSWERS])
    better, worse = (~torch.eye(4, dtype=torch.bool)).nonzero().unbind(1)
    probability = torch.sigmoid(returns[better] - returns[worse])
    logits = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    states = torch.tensor(np.array([MDP.path(a) for a in ANSWERS]))
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, tolerance_change=0)

    def closure():
        optimiser.zero_grad()
        logps = logits.log_softmax(-1)[states, torch.from_numpy(ANSWERS)].sum(-1)
        rewards = implicit_rewards(logps - 2 * np.log(0.5), torch.full((4,), 2.0), beta=BETA)
        loss = (probability * preference_loss(rewards[better], rewards[worse])).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    learned = logits.detach().log_softmax(-1)
    np.testing.assert_allclose(learned.numpy(), optimum.logps, atol=1e-6)
    advantages = soft_q_from_logits(learned, torch.from_numpy(MDP.ref_logps), BETA).advantages
    np.testing.assert_allclose(advantages.numpy(), optimum.advantages, atol=1e-6)
