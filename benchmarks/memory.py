"""Peak resident memory of one DPO and one GRPO update, and whether ours depends on the size of the vocabulary."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common, dpo, grpo_update

SHAPE = (256, 64)  # tokens of prompt and completion of the pairs
VOCABULARIES = (49_152, 151_936)
# Weights and gradients in bf16; in fp32 their masters, the sums of gradients and two moments.
STATE_BYTES = 2 + 2 + 4 + 4 + 8


def steady_peak(threads: int, build: common.Build, *args: Any) -> int:
    """The highest peak of the steps after the first, which allocates the optimiser's state."""
    with common.Side(threads, build, *args) as side:
        return max(side.step().peak for _ in range(3))


def random_model(vocabulary: int) -> Callable[[], Any]:
    """Our DPO step on a model of SmolLM2's shape and random weights, with another vocabulary."""
    from transformers import LlamaForCausalLM

    from guerdon.language.models import load_model, save_model

    model, tokenizer = load_model(common.MODEL)
    model.config.vocab_size = vocabulary
    directory = tempfile.mkdtemp()
    save_model(LlamaForCausalLM(model.config), tokenizer, directory)
    del model
    return dpo.ours("bf16", SHAPE, model=directory)


def parameters(vocabulary: int) -> int:
    import torch
    from transformers import LlamaForCausalLM

    from guerdon.language.models import load_model

    config = load_model(common.MODEL)[0].config
    config.vocab_size = vocabulary
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def main() -> None:
    options = common.arguments(__doc__ or "")
    found: dict[str, Any] = {}
    benches = {"dpo": (dpo, (SHAPE,)), "grpo": (grpo_update, ())}
    for name, (bench, args) in benches.items():
        peaks = {f"trl {s}": steady_peak(options.threads, bench.trl, s, *args) for s in ("autocast", "bf16 weights", "default")}
        peaks["ours"] = steady_peak(options.threads, bench.ours, "bf16", *args)
        found[name] = peaks
        print(f"{name}:", ", ".join(f"{side} {peak / 2**30:.2f} GiB" for side, peak in peaks.items()), flush=True)
    rest = {}
    for vocabulary in VOCABULARIES:
        peak, state = steady_peak(options.threads, random_model, vocabulary), STATE_BYTES * parameters(vocabulary)
        rest[vocabulary] = peak - state
        print(f"vocabulary {vocabulary}: {peak / 2**30:.2f} GiB, {(peak - state) / 2**30:.2f} beyond {state / 2**30:.2f} of state")
    found["vocabulary"] = rest
    common.save("memory", options.threads, found)
