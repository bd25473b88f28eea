"""What a token classifier would keep of a prompt (LLMLingua-2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from guerdon.errors import ConfigError
from guerdon.language.models import load_other
from guerdon.lazy import torch

if TYPE_CHECKING:
    from guerdon.language.prompting import Prompt

KEPT = 1  # the class of tokens that are kept


def keep_probabilities(prompt: Prompt, name: str) -> np.ndarray:
    """(len(prompt),) mean probability that the classifier's tokens over each token of the prompt are kept.

    Slots are read as empty. What the classifier does not see, line breaks say, has probability 1. Long prompts are read
    in windows.

    Args:
        name: a token classifier of transformers with two classes, the second of which is kept; directory or hub id.

    Raises:
        ConfigError: there is none, or one of other classes.
    """
    model, tokenizer = load_other("ForTokenClassification", name)
    if model.config.num_labels != 2:
        raise ConfigError(
            f"model '{name}' tells {model.config.num_labels} classes of tokens apart, not two: left out, kept."
        )
    pieces = ["" if i in prompt.slots else token for i, token in enumerate(prompt.tokens)]
    ends = np.cumsum([len(piece) for piece in pieces])
    windows = tokenizer(
        "".join(pieces),
        truncation=True,
        max_length=min(tokenizer.model_max_length, 512),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    total, count = np.zeros(int(ends[-1])), np.zeros(int(ends[-1]))
    for ids, offsets in zip(windows["input_ids"], windows["offset_mapping"], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
        for (a, b), p in zip(offsets, logits.float().softmax(-1)[:, KEPT].tolist(), strict=True):
            total[a:b] += p
            count[a:b] += 1
    return np.array(
        [
            (total[end - len(piece) : end].sum() / seen) if (seen := count[end - len(piece) : end].sum()) else 1.0
            for piece, end in zip(pieces, ends, strict=True)
        ]
    )
