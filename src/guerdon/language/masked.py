"""Masked language models that answer: the class is the word that fills the mask of a prompt best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from guerdon.errors import ConfigError
from guerdon.language.models import load_other
from guerdon.language.policy import cast, resolve_precision
from guerdon.language.prompting import MASK, Answerer, Prompt
from guerdon.lazy import torch


@dataclass(frozen=True)
class Masked:
    """A masked language model with its tokenizer."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class MaskedAnswerer(Answerer):
    """A masked language model that answers items under any prompt with a slot `{mask}`."""

    policy: Masked  # type: ignore[assignment]  # which has no group forward and cannot write

    @classmethod
    def load(cls, name: str, precision: str, words: Mapping[str, str], max_tokens: int = 4096) -> MaskedAnswerer:
        """By a directory or a hub id.

        Raises:
            ConfigError: there is no such model, or it fills no masks.
        """
        model, tokenizer = load_other("ForMaskedLM", name)
        if tokenizer.mask_token is None:
            raise ConfigError(f"model '{name}' has no mask token, so that it cannot fill the template's {{{MASK}}}.")
        cast(model, resolve_precision(precision, model))
        return cls(Masked(model, tokenizer), "classification", words, max_tokens=max_tokens)

    def _logps(
        self, prompts: Sequence[Prompt], asked: Sequence[tuple[Mapping[str, str], tuple[str, ...]]]
    ) -> list[list[np.ndarray]]:
        """For each prompt and each (columns, choices) the log-probs (choices,) of the choices in the mask."""
        tokenizer = self.policy.tokenizer
        (ids,) = {
            tuple(tokenizer(f" {self.words[choice]}", add_special_tokens=False).input_ids[0] for choice in choices)
            for _, choices in asked
        }
        rows = [self._row(prompt, columns) for prompt in prompts for columns, _ in asked]
        found = self._at_masks(rows, ids)
        return [list(found[i : i + len(asked)]) for i in range(0, len(found), len(asked))]

    def _row(self, prompt: Prompt, columns: Mapping[str, str]) -> tuple[list[int], int]:
        """The tokens of a prompt filled with an item, and where among them the mask of the prompt is."""
        tokenizer = self.policy.tokenizer
        filled = {**columns, MASK: tokenizer.mask_token}
        slot = next(i for i in prompt.slots if prompt.tokens[i] == MASK)
        start = len(prompt.keep(range(slot)).fill(filled))  # an item may hold a mask of its own
        encoded = tokenizer(prompt.fill(filled), return_offsets_mapping=True)
        at = next(k for k, (a, b) in enumerate(encoded.offset_mapping) if a <= start < b)
        config = self.policy.model.config
        most = min(tokenizer.model_max_length, config.max_position_embeddings)
        if len(encoded.input_ids) > most:
            raise ConfigError(
                f"a prompt with its item has {len(encoded.input_ids)} tokens, and the model reads {most}: give fewer "
                "--shots, or shorter items."
            )
        return encoded.input_ids, at

    @torch.no_grad()
    def _at_masks(self, rows: Sequence[tuple[list[int], int]], ids: Sequence[int]) -> np.ndarray:
        """(rows, len(ids)) log-probs at the masks, in batches of at most `max_tokens` padded tokens."""
        model, pad = self.policy.model, self.policy.tokenizer.pad_token_id
        found = np.empty((len(rows), len(ids)))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        while order:
            width = len(rows[order[-1]][0])
            size = max(1, self.max_tokens // width)
            part, order = order[-size:], order[:-size]
            tokens = torch.full((len(part), width), pad, device=model.device)
            for k, i in enumerate(part):
                tokens[k, : len(rows[i][0])] = torch.tensor(rows[i][0])
            lengths = torch.tensor([len(rows[i][0]) for i in part], device=model.device)
            mask = torch.arange(width, device=model.device) < lengths[:, None]
            with _only(model, torch.tensor([rows[i][1] for i in part], device=model.device)):
                logits = model(input_ids=tokens, attention_mask=mask.long()).logits[:, 0]
            found[part] = logits.float().log_softmax(-1)[:, list(ids)].cpu().numpy()
        return found


@contextmanager
def _only(model: Any, places: torch.Tensor) -> Iterator[None]:
    """The model's output layer reads one position of each row, and not the whole text."""

    def keep(module: Any, given: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[torch.arange(len(places)), places][:, None]
        return output

    handle = model.base_model.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
