"""Negative-aware fine-tuning (NFT): a supervised loss on right AND wrong answers.

The policy that was sampled is a mixture of the policy of right answers and that of wrong ones, weighted by the pass
rate q of the prompt. Writing the second through the first, maximum likelihood on wrong answers trains the same network.
With R = pi / pi_old per token, c = 1 for right answers and 0 for wrong ones,

    L = -sum w(q) { c log R + (1 - c) neg_weight log maxv[(1 - q R) / (1 - q), clamp_negative] }

and maxv(x, eps) = max(x, eps) in value with the gradient of x. On-policy the gradient equals that of Dr. GRPO for
w = 1 - q, and of GRPO with the population deviation for w = sqrt((1 - q) / q). The loss is 0 wherever R = 1; its
gradient is not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.lazy import torch
from guerdon.methods.base import LanguageMethod, Metrics, method
from guerdon.methods.policy_gradient import (
    check_clipping,
    check_first_ratio,
    clipped_surrogate,
    completion_weights,
    finished,
    group_scores,
    policy_metrics,
)

if TYPE_CHECKING:
    from guerdon.language.forward import Outputs
    from guerdon.language.groups import Group
    from guerdon.language.packing import Batch


@method("nft", learns_from="verifier", paper=62)
@dataclass(kw_only=True)
class NFT(LanguageMethod):
    """Negative-aware fine-tuning (arXiv 2505.18116).

    Rejection fine-tuning, the paper's baseline, is `neg_weight=0, normalize=0`. Needs no reference, critic or scale
    of rewards, but a verifier that says right (1) or wrong (0) and nothing between; answers cut off are wrong.
    Token losses are summed, divided by the constant `normalizer` and averaged over completions, where the authors' code
    sums over those of a micro-batch: Adam does not feel the difference, gradient clipping does. Published settings but
    for `max_new_tokens`, which was 3584.
    """

    schedule: Literal["linear", "cosine", "constant"] = "constant"  # learning rate over the run, after warm-up
    warmup: float = 0.002  # share of the run over which the learning rate rises from 0; 10 of 5120 updates
    weight_decay: float = 0.1  # AdamW's decoupled weight decay
    rounds: int = 320  # with a task: rounds of sampling, verifying and learning
    prompts_per_round: int = 512  # with a task: prompts sampled in each round
    group_size: int = 16  # with a task: completions per prompt
    max_draws: int = 10  # with a task: draws per round to replace groups whose rewards are all equal (dynamic sampling)
    normalize: Literal[0, 1, 2] = 1  # weight w(q) of a prompt: 0: 1; 1: 1 - q as Dr. GRPO; 2: sqrt((1 - q) / q) as GRPO
    neg_weight: float = 1.0  # of wrong answers; 0 learns from right ones alone; -1 clips ratios as DAPO instead
    clamp_negative: float = 1.0  # lower bound, in value, of the odds (1 - q R) / (1 - q) of wrong answers
    clamp_positive: float = 0.0  # lower bound, in value, of R on right answers; 0 sets none
    ratio: Literal["token", "sequence"] = "token"  # sequence: one R per answer, the product over its tokens
    normalizer: float = 1000.0  # with token ratios: the constant that divides the sum over an answer's tokens
    clip_low: float = 0.2  # with neg_weight -1: ratios below 1 - clip_low gain nothing more
    clip_high: float = 0.28  # with neg_weight -1: ratios above 1 + clip_high gain nothing more

    per_completion: ClassVar[bool] = True
    wants = frozenset({"logps", "entropy"})
    check_first = staticmethod(check_first_ratio)

    def check(self) -> None:
        if self.group_size < 2:
            raise ConfigError(f"group_size={self.group_size}: a pass rate between 0 and 1 needs at least 2 answers")
        if self.neg_weight < 0 and self.neg_weight != -1:
            raise ConfigError(f"neg_weight={self.neg_weight}: use a weight from 0 up, or -1 for the clipped loss")
        if self.clamp_negative <= 0 or self.clamp_positive < 0 or self.normalizer <= 0:
            raise ConfigError("clamp_negative and normalizer must be above 0, clamp_positive at least 0")
        check_clipping(self.clip_low, self.clip_high)

    def credit(self, groups: list[Group], rng: np.random.Generator) -> list[Group]:
        """Set `correct` and `pass_rate` (n,), the latter over all answers to the prompt; keep 0 < pass rate < 1."""
        credited = []
        for group in groups:
            scores = group_scores(group)
            if not np.isin(scores, (0, 1)).all():
                raise DataError(
                    f"prompt '{group.key}' has scores {sorted(set(scores.tolist()))}, but NFT learns from right (1) "
                    "and wrong (0) only: use a binary verifier, without shaping, or another method"
                )
            correct = (scores * finished(group)).astype(np.float32)
            if 0 < correct.mean() < 1:
                pass_rate = np.full_like(correct, correct.mean())
                credited.append(replace(group, values={**group.values, "correct": correct, "pass_rate": pass_rate}))
        return credited

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert outputs.logps is not None
        log_ratio = per_token = outputs.logps - batch.token_values["old_logps"]
        correct, pass_rate = batch.values["correct"], batch.values["pass_rate"]
        if self.ratio == "token":
            correct, pass_rate = correct[batch.completion], pass_rate[batch.completion]
            weights = batch.spread(completion_weights(batch, "constant", self.normalizer))
        else:
            log_ratio = batch.per_completion(log_ratio)
            weights = completion_weights(batch, "constant", 1.0)
        if self.neg_weight < 0:
            advantage = prompt_weight(pass_rate, self.normalize) * (correct - pass_rate) / (1 - pass_rate)
            losses, cut = clipped_surrogate(log_ratio.exp(), advantage, self.clip_low, self.clip_high)
        else:
            losses, cut = nft_loss(
                log_ratio, correct, pass_rate, self.normalize, self.neg_weight, self.clamp_negative, self.clamp_positive
            )
        metrics = policy_metrics(per_token, cut, outputs.entropy)
        return (weights * losses).sum(), {**metrics, "policy/pass_rate": batch.values["pass_rate"]}


def maxv(x: torch.Tensor, eps: float) -> torch.Tensor:
    """max(x, eps) in value, with the gradient of x (straight-through)."""
    return x + (x.clamp(min=eps) - x).detach()


def prompt_weight(pass_rate: torch.Tensor, normalize: Literal[0, 1, 2]) -> torch.Tensor:
    """w(q): 1, 1 - q or sqrt((1 - q) / q)."""
    if normalize == 0:
        return torch.ones_like(pass_rate)
    return 1 - pass_rate if normalize == 1 else ((1 - pass_rate) / pass_rate).sqrt()


def nft_loss(
    log_ratio: torch.Tensor,
    correct: torch.Tensor,
    pass_rate: torch.Tensor,
    normalize: Literal[0, 1, 2] = 1,
    neg_weight: float = 1.0,
    clamp_negative: float = 1.0,
    clamp_positive: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """NFT's loss of each token, or of each answer, before any sum; all tensors of one shape.

    d loss / d log pi is -w on right answers, whatever R, and neg_weight w q / (1 - q) R / maxv[...] on wrong ones.
    The log-ratio is held below 10 and the pass rate within [0.02, 0.98], as in the authors' code.

    Returns:
        the losses, and a bool mask of the wrong ones whose value is clamped.
    """
    q = pass_rate.clamp(0.02, 0.98)
    log_ratio = log_ratio.clamp(max=10.0)
    ratio = log_ratio.exp()
    right = maxv(ratio, clamp_positive).log() if clamp_positive else log_ratio
    odds = (1 - q * ratio) / (1 - q)
    wrong = maxv(odds, clamp_negative).log()
    # Not a product with 0: an overflow on the side that does not count would turn it into NaN.
    losses = -prompt_weight(q, normalize) * torch.where(correct > 0, right, neg_weight * wrong)
    return losses, ((odds < clamp_negative) & (correct == 0)).detach()
