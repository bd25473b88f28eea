"""REINFORCE with a leave-one-out baseline (RLOO).

    R_i = score_i - kl_coef * sum_t [log pi_old(y_t) - log pi_ref(y_t)]
    A_i = R_i - mean of the R_j of the other completions of the prompt
    L   = -mean_i min(r_i A_i, clip(r_i, 1 - clip_low, 1 + clip_high) A_i),   r_i = pi(y_i) / pi_old(y_i)

A whole completion is one action: on-policy the gradient is that of -mean_i A_i log pi(y_i), unbiased and with no
division by length or deviation. The clipped ratio, which the paper does without, matters from the second update on the
same samples on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.methods.base import LanguageMethod, Metrics, method
from guerdon.methods.policy_gradient import (
    check_clipping,
    check_first_ratio,
    clipped_surrogate,
    group_scores,
    informative,
    kl_estimate,
    leave_one_out,
    path_kl,
    policy_metrics,
    whiten,
)

if TYPE_CHECKING:
    import torch

    from guerdon.language.forward import Outputs
    from guerdon.language.groups import Group
    from guerdon.language.packing import Batch


@method("rloo", learns_from="verifier")
@dataclass(kw_only=True)
class RLOO(LanguageMethod):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740, equation 6; Kool et al. 2019)."""

    kl_coef: float = 0.05  # weight of the KL to the starting policy, taken off the reward; 0 needs no reference
    clip_low: float = 0.2  # ratios below 1 - clip_low gain nothing more
    clip_high: float = 0.2  # ratios above 1 + clip_high gain nothing more
    normalize_advantages: bool = False  # to mean 0 and deviation 1 over the round

    per_completion: ClassVar[bool] = True
    wants = frozenset({"logps", "entropy"})
    check_first = staticmethod(check_first_ratio)

    def check(self) -> None:
        if self.group_size < 2:
            raise ConfigError(f"group_size={self.group_size}: the baseline is the mean of the others; use at least 2")
        check_clipping(self.clip_low, self.clip_high)
        check_range(vars(self), "kl_coef")

    def needs_reference(self) -> bool:
        return self.kl_coef != 0

    def credit(self, groups: list[Group], rng: np.random.Generator) -> list[Group]:
        """Set `advantage` (n,) on whole groups; under dynamic sampling, groups of equal scores are left out."""
        groups = [g for g in groups if self.max_draws == 1 or informative(g)]
        if not groups:
            return []
        rewards = [group_scores(g) - (self.kl_coef * path_kl(g) if self.kl_coef else 0.0) for g in groups]
        advantages = np.concatenate([leave_one_out(r) for r in rewards])
        if self.normalize_advantages:
            advantages = whiten(advantages)
        parts = np.split(advantages.astype(np.float32), np.cumsum([len(g) for g in groups])[:-1])
        return [replace(g, values={**g.values, "advantage": a}) for g, a in zip(groups, parts, strict=True)]

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert outputs.logps is not None
        log_ratio = outputs.logps - batch.token_values["old_logps"]
        ratio = batch.per_completion(log_ratio).exp()
        surrogate, cut = clipped_surrogate(ratio, batch.values["advantage"], self.clip_low, self.clip_high)
        kl = kl_estimate(outputs.logps, batch.token_values["ref_logps"], "k3") if self.kl_coef else None
        return surrogate.sum() / batch.totals["completions"], policy_metrics(log_ratio, cut, outputs.entropy, kl)
