"""Peak resident memory of one DPO and one GRPO update, and whether ours depends on the size of the vocabulary."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import common, dpo, grpo_update

SHAPE = (256, 64)  # tokens of prompt and completion of the pairs
VOCABULARIES = (49_152, 151_936)
# Weights and gradients in bf16; in fp32 their masters, the sums of gradients and two moments.
STATE_BYTES = 2 + 2 + 4 + 4 + 8


def steady_peak(threads: int, build: common.Build, *args: Any) -> int:
    """The highest peak of the steps after the first, which allocates the optimiser's state."""
    with common.Side(threads, build, *args) as side:
        return max(side.step().peak for _ in range(3))


def checkpointing(bench: str, *args: Any) -> Callable[[], Any]:
    """Our step with gradient checkpointing, which TRL's default has too."""
    step: Callable[[], Any] = importlib.import_module(bench).ours("bf16", *args, gradient_checkpointing=True)
    return step


def other_vocabulary(vocabulary: int) -> Callable[[], Any]:
    """Our DPO step on a model of SmolLM2's shape and random weights, with another vocabulary."""
    from transformers import LlamaForCausalLM

    from guerdon.language.models import load_model, save_model

    model, tokenizer = load_model(common.MODEL)
    model.config.vocab_size = vocabulary
    directory = tempfile.mkdtemp()
    save_model(LlamaForCausalLM(model.config), tokenizer, directory)
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
    options = common.arguments(__doc__ or "", repeats=False)
    found: dict[str, Any] = {}
    for name, bench, args in (("dpo", dpo, (SHAPE,)), ("grpo", grpo_update, ())):
        sides: dict[str, tuple[Any, ...]] = {
            "ours": (bench.ours, "bf16", *args),
            "ours checkpointing": (checkpointing, bench.__name__, *args),
            **{f"trl {setting}": (bench.trl, setting, *args) for setting in ("autocast", "bf16 weights", "default")},
        }
        found[name] = {side: steady_peak(options.threads, *what) for side, what in sides.items()}
        shown = ", ".join(f"{side} {peak / 2**30:.2f} GiB" for side, peak in found[name].items())
        print(f"{name} update: {shown}", flush=True)
    found["vocabulary"] = {}
    for size in VOCABULARIES:
        peak, state = steady_peak(options.threads, other_vocabulary, size), STATE_BYTES * parameters(size)
        found["vocabulary"][size] = {"peak": peak, "state": state}
        print(f"vocabulary of {size}: {peak / 2**30:.2f} GiB, of which {state / 2**30:.2f} are state", flush=True)
    common.save("memory", options.threads, found)


if __name__ == "__main__":
    main()
