"""A DPO step of 4 pairs against TRL's DPOTrainer, reference log-probs precomputed on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common

PAIRS = 4
BARS = {(256, 64): 3.0, (32, 128): 1.3}  # by tokens of (prompt, completion)


def groups(tokenizer: Any, model: Any, shape: tuple[int, int]) -> list[Any]:
    """Pairs with reference log-probs a little off the policy's; the same ones in every process."""
    found = common.text_groups(tokenizer, PAIRS, 2, shape)
    common.noisy_logps(found, model, "ref_logps", noise=0.3)
    for group in found:
        group.pairs, group.values["score"] = [(0, 1)], np.array([1, 0], np.float32)
    return found


def reference_groups(shape: tuple[int, int]) -> list[Any]:
    from guerdon.language.forward import GroupModel
    from guerdon.language.models import load_model

    model, tokenizer = load_model(common.MODEL)
    return groups(tokenizer, GroupModel(model), shape)


def ours(precision: str, shape: tuple[int, int], **options: Any) -> Callable[[], Any]:
    from guerdon.methods.preferences.dpo import DPO

    batch = reference_groups(shape)
    return common.our_step(DPO(beta=0.1, **common.OUR_OPTIMIZER), lambda run: batch, precision, **options)


def trl(setting: str, shape: tuple[int, int]) -> Callable[[], Any]:
    common.quiet()
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from guerdon.language.models import load_model

    how = common.TRL_SETTINGS[setting]
    model, tokenizer = load_model(common.MODEL, dtype=how["dtype"])
    precomputed = setting != "default"
    trainer = DPOTrainer(
        model=model,
        ref_model=None if precomputed else load_model(common.MODEL)[0],
        args=DPOConfig(
            per_device_train_batch_size=PAIRS,
            precompute_ref_log_probs=precomputed,
            beta=0.1,
            **how["options"],
            **common.TRL_OPTIONS,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * PAIRS),
        processing_class=tokenizer,
    )
    rows = []
    for group in reference_groups(shape):
        prompt, chosen, rejected = group.segments
        row = {
            "prompt_ids": prompt.tokens.tolist(),
            "chosen_ids": chosen.tokens.tolist(),
            "rejected_ids": rejected.tokens.tolist(),
        }
        if precomputed:
            row["ref_chosen_logps"] = float(chosen.values["ref_logps"].sum())
            row["ref_rejected_logps"] = float(rejected.values["ref_logps"].sum())
        rows.append(row)
    return common.trl_step(trainer, trainer.data_collator(rows))


def main() -> None:
    options = common.arguments(__doc__ or "")
    from guerdon.language.models import load_model

    model, tokenizer = load_model(common.MODEL)
    found = {}
    for shape, bar in BARS.items():
        flops = common.useful_flops(common.text_groups(tokenizer, PAIRS, 2, shape), model.config, logits=True)
        row = common.compare_updates(ours, trl, shape, flops=flops, bar=bar, **vars(options))
        common.show(name := f"dpo {shape[0]}/{shape[1]}", row)
        found[name] = row
    common.save("dpo", options.threads, found)


if __name__ == "__main__":
    main()
