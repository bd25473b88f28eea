"""Mathematics that policy-gradient methods share: advantages, ratios, clipping, KL estimates, aggregation.

Numpy functions work on rewards of whole groups (credit), torch functions on log-probs of a batch (loss). Letters: C
completions, N learned tokens, n completions of one prompt, T the longest completion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError, InvariantError
from guerdon.language.groups import Group
from guerdon.lazy import torch

if TYPE_CHECKING:
    from guerdon.language.packing import Batch

Scale = Literal["std", "population-std", "none"]
Aggregate = Literal["token", "sequence", "constant"]


def check_clipping(low: float, high: float) -> None:
    """Raise `ConfigError` where [1 - low, 1 + high] is no range of ratios around 1."""
    if not 0 < low <= 1 or not high > 0:
        raise ConfigError(f"clip_low={low}, clip_high={high}: use 0 < clip_low <= 1 and clip_high > 0")


# Credit


def group_advantages(rewards: np.ndarray, scale: Scale = "std", eps: float = 1e-4) -> np.ndarray:
    """Rewards of one group, (n,), centred on their mean and divided by their deviation + `eps`: (n,).

    `std` divides by n - 1 in the variance, as `torch.std` and most implementations of GRPO do; `population-std` by n;
    `none` only centres (Dr. GRPO, arXiv 2503.20783). A group of one, or of equal rewards, gets zeros.
    """
    centred = rewards - rewards.mean()
    if scale == "none" or len(rewards) < 2:
        return centred
    return centred / (rewards.std(ddof=int(scale == "std")) + eps)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Each reward of one group, (n,), less the mean of the others: (n,). A group of one gets zero."""
    n = len(rewards)
    return (rewards - rewards.mean()) * n / max(n - 1, 1)


def informative(group: Group) -> bool:
    """Whether the scores of a group differ, so that its completions can be told apart."""
    scores = group_scores(group)
    return bool(np.any(scores != scores[0]))


def group_scores(group: Group) -> np.ndarray:
    """(n,) what the verifier said about each completion; a `DataError` where nobody said anything."""
    if "score" not in group.values:
        raise DataError(f"prompt '{group.key}' has completions without scores: give `scores`, or a task that verifies")
    return group.values["score"].astype(np.float64)


def finished(group: Group) -> np.ndarray:
    """(n,) bool, False where a completion was cut off; all True where nobody recorded it."""
    return np.asarray(group.values.get("finished", np.ones(len(group)))) > 0


def path_kl(group: Group) -> np.ndarray:
    """(n,) sampled estimate of KL(old policy | reference) per completion, sum_t log pi_old - log pi_ref (k1)."""
    per_segment = [
        float((s.values["old_logps"] - s.values["ref_logps"])[s.learn].sum()) if s.learn.any() else 0.0
        for s in group.segments
    ]
    return np.array([sum(per_segment[s] for s in group.path(c)) for c in range(len(group))])


def overlong_penalty(lengths: np.ndarray, limit: int, buffer: float) -> np.ndarray:
    """Soft penalty on lengths: 0 up to `limit` * (1 - `buffer`) tokens, then linear down to -1 at `limit`.

    DAPO (arXiv 2503.14476), equation 13, in which L_max is `limit` and L_cache is `buffer * limit`.
    """
    start = limit * (1 - buffer)
    return -np.clip((lengths - start) / (limit - start), 0.0, 1.0)


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float = 1.0, lam: float = 0.95) -> np.ndarray:
    """Generalised advantage estimates (arXiv 1506.02438) of right-padded rows: (C, T).

    A_t = sum_l (gamma lam)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t and V = 0 after the last token.

    Args:
        rewards, values: (C, T), zero on padding. `values[:, t]` is that of the state before token t.
    """
    following = np.zeros_like(values)
    following[:, :-1] = values[:, 1:]
    delta = rewards + gamma * following - values
    advantages = np.zeros_like(delta)
    running = np.zeros(len(delta))
    for t in range(delta.shape[1] - 1, -1, -1):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages


def whiten(x: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """(x - mean) / sqrt(var + eps) over all entries, the variance with Bessel's correction."""
    variance = x.var(ddof=1) if x.size > 1 else 0.0
    return (x - x.mean()) / np.sqrt(variance + eps)


# Loss


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, estimator: Literal["k2", "k3"]) -> torch.Tensor:
    """Per-token estimates of KL(policy | reference) from samples of the policy, never negative: (N,).

    With u = log pi_ref - log pi: k2 = u^2 / 2, k3 = exp(u) - u - 1 (Schulman 2020). As VALUES, k3 is unbiased and k2
    nearly so. As LOSSES, what counts is the gradient under samples of the policy: that of k2 is the gradient of
    KL(policy | reference); that of k3 is the gradient of KL(reference | policy), which agrees to first order where the
    two are close; k3 times the importance ratio (DeepSeek-V3.2, arXiv 2512.02556) has that of KL(policy | reference),
    also under samples of an old policy. The estimator k1 = -u has a gradient of mean zero as a loss and belongs in the
    reward, where its gradient is that of KL(policy | reference).
    """
    u = ref_logps - logps
    return u.square() / 2 if estimator == "k2" else u.exp() - u - 1


def clipped_surrogate(
    ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float, dual: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's pessimistic surrogate (arXiv 1707.06347, equation 7) as a loss, and where the clipping holds.

    loss = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), elementwise. Where A < 0, `dual` bounds the loss by
    -dual * A, so that an answer that has become `dual` times as likely pulls no more (dual-clip PPO, arXiv 1912.09729,
    equation 5); 0 does not. It is positively homogeneous in A, so that weights of an average may be multiplied into A
    beforehand.

    Returns:
        the losses, and a bool mask of the entries whose gradient the clipping cut to zero.
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    cut = ratio * advantage > clipped * advantage
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if dual:
        bounded = (advantage < 0) & (ratio > dual)
        loss, cut = torch.where(bounded, -dual * advantage, loss), cut | bounded
    return loss, cut.detach()


def cispo_surrogate(
    logps: torch.Tensor, log_ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE with clipped importance weights (CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5) as a loss.

    loss = -stop_gradient(clip(ratio, 1 - low, 1 + high)) * A * log pi, elementwise: a token beyond the range goes on to
    teach, with the weight at its edge.

    Returns:
        the losses, and a bool mask of the entries whose weight was clipped.
    """
    ratio = log_ratio.detach().exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    return -clipped * advantage * logps, clipped != ratio


def completion_weights(batch: Batch, how: Aggregate, constant: float) -> torch.Tensor:
    """(C,) weight of each token of each completion, such that their weighted sum is the average that `how` names.

    `token`: mean over all tokens of the global batch (DAPO). `sequence`: mean over the tokens of a completion, then
    over completions (GRPO). `constant`: sum over tokens divided by `constant`, mean over completions (Dr. GRPO).
    """
    if how == "token":
        return torch.full_like(batch.lengths, 1 / batch.totals["tokens"])
    each = 1 / batch.totals["completions"]
    if how == "constant":
        return torch.full_like(batch.lengths, each / constant)
    return each / batch.lengths.clamp(min=1)


def policy_metrics(
    log_ratio: torch.Tensor,
    cut: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    kl: torch.Tensor | None = None,
    sampler_ratio: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Health of a policy update, each a tensor of values of which the mean is logged.

    policy/ratio: pi / pi_old per token; policy/ratio_error: |ratio - 1|; and, where they are given, policy/clip_share:
    whether clipping held; policy/entropy in nats and policy/kl to the reference, per token; policy/sampler_error:
    |pi_old / pi_sampler - 1|.
    """
    ratio = log_ratio.exp()
    metrics = {
        "policy/ratio": ratio,
        "policy/ratio_error": (ratio - 1).abs(),
        "policy/sampler_error": None if sampler_ratio is None else (sampler_ratio - 1).abs(),
        "policy/clip_share": None if cut is None else cut.to(ratio.dtype),
        "policy/entropy": entropy,
        "policy/kl": kl,
    }
    return {name: values.detach() for name, values in metrics.items() if values is not None}


def check_first_ratio(metrics: dict[str, Any], tolerance: float = 0.05) -> None:
    """Raise `InvariantError` where the first update of a run shows that sampler and trainer compute different policies.

    Both have the same weights then, so that every importance ratio is 1 but for rounding; bf16 and other kernels may
    move the mean of |ratio - 1| by some thousandths, a wrong temperature, template or mask by tenths.
    """
    # Absent where no group of the update taught anything.
    error = max(float(metrics.get(f"policy/{name}_error", 0.0)) for name in ("ratio", "sampler"))
    if not error <= tolerance:
        raise InvariantError(
            f"importance ratios at the first update are off 1 by {error:.3g} on average, and rounding explains at most "
            f"{tolerance:g}: the old log-probs come from other weights, another temperature or other tokens"
        )
    kl = float(metrics.get("policy/kl", 0.0))
    if not kl >= -1e-6:
        raise InvariantError(f"the estimated KL to the reference is {kl:.3g}: the reference log-probs are wrong")
