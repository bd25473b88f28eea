"""Groups packed into one row without padding, and what a loss needs to read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from guerdon.language.groups import ROOT, Group
from guerdon.lazy import torch

if TYPE_CHECKING:
    from guerdon.language.attention import TreeLayout


@dataclass
class Batch:
    """A micro-batch: T tokens in one row, S segments, C completions, N learned tokens, P pairs.

    Attributes:
        groups: the groups, in the order of their completions.
        tokens, positions: (1, T); positions restart after the parent segment, so that siblings share them.
        source: (N,) where in the row the hidden state lies that predicts each learned token. For the first token of a
            segment this is the last token of its parent.
        target: (N,) the learned token ids.
        segment: (N,) segment of each learned token.
        path: (2, M) (completion, segment) incidences: every segment on the path of every completion.
        last: (C,) where in the row each completion ends.
        group: (C,) group of each completion.
        lengths: (C,) learned tokens of each completion.
        pairs: (P, 2) (better, worse) completions.
        values: per-completion values by name, each (C,).
        token_values: per-learned-token values by name, each (N,).
        layout: who attends to whom.
        totals: denominators counted over the global batch, of which this micro-batch is a part.
    """

    groups: list[Group]
    tokens: torch.Tensor
    positions: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    segment: torch.Tensor
    path: torch.Tensor
    last: torch.Tensor
    group: torch.Tensor
    lengths: torch.Tensor
    pairs: torch.Tensor
    values: dict[str, torch.Tensor]
    token_values: dict[str, torch.Tensor]
    layout: TreeLayout
    totals: dict[str, float] = field(default_factory=dict)

    def per_completion(self, x: torch.Tensor) -> torch.Tensor:
        """(N,) values of learned tokens summed along each completion's path: (C,)."""
        segments = x.new_zeros(len(self.layout.lengths)).index_add(0, self.segment, x)
        completions, on_path = self.path
        return x.new_zeros(len(self.last)).index_add(0, completions, segments[on_path])

    def spread(self, v: torch.Tensor) -> torch.Tensor:
        """(C,) values of completions on their learned tokens: (N,); a shared token gets the sum of its completions."""
        completions, on_path = self.path
        segments = v.new_zeros(len(self.layout.lengths)).index_add(0, on_path, v[completions])
        return segments[self.segment]

    @cached_property
    def completion(self) -> torch.Tensor:
        """(N,) the completion of each learned token; of a shared token, the first that passes through it."""
        completions, on_path = self.path
        first = torch.full((len(self.layout.lengths),), len(self.last), device=self.tokens.device)
        return first.scatter_reduce(0, on_path, completions, "amin")[self.segment]


def pack(groups: Sequence[Group], device: str | torch.device = "cpu", totals: dict[str, float] | None = None) -> Batch:
    """Lay groups end to end in one row.

    Raises:
        ValueError: where groups do not carry the same values.
    """
    from guerdon.language.attention import TreeLayout

    lengths: list[int] = []
    ancestors: list[list[int]] = []
    tokens, positions, source, target, segment = [], [], [], [], []
    path_completion, path_segment, group_of, learned = [], [], [], []
    last: list[int] = []
    pairs: list[tuple[int, int]] = []
    token_values: dict[str, list[np.ndarray]] = {}
    names = set(groups[0].values)
    token_names = {name for s in groups[0].segments if s.learn.any() for name in s.values}
    start = 0
    for g, group in enumerate(groups):
        if set(group.values) != names:
            raise ValueError(f"groups carry different values: {sorted(names)} and {sorted(group.values)}")
        first_segment, first_completion = len(lengths), len(last)
        starts: list[int] = []
        depths: list[int] = []
        for s in group.segments:
            at = first_segment + len(starts)
            is_root = s.parent == ROOT
            depth = 0 if is_root else depths[s.parent] + lengths[first_segment + s.parent]
            before = start - 1 if is_root else starts[s.parent] + lengths[first_segment + s.parent] - 1
            # What predicts token i of a segment is token i - 1, and for i = 0 the end of the parent.
            predictor = np.arange(start - 1, start + len(s) - 1)
            if len(s):
                predictor[0] = before
            where = np.flatnonzero(s.learn)
            tokens.append(s.tokens)
            positions.append(np.arange(depth, depth + len(s)))
            source.append(predictor[where])
            target.append(s.tokens[where])
            segment.append(np.full(len(where), at))
            if len(where):
                if set(s.values) != token_names:
                    raise ValueError(f"segments carry different values: {sorted(token_names)} and {sorted(s.values)}")
                for name, array in s.values.items():
                    token_values.setdefault(name, []).append(array[where])
            ancestors.append([] if is_root else [*ancestors[first_segment + s.parent], first_segment + s.parent])
            lengths.append(len(s))
            starts.append(start)
            depths.append(depth)
            start += len(s)
        for c, leaf in enumerate(group.leaves):
            path = [*ancestors[first_segment + leaf], first_segment + leaf]
            path_segment.extend(path)
            path_completion.extend([first_completion + c] * len(path))
            last.append(starts[leaf] + len(group.segments[leaf]) - 1)
            group_of.append(g)
        learned.append(group.lengths())
        pairs.extend((first_completion + a, first_completion + b) for a, b in group.pairs)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def integers(parts: Sequence[np.ndarray]) -> torch.Tensor:
        return tensor(np.concatenate(parts).astype(np.int64))

    return Batch(
        groups=list(groups),
        tokens=integers(tokens)[None],
        positions=integers(positions)[None],
        source=integers(source),
        target=integers(target),
        segment=integers(segment),
        path=tensor(np.array([path_completion, path_segment], dtype=np.int64)),
        last=tensor(np.array(last, dtype=np.int64)),
        group=tensor(np.array(group_of, dtype=np.int64)),
        lengths=tensor(np.concatenate(learned).astype(np.float32)),
        pairs=tensor(np.array(pairs, dtype=np.int64).reshape(-1, 2)),
        values={n: tensor(np.concatenate([g.values[n] for g in groups]).astype(np.float32)) for n in sorted(names)},
        token_values={n: tensor(np.concatenate(v).astype(np.float32)) for n, v in sorted(token_values.items())},
        layout=TreeLayout(lengths, ancestors),
        totals=totals or {},
    )


def unpack(batch: Batch, name: str, x: torch.Tensor) -> None:
    """Write (N,) values of learned tokens back into the segments of the batch's groups as `values[name]`."""
    flat = x.detach().float().cpu().numpy()
    at = 0
    for group in batch.groups:
        for s in group.segments:
            where = np.flatnonzero(s.learn)
            if len(where):
                array = np.zeros(len(s), dtype=np.float32)
                array[where] = flat[at : at + len(where)]
                s.values[name] = array
                at += len(where)
