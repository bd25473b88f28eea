"""Group relative policy optimisation and its two best-known revisions, Dr. GRPO and DAPO.

    A_i = (R_i - mean(R)) / (std(R) + eps)            over the n completions of one prompt
    L   = -average[ min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) ] + kl_coef * average[KL to the reference]

with the importance ratio r = pi / pi_old of a token, or of a whole completion (GSPO, arXiv 2507.18071). Where the
sampler computes a little differently, A may be weighed by min(pi_old / pi_sampler, C) (truncated importance sampling).
The three papers differ in the scale of the advantage, in the average and in the clipping range, hence one
implementation with three sets of defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.methods.base import LanguageMethod, Metrics, method
from guerdon.methods.policy_gradient import (
    Aggregate,
    Scale,
    check_clipping,
    check_first_ratio,
    cispo_surrogate,
    clipped_surrogate,
    completion_weights,
    finished,
    group_advantages,
    group_scores,
    informative,
    kl_estimate,
    overlong_penalty,
    path_kl,
    policy_metrics,
)

if TYPE_CHECKING:
    import torch

    from guerdon.language.forward import Outputs
    from guerdon.language.groups import Group
    from guerdon.language.packing import Batch


@method("grpo", learns_from="verifier")
@dataclass(kw_only=True)
class GRPO(LanguageMethod):
    """Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300, equations 3 and 4).

    The mathematics and the KL coefficient are the paper's; it sampled 64 completions for each of 1024 prompts. With one
    epoch and `batch_size` at least `prompts_per_round` every update is on-policy and nothing is ever clipped. The KL
    term k3 is the paper's; `kl_estimate` says what its gradient is and what the other estimators change.
    """

    scale: Scale = "std"  # deviation that divides advantages: over n - 1, over n, or none
    advantage_eps: float = 1e-4  # added to that deviation
    clip_low: float = 0.2  # ratios below 1 - clip_low gain nothing more
    clip_high: float = 0.2  # ratios above 1 + clip_high gain nothing more
    surrogate: Literal["ppo", "cispo"] = "ppo"  # tokens beyond the range: cut off, or kept with clipped weight
    dual_clip: float = 0.0  # bad answers this many times likelier than before pull no more; 0 does not bound them
    sampler_cap: float = 0.0  # weight by pi_old / pi_sampler up to this (TIS); 0 takes pi_sampler for pi_old
    ratio: Literal["token", "sequence"] = "token"  # sequence: one ratio per completion, the geometric mean (GSPO)
    aggregate: Aggregate = "sequence"  # mean over: all tokens; each completion, then all; max_new_tokens, then all
    kl_coef: float = 0.04  # weight of the KL to the starting policy; 0 needs no reference
    kl: Literal["k1", "k2", "k3", "k3-corrected"] = "k3"  # its estimator: k1 lowers the reward, others add to the loss
    entropy_coef: float = 0.0  # weight of the mean entropy per token, which is added to what is maximised
    truncated: Literal["keep", "mask", "penalty"] = "keep"  # long answers: as verified; none cut off; penalised
    truncated_buffer: float = 0.2  # the penalty rises to 1 over this last share of max_new_tokens

    per_completion: ClassVar[bool] = True
    wants = frozenset({"logps", "entropy"})
    check_first = staticmethod(check_first_ratio)

    def check(self) -> None:
        if self.group_size < 2:
            raise ConfigError(f"group_size={self.group_size}: completions are compared within a group; use at least 2")
        check_clipping(self.clip_low, self.clip_high)
        check_range(vars(self), "kl_coef", "entropy_coef", "advantage_eps", "dual_clip", "sampler_cap")
        if 0 < self.dual_clip <= 1 + self.clip_high:
            raise ConfigError(
                f"dual_clip={self.dual_clip} has to be above 1 + clip_high = {1 + self.clip_high:g}, or 0"
            )
        if self.surrogate == "cispo" and (self.ratio == "sequence" or self.dual_clip):
            raise ConfigError("surrogate=cispo clips the weights of tokens: use ratio=token and dual_clip=0 with it")
        if not 0 < self.truncated_buffer <= 1:
            raise ConfigError(f"truncated_buffer={self.truncated_buffer} of max_new_tokens: use 0 < share <= 1")

    def needs_reference(self) -> bool:
        return self.kl_coef != 0

    def corrects_sampler(self) -> bool:
        return self.sampler_cap != 0

    def credit(self, groups: list[Group], rng: np.random.Generator) -> list[Group]:
        """Set `advantage` (n,) on whole groups.

        A group of equal scores has no advantages, yet stays in the averages, as in the papers of GRPO and Dr. GRPO. It
        is left out only under dynamic sampling (`max_draws` > 1), which draws another prompt in its place. Completions
        that `truncated="mask"` leaves out still count in the advantages of the others, but in no average.
        """
        credited = []
        for group in groups:
            if self.max_draws > 1 and not informative(group):
                continue
            rewards = group_scores(group)
            if self.truncated == "penalty":
                rewards = rewards + overlong_penalty(group.lengths(), self.max_new_tokens, self.truncated_buffer)
            if self.kl_coef and self.kl == "k1":
                rewards = rewards - self.kl_coef * path_kl(group)
            advantage = group_advantages(rewards, self.scale, self.advantage_eps)
            group = replace(group, values={**group.values, "advantage": advantage.astype(np.float32)})
            kept = np.flatnonzero(finished(group)) if self.truncated == "mask" else np.arange(len(group))
            if len(kept):
                credited.append(group if len(kept) == len(group) else group.subset(kept.tolist()))
        return credited

    def teaches(self, group: Group) -> bool:
        kl_in_loss = self.kl_coef != 0 and self.kl != "k1"
        return kl_in_loss or self.entropy_coef != 0 or bool(group.values["advantage"].any())

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert outputs.logps is not None and outputs.entropy is not None
        weights = completion_weights(batch, self.aggregate, self.max_new_tokens)
        log_ratio = outputs.logps - batch.token_values["old_logps"]
        by_token = self.ratio == "token"
        advantage = weights * batch.values["advantage"]
        advantage = batch.spread(advantage) if by_token else advantage * batch.lengths

        def each(x: torch.Tensor) -> torch.Tensor:
            return x if by_token else batch.per_completion(x) / batch.lengths.clamp(min=1)

        sampler_ratio = None
        if self.sampler_cap:
            sampler_ratio = each(batch.token_values["old_logps"] - batch.token_values["sampler_logps"]).exp()
            advantage = advantage * sampler_ratio.clamp(max=self.sampler_cap)
        if self.surrogate == "ppo":
            ratio = each(log_ratio).exp()
            surrogate, cut = clipped_surrogate(ratio, advantage, self.clip_low, self.clip_high, self.dual_clip)
        else:
            surrogate, cut = cispo_surrogate(outputs.logps, log_ratio, advantage, self.clip_low, self.clip_high)
        loss, kl = surrogate.sum(), None
        if self.kl_coef:
            kl = kl_estimate(outputs.logps, batch.token_values["ref_logps"], "k2" if self.kl == "k2" else "k3")
            if self.kl == "k3-corrected":
                kl = log_ratio.exp() * kl
            if self.kl != "k1":
                loss = loss + self.kl_coef * (batch.spread(weights) * kl).sum()
        if self.entropy_coef:
            loss = loss - self.entropy_coef * outputs.entropy.sum() / batch.totals["tokens"]
        return loss, policy_metrics(log_ratio, cut, outputs.entropy, kl, sampler_ratio)


@method("dr-grpo", learns_from="verifier")
@dataclass(kw_only=True)
class DrGRPO(GRPO):
    """GRPO done right (arXiv 2503.20783): without the divisions that favour easy prompts and long failures.

    Advantages are only centred, token losses are summed and divided by the constant `max_new_tokens`; no KL term.
    """

    scale: Scale = "none"  # deviation that divides advantages: over n - 1, over n, or none
    aggregate: Aggregate = "constant"  # mean over: all tokens; each completion, then all; max_new_tokens, then all
    kl_coef: float = 0.0  # weight of the KL to the starting policy; 0 needs no reference


@method("dapo", learns_from="verifier")
@dataclass(kw_only=True)
class DAPO(GRPO):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476).

    Clip-higher leaves rare tokens room to grow, groups of equal scores are replaced by fresh draws, all tokens of the
    batch weigh the same, lengths near the limit are penalised softly; no KL term. The paper sampled 16 completions for
    each of 512 prompts and made 16 updates of them.
    """

    group_size: int = 16  # with a task: completions per prompt
    max_draws: int = 10  # with a task: draws per round to replace groups whose rewards are all equal (dynamic sampling)
    clip_high: float = 0.28  # ratios above 1 + clip_high gain nothing more
    aggregate: Aggregate = "token"  # mean over: all tokens; each completion, then all; max_new_tokens, then all
    kl_coef: float = 0.0  # weight of the KL to the starting policy; 0 needs no reference
    truncated: Literal["keep", "mask", "penalty"] = "penalty"  # long answers: as verified; none cut off; penalised
