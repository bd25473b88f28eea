"""Supervised fine-tuning, and rejection fine-tuning on the answers that a verifier accepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from guerdon.methods.base import LanguageMethod, Metrics, method

if TYPE_CHECKING:
    import torch

    from guerdon.language.forward import Outputs
    from guerdon.language.groups import Group
    from guerdon.language.packing import Batch


@method("sft", learns_from="demonstrations", paper=17)
@dataclass(kw_only=True)
class SFT(LanguageMethod):
    """Supervised fine-tuning: maximise the log-likelihood of the answers that are worth imitating.

    L = -sum_t log pi(y_t | x, y_<t) / (learned tokens of the global batch)

    so that all tokens weigh the same however the batch is accumulated or packed. Tulu 3 (Lambert et al. 2024) leaves
    the denominator out, which Adam's update does not feel. Demonstrations are all imitated; of completions with scores,
    those that reach `min_score`: the chosen one of a preference (1), verified answers (1), ratings as you set it.
    """

    lr: float = 5e-6  # peak learning rate of AdamW
    warmup: float = 0.03  # share of the run over which the learning rate rises from 0
    batch_size: int = 128  # groups per update
    epochs: int = 2  # passes over the feedback, or over each round of samples
    max_length: int = 4096  # tokens of a prompt with one completion; longer ones are counted, shown and cut or refused
    average: Literal["tokens", "sequences"] = "tokens"  # what weighs the same: every token, or every completion
    min_score: float = 1.0  # completions that score less are not imitated; those without a score are
    keep: Literal["all", "best"] = "all"  # of each prompt, every completion that is left or the first of the best ones
    unique: bool = False  # of identical completions to a prompt, imitate one

    per_completion: ClassVar[bool] = True

    def credit(self, groups: list[Group], rng: np.random.Generator) -> list[Group]:
        kept = []
        for group in groups:
            chosen = list(range(len(group)))
            if "score" in group.values:
                score = group.values["score"]
                chosen = [c for c in chosen if score[c] >= self.min_score]
                if self.keep == "best":
                    chosen = sorted(chosen, key=lambda c: -score[c])[:1]
            if self.unique:
                first = {group.sequence(c)[0].tobytes(): c for c in reversed(chosen)}
                chosen = sorted(first.values())
            if chosen:
                kept.append(group.subset(chosen))
        return kept

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert outputs.logps is not None
        if self.average == "tokens":
            losses, total = -outputs.logps, batch.totals["tokens"]
        else:
            losses = -batch.per_completion(outputs.logps) / batch.lengths.clamp(min=1)
            total = batch.totals["completions"]
        return losses.sum() / total, {"loss/nll": losses.detach()}


@method("rft", learns_from="verifier")
@dataclass(kw_only=True)
class RFT(SFT):
    """Rejection fine-tuning: supervised learning on the distinct sampled answers that the verifier accepts.

    `sft` on the model's own right answers, each one once (Yuan et al. 2023, arXiv 2308.01825).
    """

    unique: bool = True  # of identical completions to a prompt, imitate one
