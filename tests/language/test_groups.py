"""Groups, their packing into rows, and what losses read from a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.language.groups import Group, Segment, micro_batches
from guerdon.language.packing import pack, unpack
from guerdon.language.store import load_groups, save_groups
from shapes import flat_group, random_tree


def deep() -> Group:
    """Prompt 1 2 3; below it a = 4 5 and d = 9; below a: b = 6 and c = 7 8, of which 8 is learned."""
    return Group(
        [
            Segment([1, 2, 3], [0, 0, 0]),
            Segment([4, 5], [1, 1], 0, {"old_logps": np.array([0.4, 0.5], np.float32)}),
            Segment([6], [1], 1, {"old_logps": np.array([0.6], np.float32)}),
            Segment([7, 8], [0, 1], 1, {"old_logps": np.array([0.7, 0.8], np.float32)}),
            Segment([9], [1], 0, {"old_logps": np.array([0.9], np.float32)}),
        ],
        leaves=[2, 3, 4],
        values={"score": np.array([1, 2, 3], np.float32)},
        pairs=[(0, 1), (2, 0)],
        columns={"answer": "x"},
        key="deep",
    )


def test_paths_and_lengths() -> None:
    group = deep()
    assert group.path(1) == [0, 1, 3]
    tokens, learn = group.sequence(1)
    assert tokens.tolist() == [1, 2, 3, 4, 5, 7, 8] and learn.tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert group.lengths().tolist() == [3, 3, 1]
    assert (group.unique_tokens, group.learned_tokens) == (9, 5)


def test_the_first_token_of_a_root_is_never_learned() -> None:
    assert Segment([5, 6], [1, 1]).learn.tolist() == [False, True]
    assert Segment([5, 6], [1, 1], parent=0).learn.tolist() == [True, True]


def test_pack_by_hand() -> None:
    batch = pack([deep()])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 5, 6, 3]]
    # learned tokens:        4  5  6  8  9
    assert batch.target.tolist() == [4, 5, 6, 8, 9]
    assert batch.source.tolist() == [2, 3, 4, 6, 2]
    assert batch.last.tolist() == [5, 7, 8]
    assert batch.completion.tolist() == [0, 0, 0, 1, 2]
    assert batch.lengths.tolist() == [3, 3, 1]
    assert batch.pairs.tolist() == [[0, 1], [2, 0]]
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    assert batch.per_completion(x).tolist() == [111, 1011, 10000]
    assert batch.spread(batch.values["score"]).tolist() == [3, 3, 1, 2, 3]
    torch.testing.assert_close(batch.token_values["old_logps"], torch.tensor([0.4, 0.5, 0.6, 0.8, 0.9]))
    seen = batch.layout.mask().int().tolist()
    assert seen[8] == [1, 1, 1, 0, 0, 0, 0, 0, 1]  # 9 sees the prompt and itself
    assert seen[7] == [1, 1, 1, 1, 1, 0, 1, 1, 0]  # 8 sees its path and not its cousin 6


def test_pack_offsets_groups_and_unpack_writes_back() -> None:
    first, second = deep(), deep()
    batch = pack([first, second])
    assert batch.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.pairs.tolist() == [[0, 1], [2, 0], [3, 4], [5, 3]]
    assert not batch.layout.mask()[9:, :9].any()
    unpack(batch, "values", torch.arange(10.0))
    assert second.segments[1].values["values"].tolist() == [5, 6]
    assert second.segments[3].values["values"].tolist() == [0, 8]
    assert "values" not in second.segments[0].values


def test_groups_that_carry_different_values_do_not_pack() -> None:
    other = deep()
    other.values = {}
    with pytest.raises(ValueError, match="score"):
        pack([deep(), other])


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_path_sums_are_sums_over_sequences(seed: int, segments: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [random_tree(rng, segments, 5), flat_group(rng, 3, 4, 5)]
    batch = pack(groups)
    sums = batch.per_completion(batch.target.float())
    expected = [t[m].sum() for g in groups for c in range(len(g)) for t, m in [g.sequence(c)]]
    assert sums.tolist() == expected
    # <spread(v), x> = <v, per_completion(x)> for any v and x
    v, x = torch.randn(len(batch.last)), torch.randn(len(batch.target))
    torch.testing.assert_close((batch.spread(v) * x).sum(), (v * batch.per_completion(x)).sum(), atol=1e-3, rtol=1e-3)


def test_subset_keeps_only_what_lies_on_the_paths() -> None:
    part = deep().subset([2, 0])
    assert [s.tokens.tolist() for s in part.segments] == [[1, 2, 3], [4, 5], [6], [9]]
    assert [part.sequence(c)[0].tolist() for c in range(2)] == [[1, 2, 3, 9], [1, 2, 3, 4, 5, 6]]
    assert part.values["score"].tolist() == [3, 1]
    assert part.pairs == [(0, 1)]


@given(st.integers(0, 1000), st.integers(5, 60), st.booleans())
@settings(deadline=None, max_examples=40)
def test_micro_batches_lose_nothing(seed: int, budget: int, cut: bool) -> None:
    rng = np.random.default_rng(seed)
    groups = [flat_group(rng, int(rng.integers(1, 6)), int(rng.integers(1, 9)), 9) for _ in range(6)]
    for i, group in enumerate(groups):
        group.values["index"] = np.arange(len(group), dtype=np.float32) + 10 * i
    parts = list(micro_batches(groups, budget, per_completion=cut))
    found = sorted(float(i) for part in parts for g in part for i in g.values["index"])
    assert found == sorted(float(i) for g in groups for i in g.values["index"])
    for part in parts:
        size = sum(g.unique_tokens for g in part)
        assert size <= budget or (len(part) == 1 and (not cut or len(part[0]) == 1))


def test_store_keeps_groups_bit_for_bit(tmp_path) -> None:  # type: ignore[no-untyped-def]
    groups = [deep(), random_tree(np.random.default_rng(1), 6, 5)]
    save_groups(tmp_path / "groups.safetensors", groups)
    loaded = load_groups(tmp_path / "groups.safetensors")
    for a, b in zip(groups, loaded, strict=True):
        assert (a.leaves, a.pairs, a.columns, a.key) == (b.leaves, b.pairs, b.columns, b.key)
        assert a.values.keys() == b.values.keys()
        for s, t in zip(a.segments, b.segments, strict=True):
            assert s.parent == t.parent and (s.tokens == t.tokens).all() and (s.learn == t.learn).all()
            assert s.values.keys() == t.values.keys()
            assert all((s.values[n] == t.values[n]).all() for n in s.values)
    save_groups(tmp_path / "none.safetensors", [])
    assert load_groups(tmp_path / "none.safetensors") == []
