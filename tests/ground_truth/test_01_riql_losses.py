"""Sheet of RIQL (arXiv 2310.12955): its losses, in value and gradient, and its reduction to IQL."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import ConfigError
from guerdon.methods.offline.iql import advantage_weight
from guerdon.methods.offline.riql import RIQL, huber_loss, quantile


@pytest.mark.parametrize(
    ("delta", "difference", "expected"),
    [(4, 2, 0.5), (4, 6, 4.0), (1, 0.5, 0.125), (1, 2, 1.5), (1 / 9, 2, 1.94444)],
)
def test_1_huber_loss(delta, difference, expected):
    assert huber_loss(torch.zeros(1), torch.full((1,), float(difference)), delta).item() == pytest.approx(
        expected, abs=5e-6
    )


@pytest.mark.parametrize("delta", [100, 4, 1, 1 / 9])
def test_1_huber_gradient_is_the_clipped_difference_over_delta(delta):
    q = torch.linspace(-300, 300, 1201, dtype=torch.float64, requires_grad=True)
    target = torch.full_like(q, 2.0)
    (gradient,) = torch.autograd.grad(huber_loss(q, target, delta).sum(), q)
    torch.testing.assert_close(gradient, ((q - target) / delta).clamp(-1, 1).detach())


def test_1_sigma_is_inverse():
    assert RIQL(sigma=0.5).delta == 4
    assert [RIQL(sigma=s).delta for s in (0.1, 1, 3)] == pytest.approx([100, 1, 0.11111], abs=5e-6)
    assert RIQL().delta == RIQL(huber_delta=1.0).delta == 1
    with pytest.raises(ConfigError, match="give one of them"):
        RIQL(huber_delta=4.0, sigma=0.5).check()


@pytest.mark.parametrize(
    ("critics", "alpha", "expected"),
    [
        ([1, 2, 4, 8, 16], 0.0, 1),
        ([1, 2, 4, 8, 16], 0.1, 1.4),
        ([1, 2, 4, 8, 16], 0.25, 2),
        ([1, 2, 4, 8, 16], 0.5, 4),
        ([1, 2, 4, 8, 16], 1.0, 16),
        ([1, 2, 4], 0.1, 1.2),
        ([1, 2, 4], 0.25, 1.5),
        ([1, 2], 0.0, 1),
    ],
)
def test_2_quantile_over_critics(critics, alpha, expected):
    orders = torch.tensor([critics, critics[::-1]], dtype=torch.float32).unsqueeze(-1)
    assert quantile(orders, alpha).flatten().tolist() == pytest.approx([expected] * 2)


def test_2_quantile_is_that_of_torch():
    q = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    for alpha in (0.0, 0.1, 0.25, 0.33, 0.5, 0.9, 1.0):
        torch.testing.assert_close(quantile(q, alpha), torch.quantile(q, alpha, dim=1))


@pytest.mark.parametrize(("delta", "expected"), [(None, -2), (4, -0.71429), (1, 0.57143), (0.1, 0.95714)])
def test_3_location_of_seven_and_three_targets(delta, expected):
    """The gradient of the summed loss changes its sign there, and nowhere else."""
    targets = torch.tensor([1.0] * 7 + [-9.0] * 3, dtype=torch.float64)
    method = RIQL(td="mse") if delta is None else RIQL(huber_delta=float(delta))
    q = (expected + torch.tensor([-3, -1e-4, 1e-4, 3])).double().requires_grad_()
    loss = method.td_loss(q[None, :, None].expand(1, 4, 10), targets[None])
    (gradient,) = torch.autograd.grad(loss.sum(), q)
    assert (gradient[:2] < 0).all() and (gradient[2:] > 0).all()


def test_4_wide_threshold_is_the_squared_loss():
    q = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    target, delta = torch.randn(2, 5, dtype=torch.float64), 1e6
    wide, squared = RIQL(huber_delta=delta).td_loss(q, target) * 2 * delta, RIQL(td="mse").td_loss(q, target)
    torch.testing.assert_close(wide, squared)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), q)[0] for loss in (wide, squared)))
    torch.testing.assert_close(squared, (q - target[:, None]) ** 2)


def test_5_advantage_weights():
    advantage = torch.tensor([-1, 0, 0.5, 1, 2])
    expected = torch.tensor([0.04979, 1, 4.48169, 20.08554, 100])
    torch.testing.assert_close(advantage_weight(advantage, 3.0, 100.0), expected, atol=5e-6, rtol=1e-6)
