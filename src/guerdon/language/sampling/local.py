"""Sampling in-process: the prompt is computed once per group, then all completions advance together.

Keys and values of a prompt are held once and shared by its completions; each completion holds only its own. Rows form a
grid (groups, completions), so that attention to the prompts is one matmul per layer; finished rows are retired by
shrinking the grid. Random numbers belong to completions, so that a completion does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch

from guerdon.language.attention import TreeLayout
from guerdon.language.forward import GroupModel
from guerdon.language.sampling.base import Completion, Sampling
from guerdon.language.sharding import whole


class Drawn(NamedTuple):
    """A token as it is drawn: for which prompt and which of its completions, its log-prob, whether it ends it."""

    prompt: int
    completion: int
    token: int
    logp: float
    ends: bool


class LocalSampler:
    """Samples from a `GroupModel` in this process.

    Args:
        model: the policy; its current weights are used at each call.
        tokenizer: its tokenizer.
        stop_ids: token ids that end a completion.
        rows: completions that advance together, bounded for the memory of their keys and values.
    """

    def __init__(self, model: GroupModel, tokenizer: Any, stop_ids: set[int], rows: int = 64):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.stop_ids = torch.tensor(sorted(stop_ids), device=model.device)

    def sync(self, model: Any) -> None:
        """Nothing to do: the weights are shared."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
        on_step: Callable[[Sequence[Drawn]], None] | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler.sample`; `on_progress` is told of the completions that each wave finished.

        `on_step` is told after each step what was drawn for the completions that went on; what it raises ends them all.
        """
        was_training = self.model.training
        self.model.eval()
        # (prompt, its completions) in waves of equal group size; prompts of like length together pad little.
        work = [
            (p, range(at, min(at + self.rows, len(seeds[p]))))
            for p in sorted(range(len(prompts)), key=lambda p: (-len(seeds[p]), len(prompts[p])))
            for at in range(0, len(seeds[p]), self.rows)
        ]
        found: list[dict[int, Completion]] = [{} for _ in prompts]
        with whole(self.model):
            while work:
                width = len(work[0][1])
                wave = list(takewhile(lambda w: len(w[1]) == width, work[: max(1, self.rows // width)]))  # noqa: B023
                work = work[len(wave) :]
                uniforms = np.stack([_uniforms(seeds[p][c], sampling.max_new_tokens) for p, cs in wave for c in cs])
                whose = [(p, c) for p, cs in wave for c in cs]
                done = self._wave([prompts[p] for p, _ in wave], whose, uniforms, sampling, on_step)
                for (p, c), completion in zip(whose, done, strict=True):
                    found[p][c] = completion
                if on_progress is not None:
                    on_progress(len(done))
        self.model.train(was_training)
        return [[completions[c] for c in sorted(completions)] for completions in found]

    def _wave(
        self,
        prompts: list[Sequence[int]],
        whose: list[tuple[int, int]],
        uniforms: np.ndarray,
        sampling: Sampling,
        on_step: Callable[[Sequence[Drawn]], None] | None,
    ) -> list[Completion]:
        device = self.model.device
        total, steps = len(whose), sampling.max_new_tokens
        u = torch.from_numpy(uniforms).to(device)
        tokens = torch.zeros(total, steps, dtype=torch.long, device=device)
        logps = torch.zeros(total, steps, device=device)
        lengths = np.full(total, steps)
        finished = np.zeros(total, dtype=bool)
        row_of = torch.arange(total, device=device)  # which completion each row of the grid holds
        decoder = (_PaddedDecoder if self.model.padded else _GridDecoder)(
            self.model, prompts, total // len(prompts), steps
        )
        hidden = decoder.prefill()
        weight = self.model.model.get_output_embeddings().weight
        for step in range(steps):
            logits = (hidden.to(weight.dtype) @ weight.T).float()
            drawn, logp = draw(logits, u[row_of, step], sampling)
            tokens[row_of, step], logps[row_of, step] = drawn, logp
            ended = torch.isin(drawn, self.stop_ids)
            rows = row_of.cpu().numpy()
            live = ~finished[rows]
            stopped = ended.cpu().numpy() & live
            if sampling.stop:
                stopped |= live & self._ends_with_stop(tokens[row_of, : step + 1].cpu().numpy(), sampling.stop)
            if on_step is not None:
                told = zip(rows.tolist(), drawn.tolist(), logp.tolist(), stopped.tolist(), live, strict=True)
                on_step([Drawn(*whose[row], *what) for row, *what, going in told if going])
            lengths[rows[stopped]], finished[rows[stopped]] = step + 1, True
            if finished[rows].all() or step + 1 == steps:
                break
            keep = decoder.shrink(~finished[rows])
            if keep is not None:
                row_of, drawn = row_of[keep], drawn[keep]
            hidden = decoder.step(drawn)
        ends = zip(tokens.cpu().tolist(), logps.cpu().numpy(), lengths, finished.tolist(), strict=True)
        return [self.completion(ids[:n], own[:n], done, sampling) for ids, own, n, done in ends]

    def completion(self, tokens: list[int], logps: np.ndarray, finished: bool, sampling: Sampling) -> Completion:
        """Drawn tokens as the completion that they are."""
        (text,) = self.tokenizer.batch_decode([tokens], skip_special_tokens=True)
        return Completion(tokens, logps, finished, before_stop(text, sampling.stop))

    def _ends_with_stop(self, tokens: np.ndarray, stop: tuple[str, ...]) -> np.ndarray:
        tail = max(map(len, stop)) + 8  # a token has at least one character, but may share one with its neighbour
        texts = self.tokenizer.batch_decode(tokens[:, -tail:].tolist(), skip_special_tokens=True)
        return np.array([any(s in text for s in stop) for text in texts])


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token for each row by inverting its cumulative distribution at `uniform`.

    Args:
        logits: (B, V) fp32.
        uniform: (B,) in [0, 1).

    Returns:
        tokens (B,) and their log-probs (B,) at the temperature, before top-k and top-p.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    logp = (logits / sampling.temperature).log_softmax(-1)
    p = logp.exp()
    if sampling.top_k or sampling.top_p < 1:
        order = p.sort(-1, descending=True)
        kept = order.values.clone()
        if sampling.top_k:
            kept[:, sampling.top_k :] = 0
        kept[kept.cumsum(-1) - kept >= sampling.top_p] = 0  # a token stays if those before it hold less than top_p
        p = torch.zeros_like(p).scatter_(1, order.indices, kept)
    cumulative = p.cumsum(-1, dtype=torch.float64)
    at = uniform[:, None].to(torch.float64) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


def _uniforms(seed: int, n: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).random(n)


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the first stop string in it."""
    cuts = [text.find(s) for s in stop if s in text]
    return text[: min(cuts)] if cuts else text


class _GridDecoder:
    """Keys and values of G prompts and of the G x W completions that continue them; a layout in attention's sense."""

    def __init__(self, model: GroupModel, prompts: list[Sequence[int]], width: int, steps: int):
        self.model, self.width, self.prompts = model, width, prompts
        self.capacity = steps
        self.lengths = torch.tensor([len(p) for p in prompts], device=model.device)
        self.at = -1  # tokens that completions hold; -1 while the prompts are computed
        self.prompt_keys: list[torch.Tensor] = []  # per layer (G, KV, P, D)
        self.prompt_values: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []  # per layer (G * W, KV, capacity, D)
        self.values: list[torch.Tensor] = []
        longest = int(self.lengths.max())
        padding = torch.arange(longest, device=model.device)[None] >= self.lengths[:, None]
        self.padding = padding if bool(padding.any()) else None  # (G, P)

    def prefill(self) -> torch.Tensor:
        """(G * W, D) states that predict the first token of each completion."""
        device = self.model.device
        lengths = [len(p) for p in self.prompts]
        self.tree = TreeLayout(lengths, [[] for _ in lengths])
        tokens = torch.tensor([t for p in self.prompts for t in p], device=device)[None]
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        hidden = self._body(tokens, positions)[0]
        self.at = 0
        return hidden[torch.tensor(self.tree.starts[1:], device=device) - 1].repeat_interleave(self.width, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each row: (B,) ids; the (B, D) states that predict the next."""
        positions = (self.lengths + self.at).repeat_interleave(self.width)
        hidden = self._body(tokens[:, None], positions[:, None])[:, 0]
        self.at += 1
        return hidden

    def _body(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self.model.body(input_ids=tokens, position_ids=positions, use_cache=False, layout=self)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        if self.at < 0:
            self._store_prompts(key, value)
            return self.tree.attend(layer, query, key, value, scaling)
        rows, heads, _, dim = query.shape
        groups, kv, longest, _ = self.prompt_keys[layer].shape
        width, rep, own = self.width, heads // kv, self.at + 1
        self.keys[layer][:, :, self.at], self.values[layer][:, :, self.at] = key[:, :, 0], value[:, :, 0]
        q = query.view(rows, kv, rep, dim) * scaling
        by_group = q.view(groups, width, kv, rep, dim).transpose(1, 2).reshape(groups, kv, width * rep, dim)
        to_prompt = (by_group @ self.prompt_keys[layer].transpose(2, 3)).float()
        if self.padding is not None:
            to_prompt.masked_fill_(self.padding[:, None, None], float("-inf"))
        to_prompt = to_prompt.view(groups, kv, width, rep, longest).transpose(1, 2).reshape(rows, kv, rep, longest)
        to_own = (q @ self.keys[layer][:, :, :own].transpose(2, 3)).float()
        p = torch.cat([to_prompt, to_own], -1).softmax(-1).to(query.dtype)
        on_prompt = p[..., :longest].reshape(groups, width, kv, rep, longest).transpose(1, 2)
        out = on_prompt.reshape(groups, kv, width * rep, longest) @ self.prompt_values[layer]
        out = out.view(groups, kv, width, rep, dim).transpose(1, 2).reshape(rows, kv, rep, dim)
        out = out + p[..., longest:] @ self.values[layer][:, :, :own]
        return out.reshape(rows, heads, 1, dim)

    def _store_prompts(self, key: torch.Tensor, value: torch.Tensor) -> None:
        groups, longest = len(self.lengths), int(self.lengths.max())
        _, kv, _, dim = key.shape
        for x, prompts, own in ((key, self.prompt_keys, self.keys), (value, self.prompt_values, self.values)):
            padded = x.new_zeros(groups, kv, longest, dim)
            for g, part in enumerate(x[0].split(self.lengths.tolist(), 1)):
                padded[g, :, : part.shape[1]] = part
            prompts.append(padded)
            own.append(x.new_zeros(groups * self.width, kv, self.capacity, dim))

    def shrink(self, live: np.ndarray) -> torch.Tensor | None:
        """Retire finished rows where the grid becomes a quarter smaller; the rows that stay, or None for all."""
        grid = live.reshape(-1, self.width)
        groups = np.flatnonzero(grid.any(1))
        width = int(grid.sum(1).max())
        if len(groups) * width > 0.75 * grid.size:
            return None
        # Live rows first in each group; a group with fewer live rows than the widest keeps some finished ones.
        columns = np.argsort(~grid[groups], axis=1, kind="stable")[:, :width]
        keep = torch.from_numpy((groups[:, None] * self.width + columns).ravel()).to(self.lengths.device)
        chosen = torch.from_numpy(groups).to(self.lengths.device)
        for layer in range(len(self.keys)):
            self.prompt_keys[layer] = self.prompt_keys[layer][chosen]
            self.prompt_values[layer] = self.prompt_values[layer][chosen]
            self.keys[layer], self.values[layer] = self.keys[layer][keep], self.values[layer][keep]
        self.lengths = self.lengths[chosen]
        self.padding = self.padding[chosen] if self.padding is not None else None
        self.width = width
        return keep


class _PaddedDecoder:
    """The same steps with transformers' own cache and left-padded rows, for models that cannot compute on groups."""

    def __init__(self, model: GroupModel, prompts: list[Sequence[int]], width: int, steps: int):
        self.model, self.width = model, width
        longest = max(map(len, prompts))
        tokens, mask = (
            np.zeros((len(prompts), longest), dtype=np.int64),
            np.zeros((len(prompts), longest), dtype=np.int64),
        )
        for i, p in enumerate(prompts):
            tokens[i, longest - len(p) :], mask[i, longest - len(p) :] = p, 1
        self.tokens = torch.from_numpy(tokens).to(model.device).repeat_interleave(width, 0)
        self.mask = torch.from_numpy(mask).to(model.device).repeat_interleave(width, 0)

    def prefill(self) -> torch.Tensor:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.model.config)
        return self._body(self.tokens, (self.mask.cumsum(1) - 1).clamp_(min=0))

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return self._body(tokens[:, None], self.mask.sum(1, keepdim=True) - 1)

    def _body(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self.model.body(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden: torch.Tensor = out.last_hidden_state[:, -1]
        return hidden

    def shrink(self, live: np.ndarray) -> torch.Tensor | None:
        if live.mean() > 0.75:
            return None
        keep = torch.from_numpy(np.flatnonzero(live)).to(self.mask.device)
        self.cache.batch_select_indices(keep)
        self.mask = self.mask[keep]
        return keep
