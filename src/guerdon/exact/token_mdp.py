"""Exact soft optima: of a token MDP by backing up from the end, of a finite bandit in closed form.

The ground truth that learned policies, implicit rewards and searches are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

END = -1


@dataclass(frozen=True)
class TokenMDP:
    """S states, A tokens, deterministic moves, no discount.

    Attributes:
        child: (S, A) the state that each token leads to, never one met before; END (-1) where the answer ends with it.
        reward: (S, A) reward of each token.
        ref_logps: (S, A) log-probs of the reference policy; -inf where a token cannot be taken.
    """

    child: np.ndarray
    reward: np.ndarray
    ref_logps: np.ndarray

    def path(self, tokens: np.ndarray, start: int = 0) -> np.ndarray:
        """The states in which tokens (T,) are taken, from `start` on: (T,)."""
        states = []
        for token in tokens:
            states.append(start)
            start = int(self.child[start, token])
        return np.array(states, dtype=np.int64)

    def along(self, values: np.ndarray, tokens: np.ndarray, start: int = 0) -> np.ndarray:
        """(S, A) values of tokens (T,) in the states where they are taken: (T,)."""
        return values[self.path(tokens, start), tokens]


@dataclass(frozen=True)
class SoftOptimum:
    """The KL-regularised optimum of a token MDP.

    Attributes:
        values: (S,) V*(s) = beta log sum_a exp(Q*(s, a) / beta).
        q: (S, A) Q*(s, a) = r(s, a) + beta log pi_ref(a|s) + V*(s').
        logps: (S, A) log pi*(a|s) = (Q*(s, a) - V*(s)) / beta.
        advantages: (S, A) beta log pi*/pi_ref = r(s, a) + V*(s') - V*(s); nan where a token cannot be taken.
    """

    values: np.ndarray
    q: np.ndarray
    logps: np.ndarray
    advantages: np.ndarray


def token_tree(actions: int, steps: int) -> np.ndarray:
    """(S, A) children in the tree of all token sequences of length `steps`; the empty sequence is state 0.

    States are counted level by level, so that state s leads to A s + 1 ... A s + A.
    """
    states = sum(actions**depth for depth in range(steps))
    child = actions * np.arange(states)[:, None] + np.arange(1, actions + 1)
    return np.where(child < states, child, END)


def soft_optimum(mdp: TokenMDP, beta: float) -> SoftOptimum:
    """Values and policy that maximise E[sum r] - beta KL(pi || pi_ref), by exact backup over all states at once.

    V at the end is 0. A backup over every state is repeated until nothing changes, which takes as many rounds as the
    longest answer has tokens (Rafailov et al. 2024, "From r to Q*", section 4).

    Raises:
        ValueError: where a state can be met again, so that answers need not end.
    """
    values = np.zeros(len(mdp.child))
    for _ in range(len(values) + 1):
        after = np.where(mdp.child == END, 0.0, values[mdp.child])
        q = mdp.reward + beta * mdp.ref_logps + after
        backed_up = beta * np.logaddexp.reduce(q / beta, axis=1)
        if np.array_equal(backed_up, values):
            advantages = np.where(np.isfinite(mdp.ref_logps), mdp.reward + after - values[:, None], np.nan)
            return SoftOptimum(values, q, (q - values[:, None]) / beta, advantages)
        values = backed_up
    raise ValueError("a state of this token MDP can be met again: answers need not end")


def kl_regularised_optimum(reward: np.ndarray, ref_logps: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The policy pi* proportional to pi_ref exp(r / beta), and its value beta log E_ref[exp(r / beta)].

    Args:
        reward: (..., A) reward of each answer.
        ref_logps: (..., A) log-probs of the reference policy.
        beta: strength of the KL penalty in E[r] - beta KL(pi || pi_ref).

    Returns:
        log pi* (..., A) and the value (...), the maximum of that objective.
    """
    tilted = ref_logps + reward / beta
    normaliser = np.logaddexp.reduce(tilted, axis=-1)
    return tilted - normaliser[..., None], beta * normaliser
