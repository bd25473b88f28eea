"""Compiled layers against torch's operations, in double precision."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guerdon.control import networks

kernels = pytest.importorskip("guerdon.control.networks.kernels", exc_type=ImportError)


def layers(n: int, widths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape for i, o in pairwise(widths) for shape in ((n, o, i), (n, o))]
    return [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]


def expected(x: torch.Tensor, parameters: list[torch.Tensor], slopes: list[float]) -> torch.Tensor:
    y = x
    for weight, bias, slope in zip(parameters[::2], parameters[1::2], slopes, strict=True):
        y = F.leaky_relu(torch.baddbmm(bias[:, None], y, weight.mT), slope)
    return y


@pytest.mark.parametrize(
    ("n", "rows", "widths"),
    [
        (1, 128, (4, 120, 84, 2)),  # every kind of width: narrower than a block, no multiple of one, one and several
        (3, 17, (1, 33, 31)),
        (2, 3, (40, 32, 1)),  # fewer rows than a block has
        (2, 70, (7, 64, 64, 6)),
        (1, 1, (5, 1)),
        (2, 100, (1, 40, 1, 1)),
    ],
)
def test_values_and_gradients_are_torchs(n, rows, widths):
    slopes = [*np.resize([0.0, 0.01], len(widths) - 2), 1.0]
    parameters, generator = layers(n, widths), torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(n, rows, width, generator=generator) for width in (widths[0], widths[-1]))
    y, tape = kernels.forward(x, parameters, torch.tensor(slopes, dtype=torch.float32))
    exact = [t.double().requires_grad_() for t in (x, *parameters)]
    right = expected(exact[0], exact[1:], slopes)
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    to_x, *found = torch.autograd.grad(right, exact, gradient.double())
    mine, mine_x = kernels.backward(gradient, tape, True, True)
    for a, b in zip([mine_x, *mine], [to_x, *found], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
    assert kernels.backward(gradient, tape, False, False) == ([], None)
    unkept, no_tape = kernels.forward(x, parameters, torch.tensor(slopes, dtype=torch.float32), keep=False)
    assert no_tape is None
    torch.testing.assert_close(unkept, y, rtol=0, atol=0)
    turned = x.mT.contiguous().mT
    torch.testing.assert_close(kernels.forward(turned, parameters, torch.tensor(slopes, dtype=torch.float32))[0], y)


def test_memory_may_be_apart():
    wide = [torch.stack([p, torch.full_like(p, torch.nan)], 1) for p in layers(2, (5, 40, 3))]
    parameters = [p[:, 0] for p in wide]  # beside each network is another one
    x = torch.randn(2, 40, 10, generator=torch.Generator().manual_seed(1))[..., ::2]
    slopes = torch.tensor([0.0, 1.0])
    y, tape = kernels.forward(x, parameters, slopes)
    torch.testing.assert_close(y, expected(x, parameters, slopes.tolist()))
    gradient = torch.ones(()).expand_as(y)
    found, to_x = kernels.backward(gradient, tape, True, True)
    again, same_y = kernels.backward(gradient.clone(), kernels.forward(x.clone(), parameters, slopes)[1], True, True)
    torch.testing.assert_close([*found, to_x], [*again, same_y], rtol=0, atol=0)


@pytest.mark.parametrize("members", [slice(0, 1), slice(None, None, 2)])
def test_members_may_be_apart_and_see_the_same(members):
    wide = [p.unflatten(0, (2, 3)) for p in layers(6, (5, 40, 3))]
    parameters = [p[:, members] for p in wide]
    k = parameters[0].shape[1]
    x = torch.randn(2, 1, 20, 5, generator=torch.Generator().manual_seed(1)).expand(-1, k, -1, -1)
    slopes = torch.tensor([0.0, 1.0])
    y, tape = kernels.forward(x, parameters, slopes)
    found, to_x = kernels.backward(torch.ones_like(y), tape, True, True)
    flat = [p.flatten(0, 1) for p in parameters]
    same_y, tape = kernels.forward(x.flatten(0, 1), flat, slopes)
    same, same_x = kernels.backward(torch.ones_like(same_y), tape, True, True)
    assert (y.shape, to_x.shape) == ((2, k, 20, 3), x.shape)
    for a, b in zip([y, *found, to_x], [same_y, *same, same_x], strict=True):
        torch.testing.assert_close(a.flatten(0, 1), b, rtol=0, atol=0)


def test_every_network_is_computed_as_if_alone():
    x, parameters = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(1)), layers(3, (6, 50, 2))
    slopes = torch.tensor([0.0, 1.0])
    y, _ = kernels.forward(x, parameters, slopes)
    alone, _ = kernels.forward(x[1:2], [p[1:2] for p in parameters], slopes)
    torch.testing.assert_close(y[1:2], alone, rtol=0, atol=0)


def test_what_is_not_finite_stays_so():
    x, parameters = torch.ones(1, 20, 3), layers(1, (3, 40, 40))
    x[0, 4, 1] = torch.nan
    y, _ = kernels.forward(x, parameters, torch.zeros(2))
    assert y[0, 4].isnan().all() and y[0, 5].isfinite().all()


@pytest.mark.parametrize("members", [None, 2])
def test_networks_take_this_road_to_the_same_numbers(monkeypatch, members):
    taken = []
    original = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: taken.append(1) or original(*args))
    mlp = networks.MLP(2, 5, (40, 24), 3, members, activation="leaky_relu")
    networks.initialise(mlp, [0, 1])
    x = torch.randn(2, 20, 5, requires_grad=True)
    found = []
    for module in (kernels, None):
        monkeypatch.setattr(networks.layers, "_kernels", lambda module=module: module)
        y = mlp(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])])
    assert taken == [1]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def both_ways(x, parameters, slopes):
    y, tape = kernels.forward(x, parameters, slopes)
    found, to_x = kernels.backward(torch.ones_like(y), tape, True, True)
    return [y, *found, to_x]


def problem(n: int, widths: tuple[int, ...] = (60, 64, 64, 2)):
    x = torch.randn(n, 64, widths[0], generator=torch.Generator().manual_seed(1))
    return x, layers(n, widths), torch.tensor([0.0] * (len(widths) - 2) + [1.0])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_number(threads):
    problems = [problem(n) for n in (1, 2, 3, 16)]
    alone = [both_ways(*p) for p in problems]
    with networks.one_thread_each(threads):
        assert torch.get_num_threads() == 1
        for pause in (0, 0, 0.1):  # long enough to fall asleep
            time.sleep(pause)
            for _ in range(20):
                shared = [both_ways(*p) for p in problems]
                torch.testing.assert_close(shared, alone, rtol=0, atol=0)


def test_callers_at_the_same_time_get_their_own_numbers():
    problems = [problem(4), problem(6, (60, 40, 1))]
    alone = [both_ways(*p) for p in problems]
    with networks.one_thread_each(2), ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            found = list(pool.map(lambda p: both_ways(*p), problems))
            torch.testing.assert_close(found, alone, rtol=0, atol=0)


def test_threads_end_with_what_needed_them():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), networks.one_thread_each(3):
        assert threading.active_count() == before + 2
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_memory_grows_with_the_rows_alone():
    x, parameters, slopes = problem(1, (4, 40, 2))
    many = x[:, :1].repeat(1, 400_000, 1)  # their square would fill any machine
    y, tape = kernels.forward(many, parameters, slopes)
    found, _ = kernels.backward(torch.ones_like(y), tape, True, False)
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    torch.testing.assert_close(found[-1], torch.full((1, 2), 400_000.0))
