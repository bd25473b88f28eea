"""InfoNCA: iterative preference optimisation over all answers to a prompt, as a classification among them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.lazy import torch
from guerdon.methods.base import LanguageMethod, Metrics, method
from guerdon.methods.policy_gradient import check_first_ratio, group_scores, informative, policy_metrics

if TYPE_CHECKING:
    from guerdon.language.forward import Outputs
    from guerdon.language.groups import Group
    from guerdon.language.packing import Batch


@method("infonca", learns_from="verifier", paper=62)
@dataclass(kw_only=True)
class InfoNCA(LanguageMethod):
    """DPO for K scored answers, repeated on fresh samples: the baseline "iterative DPO" of NFT (arXiv 2505.18116).

    L = -mean_prompts sum_k [r_k / sum_j r_j] {log softmax_k(beta log pi/pi_old (y_k)) + sft_coef log pi(y_k) / |y_k|}

    (InfoNCA: Chen et al. 2024, arXiv 2402.05369, equation 6, with shares of the reward as targets.) The reference is
    the policy that sampled, so that every round is a DPO of its own. `beta` and `sft_coef` are guerdon's choice.
    """

    group_size: int = 16  # with a task: completions per prompt
    max_draws: int = 10  # with a task: draws per round to replace groups whose rewards are all equal (dynamic sampling)
    beta: float = 0.1  # implicit reward per nat of log-ratio: higher stays closer to the policy that sampled
    sft_coef: float = 0.1  # weight of the log-likelihood per token of the right answers

    wants = frozenset({"logps", "entropy"})
    check_first = staticmethod(check_first_ratio)

    def check(self) -> None:
        if self.group_size < 2:
            raise ConfigError(f"group_size={self.group_size}: answers are compared within a group; use at least 2")
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}: it must be above 0")

    def credit(self, groups: list[Group], rng: np.random.Generator) -> list[Group]:
        """Set `target` (n,), each answer's share of the reward; groups of equal scores are left out."""
        credited = []
        for group in filter(informative, groups):
            scores = group_scores(group)
            if scores.min() < 0:
                raise DataError(f"prompt '{group.key}' has a score of {scores.min():g}: shares need scores from 0 up")
            target = (scores / scores.sum()).astype(np.float32)
            credited.append(replace(group, values={**group.values, "target": target}))
        return credited

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert outputs.logps is not None
        target, log_ratio = batch.values["target"], outputs.logps - batch.token_values["old_logps"]
        choice = grouped_log_softmax(self.beta * batch.per_completion(log_ratio), batch.group)
        likelihood = batch.per_completion(outputs.logps) / batch.lengths.clamp(min=1)
        loss = -(target * (choice + self.sft_coef * likelihood)).sum() / batch.totals["groups"]
        metrics = policy_metrics(log_ratio, entropy=outputs.entropy)
        return loss, metrics


def grouped_log_softmax(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Log-softmax of (C,) values among those of the same group, `group` being (C,) indices from 0."""
    count = int(group.max()) + 1
    largest = torch.full((count,), -torch.inf, device=x.device).scatter_reduce(0, group, x.detach(), "amax")
    shifted = x - largest[group]
    return shifted - x.new_zeros(count).index_add(0, group, shifted.exp()).log()[group]
