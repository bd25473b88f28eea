"""What is measured on held-out items: pure functions from results to one number per item and metric.

Every mean in a table is a mean over items of these numbers, so that whatever is averaged can also be paired, resampled
and looked at item by item.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.errors import DataError
from guerdon.evaluation.statistics import pass_at_k

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class MetricKind:
    """How a metric reads: its name in words, its range, and whether more is better (1), less (-1), or neither (0)."""

    label: str
    better: int = 0
    span: tuple[float, float] | None = None


_KINDS = {
    "reward": MetricKind("mean reward", 1),
    "accuracy": MetricKind("accuracy", 1, (0.0, 1.0)),
    "preference/accuracy": MetricKind("preference accuracy", 1, (0.0, 1.0)),
    "preference/margin": MetricKind("implicit reward margin", 1),
    "nll": MetricKind("NLL (nats per token)", -1),
    "kl": MetricKind("KL to the start (nats)"),
    "length": MetricKind("length (tokens)"),
    "return": MetricKind("return", 1),
    "normalized": MetricKind("normalised score", 1),
    "success": MetricKind("success rate", 1, (0.0, 1.0)),
    "steps": MetricKind("episode length (steps)"),
    "truncated": MetricKind("truncated share", -1, (0.0, 1.0)),
    "cost": MetricKind("cost over that of the shortest path", -1),
    "nodes": MetricKind("generated nodes", -1),
    "growth": MetricKind("doublings of the generated nodes", -1),
}


def kind_of(metric: str) -> MetricKind:
    """How `metric` reads; names without an entry (`pass@8`, `reward/format`) get theirs from their first part."""
    if metric.startswith("pass@"):
        return MetricKind(metric, 1, (0.0, 1.0))
    return _KINDS.get(metric) or MetricKind(metric, _KINDS.get(metric.partition("/")[0], MetricKind("")).better)


@dataclass
class Evaluation:
    """One policy judged on held-out items.

    Attributes:
        items: one key per item, the same over methods and seeds (a hash of the record, say); the pairing rests on it.
            For a control policy an item is an episode, which starts alike for all.
        metrics: name -> one value per item, `nan` where the metric says nothing about the item (null in the file).
        primary: the metric that decides a comparison.
        settings: what the numbers depend on beside the policy (completions per item, temperature, step, ...).
    """

    items: list[str]
    metrics: dict[str, np.ndarray]
    primary: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = {name: len(values) for name, values in self.metrics.items() if len(values) != len(self.items)}
        if wrong or len(set(self.items)) != len(self.items) or self.primary not in self.metrics:
            raise DataError(
                f"an evaluation needs one value per item and metric, unique item keys, and its primary metric "
                f"'{self.primary}': {len(self.items)} items, {len(set(self.items))} keys, lengths {wrong or 'right'}, "
                f"metrics {', '.join(self.metrics)}."
            )

    def means(self) -> dict[str, float]:
        """Mean of each metric over the items that it speaks of."""
        return {name: float(np.nanmean(v)) for name, v in self.metrics.items() if not np.isnan(v).all()}

    def as_dict(self) -> dict[str, Any]:
        """As plain data for JSON; null where a metric says nothing."""
        metrics = {k: [None if np.isnan(x) else float(x) for x in v] for k, v in self.metrics.items()}
        return {**asdict(self), "metrics": metrics}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `evaluation.json` of a run of one seed, whole or not at all."""
        _write(path, self.as_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read `evaluation.json` of a run of one seed; a `DataError` where it is not one."""
        return next(iter(load_evaluations(path).values()))


def save_evaluations(path: str | os.PathLike[str], evaluations: Mapping[int, Evaluation]) -> None:
    """Write `evaluation.json` of a run of one seed or of several (seed -> evaluation), whole or not at all."""
    seeds = {str(seed): found.as_dict() for seed, found in evaluations.items()}
    _write(path, {"seeds": seeds} if len(seeds) > 1 else next(iter(seeds.values())))


def load_evaluations(path: str | os.PathLike[str]) -> dict[int, Evaluation]:
    """Read `evaluation.json`: seed -> evaluation, with the key 0 for what a run of one seed has written.

    Raises:
        DataError: the file is no evaluation.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return {int(seed): _evaluation(said) for seed, said in data.get("seeds", {"0": data}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no evaluation ({type(error).__name__}: {error}). Evaluate again.") from error


def _evaluation(data: Mapping[str, Any]) -> Evaluation:
    metrics = {k: np.array(v, dtype=float) for k, v in data["metrics"].items()}  # null becomes nan
    return Evaluation(data["items"], metrics, data["primary"], data.get("settings", {}))


def _write(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    draft = Path(f"{path}.tmp")
    draft.write_text(json.dumps(data, allow_nan=False), encoding="utf-8")
    os.replace(draft, path)


def aligned(evaluations: Sequence[Evaluation], metric: str) -> tuple[np.ndarray, list[str]]:
    """Scores (evaluations, items) and the item keys, over the items of which every evaluation says something.

    Raises `DataError` where the evaluations were not made on the same items.
    """
    keys = evaluations[0].items
    rows = []
    for evaluation in evaluations:
        if evaluation.items != keys:
            if sorted(evaluation.items) != sorted(keys):
                raise DataError("the evaluations were made on different held-out items and cannot be compared.")
            where = {key: i for i, key in enumerate(evaluation.items)}
            rows.append(evaluation.metrics[metric][[where[key] for key in keys]])
        else:
            rows.append(evaluation.metrics[metric])
    scores = np.stack(rows)
    known = ~np.isnan(scores).any(0)
    return scores[:, known], [key for key, here in zip(keys, known, strict=True) if here]


def completion_metrics(
    rewards: dict[str, np.ndarray], lengths: np.ndarray, finished: np.ndarray, *, ks: Sequence[int] = (1,), binary: bool
) -> dict[str, np.ndarray]:
    """Metrics of sampled completions, each `(items,)`.

    Args:
        rewards: component -> (items, n), with the weighted total under "reward".
        lengths: (items, n) tokens of each completion.
        finished: (items, n) whether it ended by itself.
        ks: with `binary` rewards (right means reward > 0), the k of the unbiased pass@k; pass@1 is the mean.
    """
    out = {
        ("reward" if name == "reward" else f"reward/{name}"): values.mean(1).astype(float)
        for name, values in rewards.items()
    }
    if binary:
        right = (rewards["reward"] > 0).sum(1)
        out = {f"pass@{k}": pass_at_k(rewards["reward"].shape[1], right, k) for k in ks} | out
    return out | {"length": lengths.mean(1).astype(float), "truncated": 1.0 - finished.mean(1)}


def preference_metrics(
    chosen: np.ndarray, rejected: np.ndarray, ref_chosen: np.ndarray, ref_rejected: np.ndarray, *, beta: float = 1.0
) -> dict[str, np.ndarray]:
    """Accuracy and margin of the implicit reward `beta * log(policy / start)`, each (pairs,).

    Takes sequence log-probs (pairs,) under the policy and under the start. A margin of exactly zero counts one half, so
    that the untrained start scores 0.5 whatever its rounding.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return {"preference/accuracy": (margin > 0) + 0.5 * (margin == 0), "preference/margin": margin}


def nll(logps: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Held-out negative log-likelihood per token, (items,), from each item's summed log-prob and its learned tokens."""
    return {"nll": np.where(tokens > 0, -logps / np.maximum(tokens, 1), np.nan)}


def kl_to_start(
    logps: Sequence[Sequence[np.ndarray]], ref_logps: Sequence[Sequence[np.ndarray]]
) -> dict[str, np.ndarray]:
    """KL(policy || start) per completion in nats, (items,), from the token log-probs of samples of the policy.

    Takes for each item its completions and for each completion its tokens' log-probs, under policy and start.

    Sums `r - 1 - log r` with `r = start / policy` over the tokens: unbiased like `-log r`, never negative, and of far
    smaller variance while the two are close (Schulman 2020, "Approximating KL divergence", k3).
    """

    def k3(own: np.ndarray, ref: np.ndarray) -> float:
        return float(np.sum(np.expm1(ref - own) - (ref - own)))

    items = zip(logps, ref_logps, strict=True)
    return {"kl": np.array([np.mean([k3(*pair) for pair in zip(*item, strict=True)]) for item in items])}
