from __future__ import annotations

import pytest
import torch

from guerdon.control.optim import Adam
from guerdon.errors import GuerdonError

SHAPES = [(3, 5, 4), (3, 5), (3, 2, 1, 5)]


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def loss_of(ps, target: float = 1.0) -> torch.Tensor:
    """(S,): a loss whose gradients grow and shrink."""
    return torch.stack([((p - target) ** 4).flatten(1).sum(1) for p in ps]).sum(0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_numbers_are_those_of_torch(decay):
    mine, theirs = parameters(), parameters()
    adam = Adam(mine, lr=1e-2, betas=(0.8, 0.95), eps=1e-5, weight_decay=decay)
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    peer = kind(theirs, lr=1e-2, betas=(0.8, 0.95), eps=1e-5, weight_decay=decay)
    for step in range(20):
        adam.lr = peer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        adam.minimise(loss_of(mine))
        peer.zero_grad()
        loss_of(theirs).sum().backward()
        peer.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_clips_each_seed_by_its_own_norm():
    mine = parameters()
    adam = Adam(mine, lr=1e-2, max_grad_norm=150.0)
    singles = [[torch.nn.Parameter(p[k].detach().clone()) for p in mine] for k in range(3)]
    peers = [torch.optim.Adam(ps, lr=1e-2) for ps in singles]
    norms = []
    for _ in range(10):
        adam.minimise(loss_of(mine))
        for ps, peer in zip(singles, peers, strict=True):
            peer.zero_grad()
            loss_of([p[None] for p in ps]).sum().backward()
            norms.append(torch.nn.utils.clip_grad_norm_(ps, 150.0))
            peer.step()
    assert min(norms) < 150.0 < max(norms)  # some are clipped, some not
    for k in range(3):
        for p, single in zip(mine, singles[k], strict=True):
            torch.testing.assert_close(p[k], single, rtol=1e-5, atol=1e-6)


def test_gradient_norms_by_seed():
    ps = parameters()
    adam = Adam(ps, lr=0.0)
    loss_of(ps).sum().backward()
    expected = [torch.cat([p.grad[k].flatten() for p in ps]).norm() for k in range(3)]
    torch.testing.assert_close(adam.gradient_norms(), torch.stack(expected))
    adam.max_grad_norm = 1.0
    adam.step()
    torch.testing.assert_close(adam.gradient_norms(), torch.ones(3), rtol=1e-4, atol=0)


def test_seeds_alone_are_as_beside_others_bit_for_bit():
    mine = parameters()
    alone = [torch.nn.Parameter(p[1:2].detach().clone()) for p in mine]
    many, one = Adam(mine, lr=1e-2, max_grad_norm=20.0), Adam(alone, lr=1e-2, max_grad_norm=20.0)
    for _ in range(10):
        many.minimise(loss_of(mine))
        one.minimise(loss_of(alone))
    assert all(torch.equal(p[1:2], q) for p, q in zip(mine, alone, strict=True))


def test_a_seed_without_a_finite_gradient_spoils_no_other():
    mine, clean = parameters(), parameters()
    first, second = Adam(mine, lr=1e-2, max_grad_norm=1.0), Adam(clean, lr=1e-2, max_grad_norm=1.0)
    first.minimise(loss_of(mine) * torch.tensor([1.0, torch.nan, 1.0]))
    second.minimise(loss_of(clean))
    for p, q in zip(mine, clean, strict=True):
        assert p[1].isnan().all()
        assert torch.equal(p[[0, 2]], q[[0, 2]])


def test_gradients_that_lie_otherwise_in_memory():
    mine, theirs = parameters(), parameters()
    adam, peer = Adam(mine, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    weights = torch.arange(20.0).view(1, 4, 5)
    adam.minimise((mine[0].mT * weights).sum() + mine[1].sum() + mine[2].sum())  # transposed, and expanded
    ((theirs[0].mT * weights).sum() + theirs[1].sum() + theirs[2].sum()).backward()
    peer.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_missing_gradient_counts_as_zero():
    mine = parameters()
    before = mine[1].detach().clone()
    adam = Adam(mine, lr=0.1)
    mine[0].sum().backward()
    adam.step()
    assert torch.equal(mine[1], before) and not adam.second[1].any()


def test_goes_on_bit_for_bit_and_refuses_other_networks():
    mine = parameters()
    adam = Adam(mine, lr=1e-2)
    for _ in range(3):
        adam.minimise(loss_of(mine))
    state = {k: [t.clone() for t in v] if isinstance(v, list) else v + 0 for k, v in adam.state_dict().items()}
    copies = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    again = Adam(copies, lr=1.0)
    again.load_state_dict(state)
    for _ in range(3):
        adam.minimise(loss_of(mine))
        again.minimise(loss_of(copies))
    assert all(torch.equal(p, q) for p, q in zip(mine, copies, strict=True))
    with pytest.raises(GuerdonError, match="other networks"):
        Adam(mine[:2], lr=1.0).load_state_dict(state)
