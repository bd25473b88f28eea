"""Random groups and small models of several architectures, for tests of the language core."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from guerdon.language.groups import Group, Segment

VOCABULARY = 4099  # more than one tile of columns in the fused log-probs, and not a multiple of it
# Wide initial weights, so that attention and positions matter to the result.
BUILT = {
    "initializer_range": 0.2,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
SMALL = {"vocab_size": VOCABULARY, "intermediate_size": 96, "bos_token_id": 1, "eos_token_id": 2, **BUILT}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, initializer_range=0.2, n_embd=48, n_layer=2, n_head=6, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip


def build(style: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[style]))


def flat_group(rng: np.random.Generator, n: int, prompt: int, longest: int) -> Group:
    """A prompt with n completions of random length, of which random tokens are learned."""
    lengths = rng.integers(1, longest + 1, n)
    return Group.of(
        rng.integers(0, VOCABULARY, prompt),
        [rng.integers(0, VOCABULARY, k) for k in lengths],
        learn=[rng.random(k) < 0.8 for k in lengths],
    )


def random_tree(rng: np.random.Generator, segments: int, longest: int) -> Group:
    """Segments that hang below random earlier ones; every segment without children is a leaf."""
    parents = [-1] + [int(rng.integers(0, i)) for i in range(1, segments)]
    made = []
    for parent in parents:
        length = int(rng.integers(1, longest + 1))
        made.append(Segment(rng.integers(0, VOCABULARY, length), rng.random(length) < 0.7, parent))
    return Group(made, [i for i in range(segments) if i not in parents])
