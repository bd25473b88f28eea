from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from guerdon.control.streams import Streams


def draws(streams: Streams) -> list[torch.Tensor]:
    """Draws of every kind, small and larger than a block."""
    return [
        streams.normal("noise", 5, 3),
        streams.uniform("act", 7),
        streams.integers("rows", 1000, 256),
        streams.normal("noise", 3000, 3),
        streams.normal("noise", 2),
        streams.integers("rows", 10**12, 4),
        streams.normal("act", 7),
    ]


def test_a_seed_draws_the_same_alone_and_beside_others():
    together, alone = draws(Streams([3, 4, 7])), draws(Streams([7]))
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[2:], one)
        assert not torch.equal(many[0], many[1])


def test_streams_do_not_disturb_each_other():
    quiet, busy = Streams([0]), Streams([0])
    busy.normal("other", 10)
    busy.uniform("noise", 10)
    assert torch.equal(quiet.normal("noise", 4), busy.normal("noise", 4))
    assert not torch.equal(Streams([0]).normal("a", 4), Streams([0]).normal("b", 4))


def test_draws_do_not_repeat():
    streams = Streams([0])
    seen = torch.cat([streams.normal("noise", 1000).clone() for _ in range(20)], 1)
    assert len(seen.unique()) > 19_990  # of 20,000; a few collide in float32


def test_distributions():
    streams = Streams([0, 1])
    normal, uniform = streams.normal("n", 40_000), streams.uniform("u", 40_000)
    assert normal.dtype == uniform.dtype == torch.float32
    assert normal.mean(1).abs().max() < 0.02 and (normal.std(1) - 1).abs().max() < 0.02
    assert uniform.min() >= 0 and uniform.max() < 1 and (uniform.mean(1) - 0.5).abs().max() < 0.01
    rows = streams.integers("r", torch.tensor([3, 10]), 30_000)
    assert rows.dtype == torch.int64
    counts = [torch.bincount(row) for row in rows]
    assert [len(c) for c in counts] == [3, 10]
    assert (counts[0] / 10_000 - 1).abs().max() < 0.05 and (counts[1] / 3_000 - 1).abs().max() < 0.08


@pytest.mark.parametrize("json_too", [False, True])
def test_goes_on_bit_for_bit(json_too):
    streams = Streams([1, 2])
    draws(streams)
    streams.generator("reset", 1).integers(10)
    state = streams.state_dict()
    state = json.loads(json.dumps(state)) if json_too else state
    after = [*draws(streams), torch.tensor(streams.generator("reset", 1).random(3))]
    again = Streams([5, 6])
    again.load_state_dict(state)
    for a, b in zip(after, [*draws(again), torch.tensor(again.generator("reset", 1).random(3))], strict=True):
        assert torch.equal(a, b)


def test_a_saved_state_is_not_moved_by_later_draws():
    streams = Streams([1])
    streams.normal("noise", 8000)
    state = streams.state_dict()
    first = [streams.normal("noise", 8000).clone() for _ in range(3)]
    streams.load_state_dict(state)
    assert all(torch.equal(a, streams.normal("noise", 8000)) for a in first)


def test_generator_belongs_to_its_seed():
    assert np.array_equal(Streams([4, 9]).generator("x", 1).random(3), Streams([9]).generator("x", 0).random(3))
    assert not np.array_equal(Streams([4]).generator("x", 0).random(3), Streams([4]).generator("y", 0).random(3))
