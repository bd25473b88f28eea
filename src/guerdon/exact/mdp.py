"""Tabular MDPs and what is known of them exactly: values, optima, occupancies, distances.

Every function works on one MDP or on a whole batch of them at once: leading axes, written `...` below, broadcast as in
numpy, so that many policies in one MDP, many rewards on one set of moves, or many random MDPs are one call. A policy is
an array (..., S, A) of probabilities. In a terminal state no action is taken and the value is 0, whatever its rows say.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from guerdon.errors import ConfigError, DataError

_SWEEPS_WITHOUT_DISCOUNT = 100_000


class TabularMDP:
    """S states, A actions, known moves and rewards.

    Args:
        transitions: (..., S, A, S) probability of each next state.
        rewards: (..., S, A) expected reward of an action, or (..., S, A, S) reward of each move.
        discount: gamma in [0, 1]; 1 needs terminal states that every policy in question reaches.
        start: (..., S) distribution of the first state; uniform over the states that are not terminal by default.
        terminal: (..., S) bool, states in which the episode is over; none by default.

    Attributes:
        reward: (..., S, A) expected reward, 0 in terminal states.
        kernel: (..., S, A, S) moves after which the episode goes on; their sum is below 1 where it may end.

    Raises:
        DataError: shapes that do not fit, numbers that are not finite, rows that are no distributions.
        ConfigError: a discount outside [0, 1].
    """

    def __init__(
        self,
        transitions: np.ndarray,
        rewards: np.ndarray,
        discount: float,
        start: np.ndarray | None = None,
        terminal: np.ndarray | None = None,
    ):
        self.transitions = np.asarray(transitions, dtype=np.float64)
        rewards = np.asarray(rewards, dtype=np.float64)
        if self.transitions.ndim < 3 or self.transitions.shape[-3] != self.transitions.shape[-1]:
            raise DataError(f"transitions have shape {self.transitions.shape}: they must be (..., S, A, S).")
        self.states, self.actions = self.transitions.shape[-3:-1]
        self.discount = float(discount)
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"the discount is {discount}: it must be at least 0 and at most 1.")
        if rewards.shape[-2:] == (self.states, self.actions) and rewards.ndim < self.transitions.ndim:
            rewards = rewards[..., None]
        elif rewards.shape[-3:] != self.transitions.shape[-3:]:
            raise DataError(
                f"rewards have shape {rewards.shape}: for {self.states} states and {self.actions} actions they must "
                f"be (..., S, A) or (..., S, A, S). For many rewards give the transitions as many leading axes."
            )
        self.terminal = np.zeros(self.states, dtype=bool) if terminal is None else np.asarray(terminal, dtype=bool)
        if self.terminal.shape[-1] != self.states:
            raise DataError(f"terminal has shape {self.terminal.shape}: it must be (..., {self.states}).")
        self.alive = ~self.terminal
        self.start = _normalised(self.alive) if start is None else np.asarray(start, dtype=np.float64)
        if self.start.shape[-1] != self.states:
            raise DataError(f"start has shape {self.start.shape}: it must be (..., {self.states}).")
        _check_distributions(self.transitions, "transitions")
        _check_distributions(self.start, "start")
        if not np.isfinite(rewards).all():
            raise DataError("rewards hold numbers that are not finite.")
        if (self.start * self.terminal).any():
            raise DataError("start puts weight on a terminal state: an episode cannot begin where it is over.")
        self.rewards = np.broadcast_to(rewards, np.broadcast_shapes(rewards.shape, self.transitions.shape))
        acts = self.alive[..., :, None, None]
        self.reward = (self.transitions * rewards).sum(-1) * acts[..., 0]
        self.kernel = self.transitions * (acts & self.alive[..., None, None, :])

    @property
    def graph(self) -> np.ndarray:
        """(..., S, S) bool: where some action may lead in one step."""
        return (self.transitions > 0).any(-2) & self.alive[..., :, None]

    @cached_property
    def _rows(self) -> np.ndarray:
        return self.kernel.reshape(*self.kernel.shape[:-3], self.states * self.actions, self.states)

    def backup(self, values: np.ndarray) -> np.ndarray:
        """Q(s, a) = r(s, a) + gamma sum_s' P(s'|s, a) V(s') for values (..., S): (..., S, A)."""
        after = (self._rows @ values[..., None])[..., 0]
        return self.reward + self.discount * after.reshape(*after.shape[:-1], self.states, self.actions)

    def under(self, policy: np.ndarray) -> np.ndarray:
        """Moves under a policy (..., S, A) after which the episode goes on: (..., S, S)."""
        return (policy[..., None, :] @ self.kernel)[..., 0, :]


@dataclass(frozen=True)
class Solution:
    """A policy and its values: V (..., S), Q (..., S, A), probabilities (..., S, A)."""

    values: np.ndarray
    q: np.ndarray
    policy: np.ndarray

    @property
    def advantages(self) -> np.ndarray:
        """(..., S, A) Q(s, a) - V(s)."""
        return self.q - self.values[..., None]


def greedy(q: np.ndarray) -> np.ndarray:
    """The policy (..., S, A) that takes the best action of q (..., S, A), the first one of several."""
    return np.eye(q.shape[-1])[q.argmax(-1)]


def uniform(mdp: TabularMDP) -> np.ndarray:
    """The policy (S, A) that takes every action equally often."""
    return np.full((mdp.states, mdp.actions), 1 / mdp.actions)


def evaluate(
    mdp: TabularMDP, policy: np.ndarray, temperature: float = 0.0, prior: np.ndarray | None = None
) -> Solution:
    """Values of a policy, by solving (I - gamma P_pi) V = r_pi.

    With a temperature tau they are those of E[sum gamma^t (r - tau log(pi(a|s) / prior(a|s)))], where no prior stands
    for the entropy bonus (prior 1); Q(s, a) leaves out the penalty of its own action.

    Raises `ConfigError` where the discount is 1 and the policy may go on for ever.
    """
    reward = mdp.reward
    if temperature:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(policy) - _log_prior(prior)
        reward = reward - temperature * np.where(policy > 0, ratio, 0) * mdp.alive[..., None]
    values = np.linalg.solve(_system(mdp, policy), (policy * reward).sum(-1)[..., None])[..., 0]
    return Solution(values, mdp.backup(values), policy)


def value_iteration(
    mdp: TabularMDP, temperature: float = 0.0, prior: np.ndarray | None = None, tolerance: float = 1e-9
) -> Solution:
    """The optimum by V <- max_a Q, or its soft form V <- tau log sum_a prior(a|s) exp(Q / tau).

    Args:
        temperature: tau. 0: the optimal policy. Above 0: the maximum of E[sum gamma^t (r + tau entropy)] or, with a
            prior, of E[sum gamma^t r] - tau KL(pi || prior); the policy is then prior exp((Q - V) / tau).
        prior: (..., S, A) policy; without a temperature it plays no part.
        tolerance: bound of the error of V, relative to the largest value where that is above 1.

    Raises:
        ConfigError: the discount is 1 and the values grow without end.
    """
    shifts = mdp.discount < 1 and not mdp.terminal.any()
    values = fixed_point(
        lambda v: _improved(mdp, mdp.backup(v), temperature, prior)[0],
        np.zeros(mdp.states),
        mdp.discount,
        shifts=shifts,
        tolerance=tolerance,
    )
    q = mdp.backup(values)
    best, policy = _improved(mdp, q, temperature, prior)
    return Solution(best, q, policy)


def policy_iteration(mdp: TabularMDP, temperature: float = 0.0, prior: np.ndarray | None = None) -> Solution:
    """The same optimum as `value_iteration`, to rounding: exact evaluation and improvement in turns."""
    policy = uniform(mdp) if prior is None else prior
    while True:
        found = evaluate(mdp, policy, temperature, prior)
        best, policy = _improved(mdp, found.q, temperature, prior)
        if (best - found.values).max() <= 1e-11 * max(1.0, np.abs(best).max()):
            return Solution(found.values, found.q, policy)


def fixed_point(
    operator: Callable[[np.ndarray], np.ndarray],
    values: np.ndarray,
    discount: float,
    *,
    shifts: bool,
    tolerance: float,
) -> np.ndarray:
    """The fixed point of a monotone gamma-contraction of values (..., S), swept from `values` on.

    Args:
        shifts: whether T(V + c) = T V + gamma c for a constant c, as where no episode ends. Then the fixed point lies
            within gamma / (1 - gamma) times [min, max] of the last change, and each sweep goes on from the middle of
            these bounds (MacQueen 1966): only the differences between states have to converge.
        tolerance: bound of the error, relative to the largest value where that is above 1. Without a discount the last
            change has to be that small.

    Raises `ConfigError` where values without a discount do not settle.
    """
    factor = discount / (1 - discount) if discount < 1 else 1.0
    sweeps = itertools.count()
    while True:
        swept = operator(values)
        change = swept - values
        middle = (change.max(-1, keepdims=True) + change.min(-1, keepdims=True)) / 2 if shifts else np.zeros(1)
        values = swept + factor * middle
        if factor * np.abs(change - middle).max() <= tolerance * max(1.0, np.abs(values).max()):
            return values
        if discount == 1 and next(sweeps) == _SWEEPS_WITHOUT_DISCOUNT:
            raise ConfigError("without a discount these values do not settle: use a discount below 1.")


def successor(mdp: TabularMDP, policy: np.ndarray) -> np.ndarray:
    """Successor representation (I - gamma P_pi)^-1: (..., S, S) discounted visits of s' from s, that of now included.

    Rows sum to 1 / (1 - gamma) where no episode ends; terminal states are not counted.
    """
    return np.linalg.inv(_system(mdp, policy)) * mdp.alive[..., :, None]


def occupancy(mdp: TabularMDP, policy: np.ndarray) -> np.ndarray:
    """Discounted occupancy sum_t gamma^t P(s_t = s, a_t = a): (..., S, A).

    It sums to 1 / (1 - gamma) where no episode ends, and its product with the rewards to the policy's value.
    """
    flow = np.swapaxes(_system(mdp, policy), -1, -2)
    start = np.broadcast_to(mdp.start, flow.shape[:-1])
    return np.linalg.solve(flow, start[..., None]) * policy


def average_occupancy(mdp: TabularMDP, policy: np.ndarray) -> np.ndarray:
    """Long-run share of the steps spent in s with action a: (..., S, A), summing to 1.

    An episode that ends is followed by another from the start distribution. Where the chain falls into several classes,
    the share is that from the start distribution.
    """
    moves = mdp.under(policy)
    chain = moves + (1 - moves.sum(-1, keepdims=True)) * mdp.start[..., None, :]
    # The lazy chain has the same long-run shares and no period; squaring it 60 times takes 2^60 steps.
    chain = (chain + np.eye(mdp.states)) / 2
    for _ in range(60):
        chain = _normalised(chain @ chain)
    return (mdp.start[..., None, :] @ chain)[..., 0, :, None] * policy


def shortest_paths(costs: np.ndarray) -> np.ndarray:
    """Least cost from every state to every other: (..., S, S), infinite where there is no way.

    Args:
        costs: (..., S, S) cost of each edge, at least 0, infinite where there is none; or a graph of bools, whose edges
            cost 1 (`shortest_paths(mdp.graph)`: least number of steps, were every possible move at one's command).
    """
    paths = np.where(costs, 1.0, np.inf) if costs.dtype == bool else costs.astype(np.float64)
    if (paths < 0).any() or np.isnan(paths).any():
        raise DataError("costs of edges must be numbers of at least 0, infinite where there is no edge.")
    paths = np.where(np.eye(paths.shape[-1], dtype=bool), 0.0, paths)
    for via in range(paths.shape[-1]):  # Floyd and Warshall: paths through the states up to `via`
        paths = np.minimum(paths, paths[..., :, via, None] + paths[..., None, via, :])
    return paths


def reachable(mdp: TabularMDP, policy: np.ndarray | None = None) -> np.ndarray:
    """(..., S) bool: states that an episode may come to, with any actions or with those of a policy."""
    taken = True if policy is None else policy[..., None] > 0
    graph = ((mdp.transitions > 0) & taken).any(-2) & mdp.alive[..., :, None]
    return _spread(mdp.start > 0, graph)


def _spread(mask: np.ndarray, graph: np.ndarray) -> np.ndarray:
    """The states of `mask` (..., S) and all that follow them in a graph (..., S, S)."""
    while True:
        wider = mask | (mask[..., None, :] @ graph)[..., 0, :]
        if np.array_equal(wider, mask):
            return wider
        mask = wider


def _system(mdp: TabularMDP, policy: np.ndarray) -> np.ndarray:
    moves = mdp.under(policy)
    if mdp.discount == 1:
        ends = (moves.sum(-1) < 1 - 1e-9) | mdp.terminal
        if not _spread(ends, np.swapaxes(moves > 0, -1, -2)).all():
            raise ConfigError("without a discount a policy that may go on for ever has no values: use one below 1.")
    return np.eye(mdp.states) - mdp.discount * moves


def _improved(
    mdp: TabularMDP, q: np.ndarray, temperature: float, prior: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Best values (..., S) of one step with Q behind it, and the policy that has them."""
    if not temperature:
        return q.max(-1), greedy(q)
    with np.errstate(divide="ignore"):
        tilted = _log_prior(prior) + q / temperature
    normaliser = np.logaddexp.reduce(tilted, axis=-1)
    return temperature * normaliser * mdp.alive, np.exp(tilted - normaliser[..., None])


def _log_prior(prior: np.ndarray | None) -> np.ndarray:
    return np.zeros(1) if prior is None else np.log(prior)


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(-1, keepdims=True)


def _check_distributions(rows: np.ndarray, what: str) -> None:
    wrong = ~((rows >= 0).all(-1) & (np.abs(rows.sum(-1) - 1) < 1e-6))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DataError(f"{what}{list(where) or ''} is no distribution: it must be at least 0 and sum to 1.")
