"""Proximal policy optimisation with a value model, in the form of RL with verifiable rewards (RLVR).

    r_t = -kl_coef * [log pi_old(y_t) - log pi_ref(y_t)],   and the score on top of the last token
    A   = whitened GAE(gamma, gae_lambda) of r and V,       returns = GAE + V
    L   = -mean_t min(r A, clip(r) A),   L_V = value_coef * 0.5 * mean_t max[(V - returns)^2, (V_clipped - returns)^2]

The score is `bonus` times what the verifier says, and `reward_model_coef` times what a reward model says where there is
one; a completion that did not end by itself gets -`no_eos_penalty` instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import LanguageMethod, Metrics, method
from guerdon.methods.policy_gradient import (
    check_clipping,
    check_first_ratio,
    clipped_surrogate,
    finished,
    gae,
    group_scores,
    kl_estimate,
    policy_metrics,
    whiten,
)

if TYPE_CHECKING:
    from guerdon.language.forward import Outputs
    from guerdon.language.groups import Group
    from guerdon.language.packing import Batch
    from guerdon.training.language import LanguageRun


@method("ppo", learns_from="verifier", paper=17)
@dataclass(kw_only=True)
class PPO(LanguageMethod):
    """PPO with verifiable rewards (Tulu 3, arXiv 2411.15124, section 6; PPO, arXiv 1707.06347).

    The paper starts the value model from the reward model of the same preferences, updates on 224 prompts with one
    completion each, and bounds them at 2048 tokens.
    """

    lr: float = 3e-7  # peak learning rate of AdamW
    warmup: float = 0.0  # share of the run over which the learning rate rises from 0
    adam_eps: float = 1e-5  # AdamW's epsilon
    epochs: int = 4  # passes over the feedback, or over each round of samples
    group_size: int = 1  # with a task: completions per prompt
    kl_coef: float = 0.05  # weight of the KL to the starting policy, taken off the reward of each token
    bonus: float = 10.0  # score of a completion that the verifier accepts
    no_eos_penalty: float = 10.0  # taken instead of any score where a completion did not end by itself
    reward_model: str | None = None  # directory of a reward model whose score is added; none: the verifier alone
    reward_model_coef: float = 1.0  # weight of that score
    gamma: float = 1.0  # discount per token
    gae_lambda: float = 0.95  # weight of longer returns in the advantages
    clip_low: float = 0.2  # ratios below 1 - clip_low gain nothing more
    clip_high: float = 0.2  # ratios above 1 + clip_high gain nothing more
    value_clip: float = 0.2  # a value further than this from its old one gains nothing more
    value_coef: float = 0.1  # weight of the value loss
    value_lr: float = 3e-7  # peak learning rate of the value model's own AdamW
    value_model: str | None = None  # directory of a reward model that the value model starts from; none: the policy

    per_completion: ClassVar[bool] = True
    wants = frozenset({"logps", "entropy"})
    check_first = staticmethod(check_first_ratio)

    def check(self) -> None:
        check_clipping(self.clip_low, self.clip_high)
        check_range(vars(self), "kl_coef", "no_eos_penalty", "value_coef", "value_lr")
        check_range(vars(self), "value_clip", above=True)
        if not (0 < self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise ConfigError(f"gamma={self.gamma}, gae_lambda={self.gae_lambda}: use shares, gamma above 0")

    def needs_reference(self) -> bool:
        return self.kl_coef != 0

    def setup(self, run: LanguageRun) -> None:
        """Start the value model from a reward model with its head, or from the policy with a head of zero."""
        from guerdon.language.models import load_model
        from guerdon.language.policy import HEAD, Policy

        head = None
        if self.value_model is None:
            model, _ = run.load_start()
        else:
            model, _ = load_model(self.value_model)
            if (saved := Path(self.value_model) / HEAD).exists():
                from safetensors.torch import load_file

                head = load_file(saved)["weight"]
        self.critic = run.add_critic(model, self.value_lr, head)
        if self.reward_model is not None:
            self.judge = Policy.load(self.reward_model, run.config.precision)
            if not hasattr(self.judge.model, "head"):
                raise ConfigError(f"reward_model: {self.reward_model} has no head that scores completions.")

    def credit(self, groups: list[Group], rng: np.random.Generator) -> list[Group]:
        """Set `advantage` and `returns` per token, from the critic's values of the whole round."""
        self.critic.values(groups)
        if self.reward_model is not None:
            for group, rated in zip(groups, self.judge.rewards(groups), strict=True):
                group.values["rated"] = np.array(rated, dtype=np.float32)
        return self.credit_values(groups) if groups else []

    def credit_values(self, groups: list[Group]) -> list[Group]:
        """`credit` on groups whose segments hold `values`. A completion is credited in its last segment."""
        leaves = [group.segments[leaf] for group in groups for leaf in group.leaves]
        learned = [np.flatnonzero(s.learn) for s in leaves]
        lengths = np.array([len(where) for where in learned])
        mask = np.arange(lengths.max()) < lengths[:, None]

        def padded(name: str) -> np.ndarray:
            table = np.zeros(mask.shape)
            table[mask] = np.concatenate([s.values[name][where] for s, where in zip(leaves, learned, strict=True)])
            return table

        values, rewards = padded("values"), np.zeros(mask.shape)
        if self.kl_coef:
            rewards -= self.kl_coef * (padded("old_logps") - padded("ref_logps"))
        rewards[np.arange(len(leaves)), lengths - 1] += np.concatenate([self.score(g) for g in groups])
        advantages = gae(rewards, values, self.gamma, self.gae_lambda)
        returns = advantages + values
        advantages[mask] = whiten(advantages[mask])

        row = 0
        credited = []
        for group in groups:
            segments = list(group.segments)
            for leaf in group.leaves:
                extra = {}
                for name, table in (("advantage", advantages), ("returns", returns)):
                    extra[name] = np.zeros(len(leaves[row]), dtype=np.float32)
                    extra[name][learned[row]] = table[row, : lengths[row]]
                segments[leaf] = replace(segments[leaf], values={**segments[leaf].values, **extra})
                row += 1
            credited.append(replace(group, segments=segments))
        return credited

    def score(self, group: Group) -> np.ndarray:
        """(n,) reward at the end of each completion: {-no_eos_penalty, 0, bonus} with a verifier of 0 and 1.

        What a reward model said stands in the group's values as `rated`.
        """
        rated = self.reward_model_coef * group.values.get("rated", np.zeros(len(group)))
        return np.where(finished(group), self.bonus * group_scores(group) + rated, -self.no_eos_penalty)

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert outputs.logps is not None
        log_ratio = outputs.logps - batch.token_values["old_logps"]
        surrogate, cut = clipped_surrogate(
            log_ratio.exp(), batch.token_values["advantage"], self.clip_low, self.clip_high
        )
        kl = kl_estimate(outputs.logps, batch.token_values["ref_logps"], "k3") if self.kl_coef else None
        return surrogate.sum() / batch.totals["tokens"], policy_metrics(log_ratio, cut, outputs.entropy, kl)

    def value_loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert outputs.values is not None
        losses, cut = clipped_value_loss(
            outputs.values, batch.token_values["values"], batch.token_values["returns"], self.value_clip
        )
        metrics = {
            "value/error": (outputs.values - batch.token_values["returns"]).square().detach(),
            "value/clip_share": cut.float(),
        }
        return self.value_coef * losses.sum() / batch.totals["tokens"], metrics

    def update(self, run: LanguageRun, groups: list[Group]) -> Metrics:
        value_metrics = self.critic.update(groups, self.value_loss, self.totals(groups))
        return {**value_metrics, **super().update(run, groups)}


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """0.5 * max[(V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2], elementwise, (N,).

    Returns:
        the losses, and a bool mask of the entries whose gradient the clipping cut to zero.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    plain, held = (values - returns).square(), (clipped - returns).square()
    return 0.5 * torch.maximum(plain, held), (held > plain).detach()
