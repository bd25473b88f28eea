"""Attention over a tree of segments: each segment sees its ancestors and itself, causally, and nothing else.

Registered with transformers' attention interface under the name "guerdon", so that any model which routes its attention
through that interface computes on packed trees without a change to its code. The layout that travels with the call says
who sees whom; during training it is a `TreeLayout`, during sampling a cache with the same method.
"""

from __future__ import annotations

from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch

NAME = "guerdon"
QUERY_BLOCK = 128  # rows of scores held at once: large enough for a matmul, small enough for the cache


class Layout(Protocol):
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """(B, H, T, D) queries over (B, KV, T, D) keys and values of one layer: (B, H, T, D)."""
        ...


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in each layer."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = layout.attend(module.layer_idx, query, key, value, scale)  # type: ignore[arg-type]
    return out.transpose(1, 2), None


def register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


class TreeLayout:
    """Segments in a row, each with the segments that come before it on its path.

    Args:
        lengths: tokens of each segment, in row order.
        ancestors: for each segment, its ancestors from the root down.
    """

    def __init__(self, lengths: list[int], ancestors: list[list[int]]):
        self.lengths = lengths
        self.ancestors = ancestors
        self.starts = [0]
        for length in lengths:
            self.starts.append(self.starts[-1] + length)

    @cached_property
    def blocks(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """(start, end, spans) of each block of queries; spans are the row ranges that it sees, itself at the end."""
        found = []
        for s, length in enumerate(self.lengths):
            first = self.starts[s]
            above = [(self.starts[a], self.starts[a + 1]) for a in self.ancestors[s]]
            for start in range(first, first + length, QUERY_BLOCK):
                end = min(start + QUERY_BLOCK, first + length)
                found.append((start, end, _merge([*above, (first, end)])))
        return found

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        if query.is_cuda:
            return self._flex(query, key, value, scaling)
        out: torch.Tensor = _SegmentAttention.apply(query, key, value, scaling, self)
        return out

    def mask(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """(T, T) bool, True where a token (row) sees another (column): the definition, for tests and small rows."""
        total = self.starts[-1]
        seen = torch.zeros(total, total, dtype=torch.bool, device=device)
        for s, (start, end) in enumerate(pairwise(self.starts)):
            for a in self.ancestors[s]:
                seen[start:end, self.starts[a] : self.starts[a + 1]] = True
            seen[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool, device=device).tril()
        return seen

    def _flex(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        out: torch.Tensor = _flex_attention()(
            query, key, value, block_mask=self._block_mask, scale=scaling, enable_gqa=True
        )
        return out

    @cached_property
    def _block_mask(self) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        count, total = len(self.lengths), self.starts[-1]
        segment = torch.repeat_interleave(torch.arange(count), torch.tensor(self.lengths)).cuda()
        sees = torch.eye(count, dtype=torch.bool)
        for s, above in enumerate(self.ancestors):
            sees[s, above] = True
        sees = sees.cuda()
        return create_block_mask(
            lambda b, h, q, k: (q >= k) & sees[segment[q], segment[k]], None, None, total, total, device="cuda"
        )


@cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Drop empty ranges and join neighbours."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        elif end > start:
            merged.append((start, end))
    return merged


class _SegmentAttention(torch.autograd.Function):
    """Blocks of queries over exactly the keys that they see, with a backward that recomputes the probabilities.

    The work is that of the unmasked entries alone and the memory that of one block, which on a CPU is several times
    faster than scaled_dot_product_attention with a (T, T) mask. Query heads that share a key head are folded into rows.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, layout):  # type: ignore[no-untyped-def, override]
        _, heads, total, dim = query.shape
        kv = key.shape[1]
        q = query[0].view(kv, heads // kv, total, dim)
        out = torch.empty_like(q)
        for start, end, spans in layout.blocks:
            p = _probabilities(q[:, :, start:end], _gather(key[0], spans), scaling)
            out[:, :, start:end] = (p @ _gather(value[0], spans)).view(kv, -1, end - start, dim)
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.layout = scaling, layout
        return out.view(1, heads, total, dim)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        query, key, value = ctx.saved_tensors
        _, heads, total, dim = query.shape
        kv, dtype = key.shape[1], query.dtype
        q, do = query[0].view(kv, heads // kv, total, dim), grad[0].view(kv, heads // kv, total, dim)
        dq = torch.empty_like(q)
        dk = key.new_zeros(key.shape[1:], dtype=torch.float32)
        dv = torch.zeros_like(dk)
        for start, end, spans in ctx.layout.blocks:
            k, v = _gather(key[0], spans), _gather(value[0], spans)
            p = _probabilities(q[:, :, start:end], k, ctx.scaling)
            q_rows, do_rows = q[:, :, start:end].flatten(1, 2), do[:, :, start:end].flatten(1, 2)
            ds = torch._softmax_backward_data(do_rows @ v.transpose(1, 2), p, -1, dtype)
            dq[:, :, start:end] = (ds @ k).view(kv, -1, end - start, dim)
            _scatter_add(dk, spans, ds.transpose(1, 2) @ q_rows)
            _scatter_add(dv, spans, p.transpose(1, 2) @ do_rows)
        dq, dk = dq.mul_(ctx.scaling), dk.mul_(ctx.scaling)
        return dq.view(query.shape), dk.to(dtype)[None], dv.to(dtype)[None], None, None


def _gather(x: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    parts = [x[:, start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _scatter_add(into: torch.Tensor, spans: list[tuple[int, int]], x: torch.Tensor) -> None:
    at = 0
    for start, end in spans:
        into[:, start:end] += x[:, at : at + end - start]
        at += end - start


def _probabilities(q: torch.Tensor, k: torch.Tensor, scaling: float) -> torch.Tensor:
    """(KV, R * L, S) attention of L queries in R heads whose own tokens are the last L of S keys, causally masked."""
    _, rep, length, _ = q.shape
    mask = _causal(length, k.shape[1], rep, q.dtype, q.device)
    return torch.baddbmm(mask, q.flatten(1, 2), k.transpose(1, 2), alpha=scaling).softmax(-1)


@lru_cache(maxsize=64)
def _causal(length: int, keys: int, rep: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(R * L, S) zeros, and minus infinity where a key comes after its query."""
    mask = torch.full((length, keys), float("-inf"), dtype=dtype, device=device).triu_(keys - length + 1)
    return mask.repeat(rep, 1)
