"""Direct preference optimisation and its family of losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from guerdon.errors import ConfigError
from guerdon.lazy import torch
from guerdon.methods.base import LanguageMethod, Metrics, method
from guerdon.methods.preferences.pairs import Pairing, with_pairs

if TYPE_CHECKING:
    from guerdon.language.forward import Outputs
    from guerdon.language.groups import Group
    from guerdon.language.packing import Batch

LossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

LENGTH_NORMALISED = {"sigmoid_norm", "ipo"}
SMOOTHED = {"sigmoid", "sigmoid_norm", "robust", "exo_pair"}
# Losses of the two rewards apart, not of their difference: there f'(u) must be the log-ratio itself.
REVERSE_KL_ONLY = {"nca_pair", "sppo_hard", "apo_zero", "apo_down"}


def divergence_slope(logratio: torch.Tensor, divergence: Divergence, alpha: float = 0.5) -> torch.Tensor:
    """f'(u) of an f-divergence at u = exp(logratio), shifted to be 0 at u = 1 (Wang et al. 2023, arXiv 2309.16240).

    The policy that maximises E[r] - beta D_f(pi || pi_ref) has r = beta f'(pi / pi_ref) + a constant of the prompt.

    reverse_kl: log u. forward_kl: 1 - 1/u. js_divergence: log(2u / (1 + u)). alpha_divergence: (1 - u^-alpha) / alpha,
    whose limits are reverse_kl (alpha 0) and forward_kl (alpha 1); TRL counts alpha as 1 minus this one.
    """
    if divergence == "reverse_kl":
        return logratio
    if divergence == "js_divergence":
        return math.log(2) + torch.nn.functional.logsigmoid(logratio)
    if divergence == "forward_kl":
        alpha = 1.0
    # Rejected answers fall by more than 88 nats, where exp would be infinite in fp32 and the gradient nan.
    return -torch.expm1((-alpha * logratio).clamp(max=80.0)) / alpha


def implicit_rewards(
    logratio: torch.Tensor,
    length: torch.Tensor,
    loss_type: LossType = "sigmoid",
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> torch.Tensor:
    """beta f'(pi / pi_ref) of each completion; per learned token for the length-normalised losses.

    Args:
        logratio: (...) log pi(y|x) - log pi_ref(y|x), summed over the completion.
        length: (...) learned tokens.
    """
    reward = beta * divergence_slope(logratio, divergence, alpha)
    return reward / length.clamp(min=1) if loss_type in LENGTH_NORMALISED else reward


# Below, c and r are the implicit rewards of the chosen and the rejected answer, m = c - r their margin, s the logistic
# function and e the label smoothing (`noise`).


def sigmoid_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """-(1 - e) log s(m) - e log s(-m): DPO (Rafailov et al. 2023, eq. 7); e > 0 is conservative DPO (Mitchell 2023)."""
    margin = chosen - rejected
    return -(1 - noise) * _log_sigmoid(margin) - noise * _log_sigmoid(-margin)


def ipo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """(m / beta - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17, beta is tau), per token as its authors ran it."""
    return ((chosen - rejected - 0.5) / beta) ** 2


def hinge_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """max(0, 1 - m): SLiC (Zhao et al. 2023) in the form of RSO (Liu et al. 2023)."""
    return torch.relu(1 - (chosen - rejected))


def robust_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """(-(1 - e) log s(m) + e log s(-m)) / (1 - 2e): unbiased if labels flip at rate e (Chowdhury et al. 2024)."""
    margin = chosen - rejected
    return (-(1 - noise) * _log_sigmoid(margin) + noise * _log_sigmoid(-margin)) / (1 - 2 * noise)


def exo_pair_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """KL((s(m), s(-m)) || (1 - e, e)): EXO-pref for two answers (Ji et al. 2024, eq. 16)."""
    margin = chosen - rejected
    log_win, log_lose = _log_sigmoid(margin), _log_sigmoid(-margin)
    return log_win.exp() * (log_win - math.log1p(-noise)) + log_lose.exp() * (log_lose - math.log(noise))


def nca_pair_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """-log s(c) - (log s(-c) + log s(-r)) / 2: noise-contrastive alignment (Chen et al. 2024, arXiv 2402.05369)."""
    return -_log_sigmoid(chosen) - 0.5 * (_log_sigmoid(-chosen) + _log_sigmoid(-rejected))


def sppo_hard_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """((c - 1/2) / beta)^2 + ((r + 1/2) / beta)^2: SPPO where chosen surely wins (Wu et al. 2024, eq. 4.7)."""
    return ((chosen - 0.5) / beta) ** 2 + ((rejected + 0.5) / beta) ** 2


def apo_zero_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """1 - s(c) + s(r): raises chosen, lowers rejected; chosen beats the model (APO, arXiv 2408.06266, eq. 7)."""
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """s(c) + 1 - s(m): lowers both, rejected more; the model beats chosen (APO, eq. 8)."""
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, noise: float) -> torch.Tensor:
    """(1 - w) (-log s(m)) + w exp(-m) with w = s(m / 0.05): discovered by search (Lu et al. 2024, eq. 5)."""
    margin = chosen - rejected
    scaled = margin / 0.05
    return -torch.sigmoid(-scaled) * _log_sigmoid(margin) + (_log_sigmoid(scaled) - margin).exp()


def _log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.logsigmoid(x)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]] = {
    "sigmoid": sigmoid_loss,
    "sigmoid_norm": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
}


def preference_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    loss_type: LossType = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Loss of each pair, (P,), by the formula that `LOSSES[loss_type]` documents.

    Args:
        chosen, rejected: (P,) from `implicit_rewards`.
    """
    return LOSSES[loss_type](chosen, rejected, beta, label_smoothing)


@method("dpo", learns_from="preferences", paper=(11, 12))
@dataclass(kw_only=True)
class DPO(LanguageMethod):
    """Direct preference optimisation: the policy's log-ratio to its start is the reward that explains the preferences.

    L = -log s( beta [log pi/pi_ref (y_w|x) - log pi/pi_ref (y_l|x)] )

    averaged over the pairs of the global batch (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), and the losses that
    grew from it, by `loss_type` (see `LOSSES`) and `divergence` (see `divergence_slope`). SimPO (Meng et al. 2024,
    arXiv 2405.14734) is `sigmoid_norm` that is `reference_free` with a `target_margin`; WPO (Zhou et al. 2024, arXiv
    2406.11827) is `weighted`, by the product of the two answers' geometric mean token probabilities. Settings are the
    published ones but for the optimiser: AdamW for RMSprop, and a tenth of the run as warm-up for 150 updates.
    """

    lr: float = 1e-6  # peak learning rate of AdamW
    schedule: Literal["linear", "cosine", "constant"] = "constant"  # learning rate over the run, after warm-up
    batch_size: int = 64  # groups per update
    max_grad_norm: float = 10.0  # gradients are clipped to this global norm; 0 does not clip
    loss_type: LossType = "sigmoid"  # loss of a pair
    beta: float = 0.1  # implicit reward per nat of log-ratio: higher stays closer to the start
    label_smoothing: float = 0.0  # probability that a preference is wrong, for sigmoid, sigmoid_norm, robust, exo_pair
    divergence: Divergence = "reverse_kl"  # that keeps the policy near its start
    alpha: float = 0.5  # of the alpha-divergence, between 0 (reverse KL) and 1 (forward KL)
    sft_coef: float = 0.0  # weight of the negative log-likelihood of the chosen completions, averaged over their tokens
    reference_free: bool = False  # log-probs instead of log-ratios: as if the start were uniform
    target_margin: float = 0.0  # lead that the chosen reward should have; SimPO's gamma
    weighted: bool = False  # pairs weigh by how likely the policy is to write them itself, as in WPO
    pairs: Pairing = "best-worst"  # which of a prompt's scored completions are compared

    def check(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}: it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}: it must be at least 0 and below 0.5")
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise ConfigError(
                f"loss_type {self.loss_type} does not use label_smoothing; {', '.join(sorted(SMOOTHED))} do"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ConfigError("loss_type exo_pair needs label_smoothing above 0; the paper uses 0.001")
        if self.divergence != "reverse_kl" and self.loss_type in REVERSE_KL_ONLY:
            raise ConfigError(f"loss_type {self.loss_type} is derived for reverse_kl, not for {self.divergence}")
        if self.target_margin and self.loss_type in REVERSE_KL_ONLY:
            raise ConfigError(f"loss_type {self.loss_type} looks at each reward alone: it has no target_margin")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha is {self.alpha}: it must lie between 0 (reverse_kl) and 1 (forward_kl)")

    def needs_reference(self) -> bool:
        return not self.reference_free

    def credit(self, groups: list[Group], rng: np.random.Generator) -> list[Group]:
        return with_pairs(groups, self.pairs, rng)

    def totals(self, groups: list[Group]) -> dict[str, float]:
        chosen_tokens = sum(float(group.lengths()[better]) for group in groups for better, _ in group.pairs)
        return {**super().totals(groups), "chosen_tokens": chosen_tokens}

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert outputs.logps is not None
        better, worse = batch.pairs.unbind(-1)
        logps = batch.per_completion(outputs.logps)
        logratios = logps if self.reference_free else logps - batch.per_completion(batch.token_values["ref_logps"])
        rewards = implicit_rewards(logratios, batch.lengths, self.loss_type, self.beta, self.divergence, self.alpha)
        chosen, rejected = rewards[better], rewards[worse]
        lead = chosen - self.target_margin
        losses = preference_loss(lead, rejected, self.loss_type, self.beta, self.label_smoothing)
        if self.weighted:
            average = (logps / batch.lengths.clamp(min=1)).detach()
            losses = losses * (average[better] + average[worse]).exp().clamp(max=1.0)
        loss = losses.sum() / batch.totals["pairs"]
        metrics: Metrics = {
            "loss/preference": losses.detach(),
            "preference/accuracy": (chosen > rejected).float(),
            "preference/margin": (chosen - rejected).detach(),
            "reward/chosen": chosen.detach(),
            "reward/rejected": rejected.detach(),
            "policy/logp_chosen": logps[better].detach(),
            "policy/logp_rejected": logps[worse].detach(),
        }
        if self.sft_coef:
            times_chosen = torch.bincount(better, minlength=len(logps)).float()
            nll = -outputs.logps.repeat_interleave(batch.spread(times_chosen).long())
            loss = loss + self.sft_coef * nll.sum() / batch.totals["chosen_tokens"]
            metrics["loss/sft"] = nll.detach()
        return loss, metrics

    def start_loss(self) -> float | None:
        """The loss where the policy equals its reference, ln 2 for DPO; None where it depends on the data."""
        if self.reference_free or self.sft_coef or self.weighted:
            return None
        nothing, lead = torch.zeros(1), torch.full((1,), -self.target_margin)
        return float(preference_loss(lead, nothing, self.loss_type, self.beta, self.label_smoothing))


@method("dpo-norm", learns_from="preferences", paper=17)
@dataclass(kw_only=True)
class DPONorm(DPO):
    """Length-normalised DPO, as Tulu 3 trains it: log-ratios per token, so that longer answers earn no more.

    L = -log s( beta [log pi/pi_ref (y_w|x) / |y_w| - log pi/pi_ref (y_l|x) / |y_l|] )

    (Lambert et al. 2024, arXiv 2411.15124). For answers of equal length L this is DPO at beta / L.
    """

    lr: float = 5e-7  # peak learning rate of AdamW
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # learning rate over the run, after warm-up
    batch_size: int = 128  # groups per update
    max_grad_norm: float = 1.0  # gradients are clipped to this global norm; 0 does not clip
    loss_type: LossType = "sigmoid_norm"  # loss of a pair
    beta: float = 5.0  # implicit reward per nat of log-ratio per token: higher stays closer to the start
    pairs: Pairing = "best-random"  # which of a prompt's scored completions are compared
