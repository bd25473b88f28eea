"""What the trials of a comparison say: scores and intervals of every row, and how every pair of rows compares.

Every pair is compared on the same held-out items, and the p-values are adjusted for all pairs (Holm), because which
method is the best is read off the same numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.errors import DataError
from guerdon.evaluation.metrics import Evaluation, MetricKind, aligned, kind_of
from guerdon.evaluation.statistics import (
    Difference,
    Interval,
    Needed,
    bootstrap,
    holm,
    iqm,
    needed,
    paired_difference,
    probability_of_improvement,
    score_interval,
)

BASE = "base"  # the row of the untrained start
ALPHA = 0.05  # family-wise over all pairs of rows
PAIR_SEEDS_FROM = 5  # seeds are shared by all methods; fewer than this, pairing them costs more than it gives


@dataclass
class Row:
    """One method of a comparison, or the untrained start.

    Attributes:
        seeds: those that were trained and evaluated.
        failed: seed -> the last lines of what went wrong.
        waiting: seeds that have not finished.
        evaluations: one for each of `seeds`.
        costs: one for each of `seeds`: tokens trained, samples drawn, wall and cpu seconds, peak memory in bytes. Seeds
            that were trained together share their seconds equally; the memory is that of all.
        metrics: interval of each metric's mean, over seeds and items.
        iqm: interquartile mean of the seeds' primary scores; the same as the mean for two seeds.
    """

    label: str
    method: str | None
    options: dict[str, Any]
    seeds: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    directories: dict[int, Path] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    costs: list[dict[str, float]] = field(default_factory=list)
    scores: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    metrics: dict[str, Interval] = field(default_factory=dict)
    iqm: Interval | None = None

    @property
    def cost(self) -> dict[str, float]:
        """Mean cost of a finished trial; the peak memory is the largest."""
        names = dict.fromkeys(name for cost in self.costs for name in cost)
        values = {name: [cost[name] for cost in self.costs if name in cost] for name in names}
        return {name: max(v) if name == "memory" else float(np.mean(v)) for name, v in values.items()}


@dataclass
class Against:
    """How one row compares with another on the primary metric; `difference` is better-is-positive."""

    difference: Difference
    p: float  # Holm-adjusted over all pairs of rows
    above: Interval  # probability that a seed of the first scores above a seed of the second
    needed: Needed | None  # what would tell them apart, where they cannot be

    @property
    def distinguishable(self) -> bool:
        return self.p <= ALPHA


@dataclass
class Comparison:
    """What stands in a comparison's directory, read and judged.

    Attributes:
        rows: the untrained start first, then the methods, best first; rows without a finished trial last.
        pairs: (better label, worse label) -> how they compare, for all pairs of rows with a finished trial.
        verdict: sentences, the most important one first.
        looks: seed counts and methods of earlier calls, where the comparison was enlarged after it had been looked at.
    """

    directory: Path
    settings: dict[str, Any]
    command: str
    looks: list[dict[str, Any]]
    primary: str
    rows: list[Row]
    pairs: dict[tuple[str, str], Against]
    verdict: list[str] = field(default_factory=list)

    @property
    def kind(self) -> MetricKind:
        return kind_of(self.primary)

    @property
    def methods(self) -> list[Row]:
        """The trained rows that have a score, best first."""
        return [row for row in self.rows if row.method is not None and row.seeds]


def judge(rows: list[Row]) -> tuple[str, dict[tuple[str, str], Against]]:
    """Fill in the rows' scores and intervals; the primary metric and how every pair of rows compares by it.

    Raises `DataError` for trials that were evaluated on different items or by different metrics.
    """
    scored = [row for row in rows if row.evaluations]
    everything = [evaluation for row in scored for evaluation in row.evaluations]
    if not everything:
        return "score", {}
    primary = everything[0].primary
    if any(evaluation.primary != primary for evaluation in everything):
        raise DataError(f"the trials were judged by {sorted({e.primary for e in everything})}; evaluate them alike.")
    scores, items = aligned(everything, primary)
    if not items:
        raise DataError(f"no held-out item has a {primary} in every trial; evaluate on more items.")
    kind = kind_of(primary)
    for row in scored:
        row.scores, scores = np.split(scores, [len(row.evaluations)])
        row.iqm = bootstrap(row.scores, iqm)
        shared = [name for name in row.evaluations[0].metrics if all(name in e.metrics for e in row.evaluations)]
        for name in shared:
            values = row.scores if name == primary else aligned(row.evaluations, name)[0]
            if values.size:
                row.metrics[name] = score_interval(values, span=kind_of(name).span)
    sign = kind.better or 1
    ordered = sorted(scored, key=lambda row: -sign * row.metrics[primary].value)
    found: dict[tuple[str, str], Difference] = {}
    for a, b in combinations(ordered, 2):
        together = a.seeds == b.seeds and len(a.seeds) >= PAIR_SEEDS_FROM
        found[a.label, b.label] = paired_difference(
            sign * a.scores, sign * b.scores, paired_seeds=together, bounded=kind.span is not None
        )
    by_label = {row.label: sign * row.scores for row in scored}
    pairs = {}
    for (labels, difference), p in zip(found.items(), holm([d.p for d in found.values()]), strict=True):
        above = probability_of_improvement(by_label[labels[0]], by_label[labels[1]])
        would_do = needed(difference, alpha=ALPHA / len(found)) if p > ALPHA else None
        pairs[labels] = Against(difference, p, above, would_do)
    return primary, pairs


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data, for programs."""
    return {
        "directory": str(comparison.directory),
        "settings": comparison.settings,
        "looks": comparison.looks,
        "metric": comparison.primary,
        "verdict": comparison.verdict,
        "rows": [
            {
                "label": row.label,
                "method": row.method,
                "options": row.options,
                "seeds": row.seeds,
                "failed": {str(seed): error for seed, error in row.failed.items()},
                "waiting": row.waiting,
                "metrics": {name: asdict(interval) for name, interval in row.metrics.items()},
                "iqm": asdict(row.iqm) if row.iqm else None,
                "seed_scores": row.scores.mean(1).tolist() if row.seeds else [],
                "cost": row.cost,
            }
            for row in comparison.rows
        ],
        "pairs": [
            {
                "better": a,
                "worse": b,
                "difference": asdict(against.difference),
                "p_adjusted": against.p,
                "distinguishable": against.distinguishable,
                "probability_of_improvement": asdict(against.above),
                "needed": asdict(against.needed) if against.needed else None,
            }
            for (a, b), against in comparison.pairs.items()
        ],
    }
