"""Fixed points of in-sample operators: where implicit Q-learning and its robust kin end on a table of transitions.

On a table the updates of IQL (Kostrikov et al. 2021) and RIQL (Yang et al. 2024) have exactly one fixed point: the
locations, quantiles and expectiles below are monotone and move with a constant that is added to all values, so that one
round of them is a contraction with modulus gamma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from guerdon.exact.mdp import fixed_point
from guerdon.exact.samples import Samples


def expectile(x: np.ndarray, tau: float, weights: np.ndarray) -> np.ndarray:
    """argmin_v sum_i w_i |tau - 1[x_i < v]| (x_i - v)^2 over the last axis: (...); 0 where all weights are 0.

    In closed form: among the weighted means in which values up to some rank count 1 - tau and those above it tau, it is
    the largest (for tau of at least 1/2) or the smallest (below).
    """
    x, weights = np.broadcast_arrays(x, weights)
    order = np.argsort(x, -1)
    x, weights = np.take_along_axis(x, order, -1), np.take_along_axis(weights, order, -1)
    low, low_x = weights.cumsum(-1), (weights * x).cumsum(-1)
    high, high_x = low[..., -1:] - low, low_x[..., -1:] - low_x
    means = ((1 - tau) * low_x + tau * high_x) / np.maximum((1 - tau) * low + tau * high, np.finfo(float).tiny)
    return means.max(-1) if tau >= 0.5 else means.min(-1)


def huber_location(y: np.ndarray, delta: float, weights: np.ndarray) -> np.ndarray:
    """argmin_q sum_i w_i l(y_i - q) over the last axis, l the Huber loss with threshold delta: (...).

    An infinite delta gives the mean. Else the derivative of the sum falls in straight pieces between the points
    y_i -+ delta, and its zero is read off exactly. Where it is zero on a whole piece (two equal camps further apart
    than 2 delta) the middle of that piece is taken. Values and weights broadcast; weights are at least 0, not all 0.
    """
    weights = np.broadcast_to(weights, np.broadcast_shapes(weights.shape, y.shape))
    y = y.reshape((1,) * (weights.ndim - y.ndim) + y.shape)
    total = weights.sum(-1)
    if math.isinf(delta):
        return (weights * y).sum(-1) / total
    points = np.concatenate([y - delta, y + delta], -1)
    order = np.argsort(points, -1)
    points = np.take_along_axis(points, order, -1)
    bends = np.take_along_axis(np.concatenate([-weights, weights], -1), order, -1)
    slope = np.zeros(bends.shape)  # of minus the loss, at each of the points
    np.cumsum(bends.cumsum(-1)[..., :-1] * np.diff(points) / delta, -1, out=slope[..., 1:])
    slope += total[..., None]
    slack = 1e-10 * total[..., None]
    first = (slope > slack).sum(-1, keepdims=True)  # where it is no longer positive
    last = (slope >= -slack).sum(-1, keepdims=True) - 1  # where it is not yet negative
    points = np.broadcast_to(points, slope.shape)
    left, right, above, below = (
        np.take_along_axis(of, at, -1)[..., 0] for of in (points, slope) for at in (last, first)
    )
    flat = (first <= last)[..., 0]
    return np.where(flat, (left + right) / 2, left + (right - left) * above / np.where(flat, 1, above - below))


@dataclass(frozen=True)
class InSample:
    """Values that rest on seen transitions alone.

    Attributes:
        critics: (..., K, S, A) one per replicate; -inf for pairs that were not seen.
        q: (..., S, A) their quantile.
        values: (..., S) expectile of q over the actions taken; 0 in states where none was.
    """

    critics: np.ndarray
    q: np.ndarray
    values: np.ndarray


def in_sample_backup(
    samples: Samples,
    values: np.ndarray,
    discount: float,
    *,
    tau: float = 0.7,
    delta: float = math.inf,
    alpha: float = 0.0,
    replicates: np.ndarray | None = None,
) -> InSample:
    """One round of IQL or RIQL in expectation, from values (..., S) to Q and new values.

    Q_k(s, a) is the location of the targets r + gamma (1 - terminated) V(s') under the weights of replicate k, q(s, a)
    the alpha-quantile over k with linear interpolation, V(s) the tau-expectile of q(s, .) under the counts of actions.

    Args:
        tau: expectile.
        delta: threshold of the Huber loss, in units of the values; infinite is the squared loss of IQL.
        alpha: quantile over the critics; 0 is the minimum.
        replicates: (..., K, S, A, n) weights, see `samples.bootstrap`; by default one critic that counts all once.
    """
    counts, unseen = samples.counts, samples.counts == 0
    weights = samples.seen[..., None, :, :, :].astype(float) if replicates is None else replicates
    weights = np.where(unseen[..., None, :, :, None], 1, weights)  # some location; nothing rests on it
    after = np.take_along_axis(values, samples.next_states.reshape(*values.shape[:-1], -1), -1)
    targets = samples.rewards + discount * ~samples.terminated * after.reshape(samples.rewards.shape)
    critics = huber_location(targets[..., None, :, :, :], delta, weights)
    q = np.quantile(critics, alpha, axis=-3)
    values = expectile(q, tau, counts)
    return InSample(np.where(unseen[..., None, :, :], -np.inf, critics), np.where(unseen, -np.inf, q), values)


def in_sample_fixed_point(
    samples: Samples,
    discount: float,
    *,
    tau: float = 0.7,
    delta: float = math.inf,
    alpha: float = 0.0,
    replicates: np.ndarray | None = None,
    tolerance: float = 1e-9,
) -> InSample:
    """The values that `in_sample_backup` (see there) leaves as they are, within `tolerance` (see `mdp.fixed_point`)."""

    def backup(values: np.ndarray) -> InSample:
        return in_sample_backup(samples, values, discount, tau=tau, delta=delta, alpha=alpha, replicates=replicates)

    values = fixed_point(
        lambda v: backup(v).values,
        np.zeros(samples.rewards.shape[:-2]),
        discount,
        shifts=discount < 1 and bool(samples.counts.any(-1).all()) and not samples.terminated[samples.seen].any(),
        tolerance=tolerance,
    )
    return backup(values)


def advantage_weighted(
    behaviour: np.ndarray, advantages: np.ndarray, beta: float = 3.0, cap: float = 100.0
) -> np.ndarray:
    """The policy (..., S, A) in proportion to behaviour * min(exp(beta * advantage), cap), that of IQL's actor.

    Where the behaviour (..., S, A) is all zero, no action having been seen, the policy is uniform.
    """
    advantages = np.where(behaviour > 0, advantages, 0)
    weights = behaviour * np.exp(np.minimum(beta * advantages, math.log(cap)))
    weights = np.where(weights.sum(-1, keepdims=True) > 0, weights, 1.0)
    return weights / weights.sum(-1, keepdims=True)
