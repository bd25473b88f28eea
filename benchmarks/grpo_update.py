"""A GRPO update of 2 groups of 8 completions, without KL term, against TRL's GRPOTrainer; the samples are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common

GROUPS, SIZE = 2, 8
SHAPE = (128, 64)  # tokens of prompt and completion
BAR = 2.0


def groups(tokenizer: Any, model: Any) -> list[Any]:
    """Groups whose old log-probs are a little off the policy's, so that ratios differ and some are clipped."""
    found = common.text_groups(tokenizer, GROUPS, SIZE, SHAPE)
    common.noisy_logps(found, model, "old_logps", noise=0.15)
    rng = np.random.default_rng(0)
    for group in found:
        group.values["advantage"] = rng.normal(size=SIZE).astype(np.float32)
    return found


def reference_groups() -> list[Any]:
    from guerdon.language.forward import GroupModel
    from guerdon.language.models import load_model

    model, tokenizer = load_model(common.MODEL)
    return groups(tokenizer, GroupModel(model))


def ours(precision: str, **options: Any) -> Callable[[], Any]:
    from guerdon.methods.verifiers.grpo import GRPO

    batch = reference_groups()
    return common.our_step(GRPO(kl_coef=0.0, **common.OUR_OPTIMIZER), lambda run: batch, precision, **options)


def trl(setting: str) -> Callable[[], Any]:
    common.quiet()
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from guerdon.language.models import load_model

    how = common.TRL_SETTINGS[setting]
    model, tokenizer = load_model(common.MODEL, dtype=how["dtype"])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            per_device_train_batch_size=GROUPS * SIZE,
            num_generations=SIZE,
            max_completion_length=SHAPE[1],
            loss_type="grpo",
            beta=0.0,
            **how["options"],
            **common.TRL_OPTIONS,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * GROUPS),
        processing_class=tokenizer,
    )
    trainer._prepare_inputs = lambda inputs: inputs  # which would sample; the samples are given
    batch = reference_groups()

    def rows(of: Callable[[Any, int], Any]) -> torch.Tensor:
        return torch.from_numpy(np.stack([of(group, c) for group in batch for c in range(SIZE)]))

    prompt_ids = rows(lambda group, c: group.segments[0].tokens)
    completion_ids = rows(lambda group, c: group.segments[1 + c].tokens)
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "advantages": rows(lambda group, c: group.values["advantage"][c]),
        "old_per_token_logps": rows(lambda group, c: group.segments[1 + c].values["old_logps"]),
    }
    return common.trl_step(trainer, inputs)


def main() -> None:
    options = common.arguments(__doc__ or "")
    from guerdon.language.models import load_model

    model, tokenizer = load_model(common.MODEL)
    flops = common.useful_flops(common.text_groups(tokenizer, GROUPS, SIZE, SHAPE), model.config, logits=True)
    row = common.compare_updates(ours, trl, flops=flops, bar=BAR, **vars(options))
    common.show(name := f"grpo update {SHAPE[0]}/{SHAPE[1]}", row)
    common.save("grpo_update", options.threads, {name: row})


if __name__ == "__main__":
    main()
