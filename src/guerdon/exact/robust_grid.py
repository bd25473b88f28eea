"""Implicit Q-learning on corrupted data, without networks: the tabular experiment of robust IQL (Yang et al. 2024).

A slippery 6 x 6 grid whose goal pays 100 and brings one back to the start; n transitions of every action in every cell,
some of them corrupted; the exact fixed point of each learner on that table; its greedy policy, judged in the true grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from guerdon.exact.fixed_points import in_sample_fixed_point
from guerdon.exact.mdp import TabularMDP, evaluate, greedy, value_iteration
from guerdon.exact.samples import Samples, bootstrap, sample
from guerdon.exact.worlds import gridworld

Corruption = Literal["none", "dynamics", "reward", "worst-state"]


@dataclass(frozen=True)
class Learner:
    """IQL as a fixed point: Huber threshold (infinite: squared loss), quantile over critics, number of critics."""

    delta: float
    alpha: float
    critics: int


LEARNERS = {
    "iql": Learner(math.inf, 0.0, 2),  # the smaller of two
    "mean-quantile": Learner(math.inf, 0.25, 5),
    "huber-10": Learner(10.0, 0.25, 5),
    "riql": Learner(1.0, 0.25, 5),
}


def robust_grid() -> TabularMDP:
    """The grid: start and goal in opposite corners, one move in ten random, discount 0.95."""
    layout = ["S.....", *["......"] * 4, ".....G"]
    return gridworld(layout, 0.95, slip=0.1, reward=100.0, goal="teleport")


def corrupted(mdp: TabularMDP, samples: Samples, corruption: Corruption, rate: float, seed: int) -> Samples:
    """Each transition corrupted with probability `rate`.

    "dynamics" replaces the next state by a uniformly random one, "worst-state" by that of the least optimal value,
    "reward" the reward by a uniform number in [-300, 300].
    """
    rng = np.random.default_rng(seed)
    hit = rng.random(samples.rewards.shape) < rate
    if corruption == "dynamics":
        there = rng.integers(0, mdp.states, hit.shape)
        return replace(samples, next_states=np.where(hit, there, samples.next_states))
    if corruption == "worst-state":
        worst = value_iteration(mdp).values.argmin()
        return replace(samples, next_states=np.where(hit, worst, samples.next_states))
    if corruption == "reward":
        return replace(samples, rewards=np.where(hit, rng.uniform(-300, 300, hit.shape), samples.rewards))
    return samples


def robust_grid_scores(
    corruption: Corruption,
    n: int,
    seeds: Sequence[int],
    learners: Mapping[str, Learner] = LEARNERS,
    rate: float = 0.3,
) -> dict[str, np.ndarray]:
    """Scores of each learner, (seeds,): value at the start of its greedy policy, as a share of the optimal one.

    Args:
        corruption: of the data, see `corrupted`.
        n: transitions of each action in each cell.
        seeds: each draws its own data, the same for all learners.
        rate: share of transitions that are corrupted.
    """
    mdp = robust_grid()
    optimum = value_iteration(mdp).values @ mdp.start
    streams = [np.random.SeedSequence(seed).generate_state(3) for seed in seeds]
    tables = [corrupted(mdp, sample(mdp, n, draws), corruption, rate, hits) for draws, hits, _ in streams]
    samples = Samples.stack(tables)
    scores = {}
    for name, learner in learners.items():
        replicates = [bootstrap(t, learner.critics, s) for t, (_, _, s) in zip(tables, streams, strict=True)]
        found = in_sample_fixed_point(
            samples,
            mdp.discount,
            delta=learner.delta,
            alpha=learner.alpha,
            replicates=np.stack(replicates),
            tolerance=1e-6,
        )
        scores[name] = evaluate(mdp, greedy(found.q)).values @ mdp.start / optimum
    return scores
