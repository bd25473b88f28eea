"""The group: one prompt, the completions that share it, and what was said about each.

A group is a tree of token segments with parent pointers. A demonstration is a prompt with one completion, a preference
a prompt with two, a sample for GRPO a prompt with n; an episode with branches is the same tree grown deeper. Masks are
made where the tokens are made and ride along with them; nothing downstream computes a mask again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

ROOT = -1


@dataclass(slots=True)
class Segment:
    """A run of tokens that follows its parent segment.

    Attributes:
        tokens: (length,) int64 token ids.
        learn: (length,) bool, True where the token is learned. The first token of a root has no predecessor to predict
            it, so it is never learned.
        parent: index of the parent segment within the group; ROOT (-1) for the root.
        values: per-token numbers, (length,) float32 each, aligned with `tokens` (old_logps, ref_logps, advantage, ...).
    """

    tokens: np.ndarray
    learn: np.ndarray
    parent: int = ROOT
    values: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.tokens, dtype=np.int64)
        self.learn = np.asarray(self.learn, dtype=bool)
        if self.tokens.shape != self.learn.shape:
            raise ValueError(f"{len(self.tokens)} tokens but a mask of {len(self.learn)}")
        if self.parent == ROOT and len(self.learn) and self.learn[0]:
            self.learn = self.learn.copy()
            self.learn[0] = False

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class Group:
    """One tree of segments, its completions, and the values that ride along.

    Attributes:
        segments: parents before children; segment 0 is the root (the prompt).
        leaves: for each completion, the segment in which it ends. A completion is the path from the root to its leaf.
        values: per-completion numbers, each (n,) float32: score, reward, advantage, ref_logp, ...
        pairs: (better, worse) completion indices that a preference loss compares.
        columns: the record's other columns (answer, critique, text of the prompt, ...).
        key: identity of the group, stable between runs: for caches, splits and messages.
    """

    segments: list[Segment]
    leaves: list[int]
    values: dict[str, np.ndarray] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    key: str = ""

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        completions: Sequence[Sequence[int]],
        learn: Sequence[Sequence[bool]] | None = None,
        **rest: Any,
    ) -> Group:
        """A tree of depth one: a prompt that is not learned and completions that are (or where `learn` says so)."""
        root = Segment(np.asarray(prompt), np.zeros(len(prompt), dtype=bool))
        masks = learn if learn is not None else [np.ones(len(c), dtype=bool) for c in completions]
        children = [Segment(np.asarray(c), np.asarray(m), parent=0) for c, m in zip(completions, masks, strict=True)]
        return cls([root, *children], list(range(1, len(children) + 1)), **rest)

    def __len__(self) -> int:
        return len(self.leaves)

    def path(self, completion: int) -> list[int]:
        """Segment indices from the root to the leaf of one completion."""
        found, at = [], self.leaves[completion]
        while at != ROOT:
            found.append(at)
            at = self.segments[at].parent
        return found[::-1]

    def sequence(self, completion: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and learn mask of one completion with everything before it, as a separate row would hold them."""
        path = [self.segments[s] for s in self.path(completion)]
        return np.concatenate([s.tokens for s in path]), np.concatenate([s.learn for s in path])

    @property
    def unique_tokens(self) -> int:
        """Tokens that the group forward computes."""
        return sum(len(s) for s in self.segments)

    @property
    def learned_tokens(self) -> int:
        return int(sum(s.learn.sum() for s in self.segments))

    def lengths(self) -> np.ndarray:
        """(n,) learned tokens on the path of each completion."""
        return np.array([sum(int(self.segments[s].learn.sum()) for s in self.path(c)) for c in range(len(self))])

    def subset(self, completions: Sequence[int]) -> Group:
        """The same tree with only these completions, and only the segments on their paths."""
        keep = sorted({s for c in completions for s in self.path(c)})
        index = {old: new for new, old in enumerate(keep)} | {ROOT: ROOT}
        order = {old: new for new, old in enumerate(completions)}
        return Group(
            segments=[replace(self.segments[s], parent=index[self.segments[s].parent]) for s in keep],
            leaves=[index[self.leaves[c]] for c in completions],
            values={name: array[list(completions)] for name, array in self.values.items()},
            pairs=[(order[a], order[b]) for a, b in self.pairs if a in order and b in order],
            columns=self.columns,
            key=self.key,
        )


def micro_batches(groups: Sequence[Group], max_tokens: int, per_completion: bool = False) -> Iterator[list[Group]]:
    """Cut groups into lists of at most `max_tokens` unique tokens, longest first, so that nothing is padded.

    A group is never cut unless `per_completion` says that the loss is a sum over completions; its prompt is then
    repeated once in each part. What cannot be cut and is longer than the budget comes alone.
    """
    parts: list[Group] = []
    for group in groups:
        parts.extend(_split(group, max_tokens) if per_completion else [group])
    parts.sort(key=lambda g: -g.unique_tokens)
    batch: list[Group] = []
    size = 0
    for part in parts:
        if batch and size + part.unique_tokens > max_tokens:
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += part.unique_tokens
    if batch:
        yield batch


def _split(group: Group, max_tokens: int) -> Iterator[Group]:
    chosen: list[int] = []
    for completion in range(len(group)):
        if chosen and group.subset([*chosen, completion]).unique_tokens > max_tokens:
            yield group.subset(chosen)
            chosen = []
        chosen.append(completion)
    yield group if len(chosen) == len(group) else group.subset(chosen)
