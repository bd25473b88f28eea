"""Tiny bidirectional models with random weights, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from guerdon.language.tiny import TinyConfig, build_tokenizer


def save_encoder(
    directory: Path, kind: str, texts: Sequence[str], family: str = "Roberta", labels: Sequence[str] = (), seed: int = 0
) -> tuple[Any, Any]:
    """A model of transformers' auto class `AutoModel{kind}` that knows the words of `texts`, and its tokenizer."""
    tokenizer = build_tokenizer(TinyConfig(vocab="word"), texts)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.model_max_length = 200
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(labels or ("LABEL_0", "LABEL_1"))),
        label2id={label: i for i, label in enumerate(labels or ("LABEL_0", "LABEL_1"))},
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"AutoModel{kind}").from_config(config).eval()
    for p in model.parameters():
        p.data = 5 * p.data  # far from uniform
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer
