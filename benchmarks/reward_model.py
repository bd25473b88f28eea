"""A reward-model step of 4 pairs against TRL's RewardTrainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common

PAIRS = 4
SHAPE = (256, 64)  # tokens of prompt and completion
BAR = 2.0


def reference_groups(tokenizer: Any) -> list[Any]:
    found = common.text_groups(tokenizer, PAIRS, 2, SHAPE)
    for group in found:
        group.pairs, group.values["score"] = [(0, 1)], np.array([1, 0], np.float32)
    return found


def head(width: int) -> Any:
    """The same (1, width) head on both sides; one that is zero would hide the body from the check."""
    import torch

    return torch.randn(1, width, generator=torch.Generator().manual_seed(0)) / width**0.5


def ours(precision: str) -> Callable[[], Any]:
    from guerdon.methods.reward_models.bradley_terry import RewardModel

    def groups(run: Any) -> list[Any]:
        weight = run.model.head.weight
        run.optimizer.masters[run.optimizer.names.index("head.weight")].data.copy_(head(weight.shape[1]))
        weight.data.copy_(head(weight.shape[1]))
        return reference_groups(run.tokenizer)

    return common.our_step(RewardModel(**common.OUR_OPTIMIZER), groups, precision)


def trl(setting: str) -> Callable[[], Any]:
    common.quiet()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    from guerdon.language.models import load_model

    how = common.TRL_SETTINGS[setting]
    causal, tokenizer = load_model(common.MODEL)
    causal.config.num_labels = 1
    scorer = AutoModelForSequenceClassification.from_config(causal.config)
    scorer.model.load_state_dict(causal.model.state_dict())
    scorer.score.weight.data.copy_(head(causal.config.hidden_size))
    trainer = RewardTrainer(
        model=scorer.to(getattr(torch, how["dtype"])),
        args=RewardConfig(per_device_train_batch_size=PAIRS, **how["options"], **common.TRL_OPTIONS),
        train_dataset=Dataset.from_list([{"chosen": " b", "rejected": " c"}] * PAIRS),
        processing_class=tokenizer,
    )
    rows = []
    for group in reference_groups(tokenizer):
        chosen, rejected = (group.sequence(c)[0].tolist() for c in (0, 1))
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
    return common.trl_step(trainer, trainer.data_collator(rows))


def main() -> None:
    options = common.arguments(__doc__ or "")
    from guerdon.language.models import load_model

    model, tokenizer = load_model(common.MODEL)
    flops = common.useful_flops(reference_groups(tokenizer), model.config, logits=False)
    row = common.compare_updates(ours, trl, flops=flops, bar=BAR, **vars(options))
    common.show(name := f"reward model {SHAPE[0]}/{SHAPE[1]}", row)
    common.save("reward_model", options.threads, {name: row})


if __name__ == "__main__":
    main()
