from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from guerdon.errors import GuerdonError
from guerdon.training.optim import MasterAdamW, NonFiniteError, learning_rate

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7}


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(
        torch.nn.Linear(7, 13), torch.nn.LayerNorm(13), torch.nn.Tanh(), torch.nn.Linear(13, 3)
    )
    return layers.to(dtype)


def data(step: int) -> torch.Tensor:
    return torch.randn(12, 7, generator=torch.Generator().manual_seed(step))


def backward(model: torch.nn.Module, x: torch.Tensor, total: int) -> None:
    (model(x.to(next(model.parameters()).dtype)).float().pow(4).sum() / total).backward()


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_fp32_equals_torch(max_grad_norm, weight_decay):
    ours, theirs = network(), network()
    optimizer = MasterAdamW(ours.named_parameters(), **OPTIONS, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    expected = torch.optim.AdamW(groups, **OPTIONS, fused=False, foreach=False)
    for step in range(20):
        for part in data(step).split(5):
            backward(ours, part, 12)
            optimizer.accumulate()
        norm = optimizer.step(lr=1e-2 / (step + 1))
        expected.zero_grad()
        backward(theirs, data(step), 12)
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm or float("inf"))
        for group in expected.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        expected.step()
        assert norm == pytest.approx(float(expected_norm), rel=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bf16_weights_follow_fp32_masters():
    # The gradients that bf16 weights give, summed and applied in fp32: steps far below bf16's resolution are not lost.
    model = network(torch.bfloat16)
    optimizer = MasterAdamW(model.named_parameters(), lr=1e-5, max_grad_norm=0.0)
    masters = [torch.nn.Parameter(p.detach().float()) for p in model.parameters()]
    expected = torch.optim.AdamW(masters, lr=1e-5, weight_decay=0.0, fused=False)
    start = [m.detach().clone() for m in masters]
    for step in range(30):
        sums = [torch.zeros_like(m) for m in masters]
        for part in data(step).split(4):
            backward(model, part, 12)
            for total, p in zip(sums, model.parameters(), strict=True):
                total += p.grad.float()
            optimizer.accumulate()
            assert all(p.grad is None for p in model.parameters())
        for master, total in zip(masters, sums, strict=True):
            master.grad = total
        expected.step()
        optimizer.step()
    for p, ours, theirs, before in zip(model.parameters(), optimizer.masters, masters, start, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-7)
        assert torch.equal(p, ours.detach().bfloat16())
        assert (ours.detach() - before).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_sums_do_not_depend_on_the_cut(dtype):
    parts = []
    for size in (12, 5, 1):
        model = network(dtype)
        optimizer = MasterAdamW(model.named_parameters(), lr=1e-3)
        for part in data(0).split(size):
            backward(model, part, 12)
            optimizer.accumulate()
        parts.append(optimizer.gradient.clone())
    assert parts[0].dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for other in parts[1:]:
        torch.testing.assert_close(other, parts[0], rtol=tolerance, atol=tolerance)


def test_accumulation_is_exact_in_fp32_for_many_small_bf16_gradients():
    p = torch.nn.Parameter(torch.zeros(600_000, dtype=torch.bfloat16))  # more than one chunk
    optimizer = MasterAdamW([("p", p)], lr=1e-3)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        optimizer.accumulate()
    assert torch.equal(optimizer.gradient[: p.numel()], torch.full((p.numel(),), 300.0))  # bf16 would stop at 256


def test_tied_frozen_and_unused_parameters():
    model = network()
    model[3].weight.requires_grad_(False)
    frozen, unused = model[3].weight.detach().clone(), torch.nn.Parameter(torch.ones(4, 4))
    named = [*model.named_parameters(), ("unused", unused)]
    optimizer = MasterAdamW(named, lr=1e-2)
    assert "3.weight" not in optimizer.names
    backward(model, data(0), 12)
    optimizer.accumulate()
    optimizer.step()
    assert torch.equal(model[3].weight, frozen) and torch.equal(unused, torch.ones(4, 4))
    with pytest.raises(GuerdonError, match="nothing to train"):
        MasterAdamW(model.requires_grad_(False).named_parameters(), lr=1e-2)


def test_a_gradient_lost_by_zero_grad_does_not_detach_the_sums():
    model, other = network(), network()
    a = MasterAdamW(model.named_parameters(), lr=1e-2)
    b = MasterAdamW(other.named_parameters(), lr=1e-2)
    for part in data(0).split(6):
        model.zero_grad(set_to_none=True)
        backward(model, part, 12)
        a.accumulate()
        backward(other, part, 12)
        b.accumulate()
        assert torch.equal(a.gradient, b.gradient)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = network(torch.bfloat16)
    optimizer = MasterAdamW(model.named_parameters(), lr=1e-2)
    backward(model, data(0), 12)
    optimizer.accumulate()
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state_dict().items()}
    backward(model, data(1) * bad, 12)
    optimizer.accumulate()
    with pytest.raises(NonFiniteError):
        optimizer.step()
    after = optimizer.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 5])
def test_resume_is_bit_exact(tmp_path, dtype, before):
    def train(model, optimizer, steps):
        for step in steps:
            for part in data(step).split(5):
                backward(model, part, 12)
                optimizer.accumulate()
            optimizer.step(1e-2 / (step + 1))

    options = OPTIONS | {"weight_decay": 0.1}
    model = network(dtype)
    optimizer = MasterAdamW(model.named_parameters(), **options)
    train(model, optimizer, range(before))
    save_file(optimizer.state_dict(), tmp_path / "state.safetensors")
    train(model, optimizer, range(before, 12))

    resumed = network(dtype, seed=1)
    other = MasterAdamW(resumed.named_parameters(), **options)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    train(resumed, other, range(before, 12))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    first, second = optimizer.state_dict(), other.state_dict()
    assert first.keys() == second.keys() and int(first["step"]) == 12
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_state_of_another_model_is_refused():
    model = network()
    state = copy.deepcopy(MasterAdamW(model.named_parameters(), lr=1e-2).state_dict())
    wider = torch.nn.Sequential(torch.nn.Linear(7, 14), torch.nn.LayerNorm(14), torch.nn.Tanh(), torch.nn.Linear(14, 3))
    with pytest.raises(GuerdonError, match=r"another model: master\.0\.weight"):
        MasterAdamW(wider.named_parameters(), lr=1e-2).load_state_dict(state)


def test_learning_rate():
    assert learning_rate(0.0, 2.0, "linear", 0.1) == 0
    assert learning_rate(0.05, 2.0, "cosine", 0.1) == pytest.approx(1.0)
    for schedule in ("linear", "cosine", "constant"):
        assert learning_rate(0.1, 2.0, schedule, 0.1) == 2.0
        assert learning_rate(0.0, 2.0, schedule, 0.0) == 2.0
        assert learning_rate(1.0, 2.0, schedule, 1.0) == 2.0
    assert learning_rate(0.55, 2.0, "linear", 0.1) == pytest.approx(1.0)
    assert learning_rate(0.55, 2.0, "cosine", 0.1) == pytest.approx(1.0)
    assert learning_rate(0.325, 2.0, "cosine", 0.1) == pytest.approx(1 + 0.5**0.5)
    assert learning_rate(1.0, 2.0, "linear", 0.1) == learning_rate(1.0, 2.0, "cosine", 0.1) == 0
    assert learning_rate(0.9, 2.0, "constant", 0.1) == 2.0
