"""Fused log-probs and entropies equal the plain formulas, in value and gradient, in memory that does not grow."""

from __future__ import annotations

import pytest
import torch

from guerdon.language import logprobs
from guerdon.language.logprobs import token_logps


def plain(hidden, weight, target, temperature):  # type: ignore[no-untyped-def]
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("n, vocabulary", [(1, 7), (50, 4096), (33, 9000), (2050, 130)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(n: int, vocabulary: int, temperature: float) -> None:
    torch.manual_seed(n)
    hidden = torch.randn(n, 16, requires_grad=True)
    weight = torch.randn(vocabulary, 16, requires_grad=True)
    target = torch.randint(0, vocabulary, (n,))
    a, b = torch.randn(n), torch.randn(n)
    ours = token_logps(hidden, weight, target, temperature, entropy=True)
    expected = plain(hidden, weight, target, temperature)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-5)
    found = torch.autograd.grad((ours[0] * a + ours[1] * b).sum(), (hidden, weight))
    wanted = torch.autograd.grad((expected[0] * a + expected[1] * b).sum(), (hidden, weight))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_without_entropy_the_gradient_is_the_same() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
    target = torch.randint(0, 5000, (9,))
    logps, entropy = token_logps(hidden, weight, target)
    assert entropy is None
    found = torch.autograd.grad(logps.sum(), (hidden, weight))
    wanted = torch.autograd.grad(plain(hidden, weight, target, 1.0)[0].sum(), (hidden, weight))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_gradcheck_in_double_precision_of_the_formula() -> None:
    """Finite differences of the fused function itself, in fp32 with a matching tolerance."""
    torch.manual_seed(1)
    hidden = torch.randn(3, 4, requires_grad=True)
    weight, target, step = torch.randn(11, 4), torch.tensor([0, 10, 4]), 1e-2

    def value(h: torch.Tensor) -> torch.Tensor:
        logps, entropy = token_logps(h, weight, target, 0.9, entropy=True)
        return (logps + 0.5 * entropy).sum()

    gradient = torch.autograd.grad(value(hidden), hidden)[0]
    for i in range(3):
        for j in range(4):
            nudge = torch.zeros_like(hidden)
            nudge[i, j] = step
            slope = (value(hidden + nudge) - value(hidden - nudge)) / (2 * step)
            assert abs(slope - gradient[i, j]) < 1e-3


def test_confident_tokens_in_bf16_are_never_above_zero_and_stay_exact() -> None:
    """A logit of 30 rounds by up to 0.06; the fp32 logit that replaces it in the sum keeps the log-prob right."""
    torch.manual_seed(2)
    weight = torch.randn(5000, 64)
    target = torch.randint(0, 5000, (40,))
    hidden = weight[target] * 0.5 + 0.1 * torch.randn(40, 64)
    exact, _ = plain(hidden.bfloat16().float(), weight.bfloat16().float(), target, 1.0)
    found, _ = token_logps(hidden.bfloat16(), weight.bfloat16(), target)
    assert (found <= 0).all()
    assert exact.max() > -1e-5
    torch.testing.assert_close(found, exact, atol=2e-4, rtol=2e-2)


def test_no_tile_is_larger_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = logprobs._logits
    monkeypatch.setattr(logprobs, "_logits", lambda h, w, t: seen.append((len(h), len(w))) or real(h, w, t))
    hidden = torch.randn(3000, 4, requires_grad=True)
    token_logps(hidden, torch.randn(10_000, 4), torch.zeros(3000, dtype=torch.long))[0].sum().backward()
    assert len(seen) == 2 * 2 * 3
    assert max(a for a, _ in seen) <= logprobs.ROWS and max(b for _, b in seen) <= logprobs.COLUMNS
