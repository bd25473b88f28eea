"""Log-probs of given continuations: whatever beginnings they share is computed once.

The sequences are laid out as a trie of tokens, in preorder, so that row i sees row j just where j <= i < end[j], with
`end[j]` the row after the last descendant of j. That is the whole attention mask, for a prefix with many continuations
as for few-shot prompts with many items and several answers to each. The last token of a sequence is predicted and never
read; continuations of one token therefore cost nothing beyond their context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from guerdon.language.forward import GroupModel
from guerdon.language.groups import Group
from guerdon.language.logprobs import token_logps
from guerdon.language.policy import annotate

Ids = Sequence[int]
QUERY_BLOCK = 128  # rows of scores held at once


def score(model: GroupModel, prefix: Ids, continuations: Sequence[Ids], *, max_tokens: int = 4096) -> list[np.ndarray]:
    """Log-probs of the tokens of each continuation of one prefix, which is computed once; see `score_pairs`."""
    return score_pairs(model, [(prefix, continuation) for continuation in continuations], max_tokens=max_tokens)


@torch.no_grad()
def score_pairs(model: GroupModel, pairs: Sequence[tuple[Ids, Ids]], *, max_tokens: int = 4096) -> list[np.ndarray]:
    """log p(continuation | context), token by token, for many pairs; beginnings that pairs share are computed once.

    Args:
        model: a model on groups; one that computes padded rows instead shares nothing.
        pairs: (context, continuation) token ids; a context has at least one token (a start token, say).
        max_tokens: computed in one forward pass: bounds the memory. Keys and values that later passes need are kept.

    Returns:
        For each pair (length of its continuation,) float32, at temperature 1.

    Raises:
        ValueError: an empty context, from which nothing can be predicted.
    """
    if not all(len(context) for context, _ in pairs):
        raise ValueError("a context is empty: begin it with the tokenizer's start token")
    was_training = model.training
    model.eval()
    try:
        found = _separately(model, pairs, max_tokens) if model.padded else _together(model, pairs, max_tokens)
    finally:
        model.train(was_training)
    return found


def _separately(model: GroupModel, pairs: Sequence[tuple[Ids, Ids]], max_tokens: int) -> list[np.ndarray]:
    groups = [Group.of(context, [continuation]) for context, continuation in pairs]
    annotate(model, [group for group in groups if group.learned_tokens], "logps", "logps", 1.0, max_tokens)
    return [group.segments[1].values.get("logps", np.zeros(0, np.float32)) for group in groups]


def _together(model: GroupModel, pairs: Sequence[tuple[Ids, Ids]], max_tokens: int) -> list[np.ndarray]:
    lengths = [len(continuation) for _, continuation in pairs]
    target = torch.tensor([t for _, continuation in pairs for t in continuation], device=model.device)
    if not sum(lengths):
        return [np.zeros(0, np.float32) for _ in pairs]
    trie = Trie([(*context, *continuation[:-1]) if len(continuation) else () for context, continuation in pairs])
    paths = [rows[len(rows) - n :] if n else [] for rows, n in zip(trie.paths, lengths, strict=True)]
    source, first, state = np.unique(np.concatenate(paths).astype(int), return_index=True, return_inverse=True)
    hidden = _states(model, trie, source, max_tokens)
    weight = model.model.get_output_embeddings().weight
    hidden = hidden.to(weight.dtype)
    # One softmax for each state; where several tokens follow it, their logits differ by a dot product.
    at = torch.from_numpy(state).to(model.device)
    leader = target[torch.from_numpy(first).to(model.device)]
    logps, _ = token_logps(hidden, weight, leader)
    others = (at.new_tensor(first)[at] != torch.arange(len(at), device=at.device)).nonzero().squeeze(-1)
    logps = logps[at]
    apart = weight[target[others]].float() - weight[leader[at[others]]].float()
    logps[others] += torch.linalg.vecdot(hidden[at[others]].float(), apart)
    return np.split(logps.cpu().numpy(), np.cumsum(lengths)[:-1])


class Trie:
    """Sequences of tokens with their shared beginnings merged; T rows in preorder.

    Attributes:
        tokens, depth, end: (T,) token, its position in its sequences, and the row after its last descendant.
        paths: for each sequence the rows of its tokens.
    """

    def __init__(self, sequences: Sequence[tuple[int, ...]]):
        tokens: list[int] = []
        depth: list[int] = []
        end: list[int] = []
        self.paths: list[list[int]] = [[] for _ in sequences]
        path: list[int] = []
        before: tuple[int, ...] = ()
        for i in sorted(range(len(sequences)), key=sequences.__getitem__):
            sequence = sequences[i]
            shared = next((k for k, (a, b) in enumerate(zip(before, sequence, strict=False)) if a != b), len(before))
            for row in path[shared:]:
                end[row] = len(tokens)
            path[shared:] = range(len(tokens), len(tokens) + len(sequence) - shared)
            tokens += sequence[shared:]
            depth += range(shared, len(sequence))
            end += [0] * (len(sequence) - shared)
            self.paths[i] = path.copy()
            before = sequence
        for row in path:
            end[row] = len(tokens)
        self.tokens, self.depth, self.end = np.array(tokens), np.array(depth), np.array(end)

    def __len__(self) -> int:
        return len(self.tokens)


def _states(model: GroupModel, trie: Trie, wanted: np.ndarray, max_tokens: int) -> torch.Tensor:
    """(len(wanted), D) hidden states of some rows, in parts of at most `max_tokens` rows."""
    layout = _TrieLayout(trie.end, model.dtype, model.device)
    found = []
    for start in range(0, len(trie), max_tokens):
        stop = min(start + max_tokens, len(trie))
        layout.begin(start, stop)
        rows = slice(start, stop)
        tokens, positions = (torch.from_numpy(x[rows])[None].to(model.device) for x in (trie.tokens, trie.depth))
        hidden = model.body(input_ids=tokens, position_ids=positions, use_cache=False, layout=layout).last_hidden_state
        inside = wanted[(wanted >= start) & (wanted < stop)] - start
        found.append(hidden[0, torch.from_numpy(inside).to(model.device)])
    return torch.cat(found)


class _TrieLayout:
    """Attention over the rows of a trie, part by part; see `attention.Layout`.

    Of the parts before, the keys and values of those rows are held that have descendants to come.
    """

    def __init__(self, end: np.ndarray, dtype: torch.dtype, device: torch.device):
        self.end, self.dtype, self.device = end, dtype, device
        self.held = np.arange(0)
        self.keep = torch.arange(0, device=device)
        self.past: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, start: int, stop: int) -> None:
        """Go on to the rows from `start` to `stop`."""
        rows = np.concatenate([self.held, np.arange(start, stop)])
        self.blocks = []
        for a in range(start, stop, QUERY_BLOCK):
            b = min(a + QUERY_BLOCK, stop)
            seen = np.flatnonzero((rows < b) & (self.end[rows] > a))
            query, key = np.arange(a, b)[:, None], rows[seen]
            mask = torch.zeros(b - a, len(seen), dtype=self.dtype)
            mask[torch.from_numpy((key > query) | (query >= self.end[key]))] = float("-inf")
            self.blocks.append((slice(a - start, b - start), self._index(seen), mask.to(self.device)))
        staying = self.end[rows] > stop
        self.held, self.keep = rows[staying], self._index(np.flatnonzero(staying))

    def _index(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        if layer in self.past:
            key, value = (torch.cat(parts, 2) for parts in zip(self.past[layer], (key, value), strict=True))
        self.past[layer] = key.index_select(2, self.keep), value.index_select(2, self.keep)
        _, heads, total, dim = query.shape
        kv = key.shape[1]
        rep = heads // kv
        out = torch.empty_like(query, memory_format=torch.contiguous_format).view(kv, rep, total, dim)
        folded = query[0].view(kv, rep, total, dim)  # query heads that share a key head become rows
        for rows, seen, mask in self.blocks:
            q, k, v = folded[:, :, rows].flatten(1, 2), key[0].index_select(1, seen), value[0].index_select(1, seen)
            p = torch.baddbmm(mask.repeat(rep, 1), q, k.transpose(1, 2), alpha=scaling).softmax(-1)
            out[:, :, rows] = (p @ v).view(kv, rep, -1, dim)
        return out.view(1, heads, total, dim)
