"""Sheet of NFT (arXiv 2505.18116): every number and statement that can be checked without training a language model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.language.forward import Outputs
from guerdon.language.groups import Group
from guerdon.language.packing import pack
from guerdon.methods.policy_gradient import group_advantages
from guerdon.methods.verifiers.grpo import GRPO, DrGRPO
from guerdon.methods.verifiers.nft import NFT, maxv, nft_loss

RNG = np.random.default_rng(0)


def on_policy_gradient(method, scores: list[list[float]]) -> np.ndarray:
    """d loss / d log pi of every token of groups with these scores, at pi = pi_old."""
    rng = np.random.default_rng(0)
    groups = []
    for i, row in enumerate(scores):
        completions = [rng.integers(4, 30, size=rng.integers(1, 7)) for _ in row]
        values = {"score": np.array(row, np.float32), "finished": np.ones(len(row), np.float32)}
        groups.append(Group.of([1, 2], completions, values=values, key=str(i)))
        for segment in groups[-1].segments[1:]:
            segment.values["old_logps"] = rng.uniform(-3, 0, len(segment)).astype(np.float32)
    groups = method.credit(groups, RNG)
    batch = pack(groups, totals=method.totals(groups))
    logps = batch.token_values["old_logps"].clone().requires_grad_()
    method.loss(Outputs(logps=logps, entropy=torch.zeros_like(logps)), batch)[0].backward()
    return logps.grad.numpy()


SCORES = [[1.0, 0, 0, 0], [1.0, 1.0, 0, 1.0], [0, 1.0, 1.0, 0]]


@pytest.mark.parametrize("eps", [1.0, 0.3])
@pytest.mark.parametrize(
    ("normalize", "rival"),
    [
        (2, GRPO(scale="population-std", advantage_eps=0.0, aggregate="constant", max_new_tokens=1000, kl_coef=0.0)),
        (1, DrGRPO(max_new_tokens=1000)),
    ],
)
def test_1_on_policy_gradient_equals_grpo_and_dr_grpo(normalize, rival, eps):
    ours = on_policy_gradient(NFT(normalize=normalize, clamp_negative=eps), SCORES)
    theirs = on_policy_gradient(rival, SCORES)
    assert np.abs(theirs).max() > 1e-5
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-12)


def test_1_with_bessels_deviation_it_holds_up_to_a_constant_of_the_group_size():
    np.testing.assert_allclose(
        group_advantages(np.array([1.0, 0, 0, 0]), "population-std", 0), [1.7321] + [-0.5774] * 3, atol=1e-4
    )
    np.testing.assert_allclose(group_advantages(np.array([1.0, 0, 0, 0]), "std", 0), [1.5] + [-0.5] * 3)
    ours = on_policy_gradient(NFT(normalize=2), SCORES)
    theirs = on_policy_gradient(
        GRPO(scale="std", advantage_eps=0.0, aggregate="constant", max_new_tokens=1000, kl_coef=0.0), SCORES
    )
    np.testing.assert_allclose(theirs, ours * (3 / 4) ** 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("correct", "ratio", "eps", "loss", "gradient"),
    [
        (1, 1.2, 1.0, -0.136741, -0.75),
        (1, 0.8, 1.0, +0.167358, -0.75),
        (0, 0.9, 1.0, -0.024592, +0.217742),
        (0, 1.1, 1.0, 0.0, +0.275),
        (0, 1.1, 0.1, +0.025426, +0.284483),
        (0, 2.0, 1.0, 0.0, +0.50),
        (0, 2.0, 0.1, +0.304099, +0.75),
    ],
)
def test_2_numbers(correct, ratio, eps, loss, gradient):
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    said = (torch.tensor([float(correct)]).double(), torch.tensor([0.25]).double())
    losses, _ = nft_loss(log_ratio, *said, normalize=1, clamp_negative=eps)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, abs=1e-6)
    assert log_ratio.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_3_the_sampled_policy_is_a_mixture_of_right_and_wrong():
    pi, p = np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.5, 0.0])
    q = (pi * p).sum()
    right, wrong = pi * p / q, pi * (1 - p) / (1 - q)
    assert q == pytest.approx(0.65)
    np.testing.assert_allclose(right, [0.7692, 0.2308, 0], atol=1e-4)
    np.testing.assert_allclose(wrong, [0, 0.4286, 0.5714], atol=1e-4)
    np.testing.assert_allclose(q * right + (1 - q) * wrong, pi)
    # What the loss of a wrong answer calls the odds is the implicit negative policy over the sampled one.
    odds = (1 - q * right / pi) / (1 - q)
    np.testing.assert_allclose(odds * pi, wrong, atol=1e-12)


def descend(p: list[float], positives: bool, steps: int, lr: float) -> np.ndarray:
    """Gradient descent on logits from pi = (.5, .3, .2), on the exact expectation of the sequence loss."""
    pi, p_correct = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor(p).double()
    q = (pi * p_correct).sum().expand(3)
    logits = pi.log().requires_grad_()
    for _ in range(steps):
        log_ratio = logits.log_softmax(0) - pi.log()
        wrong, _ = nft_loss(log_ratio, torch.zeros(3), q, normalize=0, clamp_negative=1e-12)
        loss = (pi * (1 - p_correct) * wrong).sum()
        if positives:
            right, _ = nft_loss(log_ratio, torch.ones(3), q, normalize=0)
            loss = loss + (pi * p_correct * right).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= lr * gradient
    return logits.detach().softmax(0).numpy()


def test_4_negatives_alone_recover_the_positive_policy_where_no_answer_is_certain():
    found = descend([0.9, 0.5, 0.1], positives=False, steps=4000, lr=0.5)
    np.testing.assert_allclose(found, [0.7258, 0.2419, 0.0323], atol=1e-4)


@pytest.mark.slow
def test_4_with_a_deterministic_verifier_they_do_not():
    alone = descend([1, 1, 0], positives=False, steps=20_000, lr=0.5)
    np.testing.assert_allclose(alone, [0.9707, 0.0293, 0.0001], atol=1e-4)
    both = descend([1, 1, 0], positives=True, steps=10_000, lr=0.5)
    np.testing.assert_allclose(both, [0.625, 0.375, 0.0], atol=1e-4)


def test_4_with_one_answer_always_right_and_one_always_wrong_they_leave_one():
    found = descend([1, 0.5, 0], positives=False, steps=4000, lr=0.5)
    assert found[0] > 0.95 and abs(found[0] - 0.7692) > 0.1


def test_5_the_loss_is_zero_at_the_start_and_its_gradient_is_not():
    log_ratio = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses, _ = nft_loss(log_ratio, torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.25]).double())
    losses.sum().backward()
    np.testing.assert_allclose(losses.detach(), [0, 0], atol=1e-12)
    np.testing.assert_allclose(log_ratio.grad, [-0.75, 0.25])


def test_trap_a_plain_clamp_would_never_punish_further():
    x = torch.tensor([0.5], requires_grad=True)
    maxv(x, 1.0).sum().backward()
    assert maxv(x, 1.0).item() == 1.0 and x.grad.item() == 1.0
