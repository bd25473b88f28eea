"""What a claim is, and how its trials are judged: by intervals that hold for all its criteria together.

A criterion is met where the whole interval of a difference lies where the claim says, failed where it lies wholly
outside, and open in between. A claim holds where all its criteria are met, and fails with any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from guerdon.evaluation.comparison import ALPHA, PAIR_SEEDS_FROM, Row, judge
from guerdon.evaluation.metrics import Evaluation, aligned, kind_of
from guerdon.evaluation.statistics import Difference, Interval, needed, paired_difference
from guerdon.evaluation.wording import interval_text

Verdict = Literal["holds", "does not hold", "cannot be told"]
Trial = Callable[[Mapping[str, Any], Sequence[int], Mapping[str, Any], Path], dict[int, Evaluation]]


@dataclass(frozen=True)
class Criterion:
    """What the difference of two arms has to be.

    Attributes:
        arm, rival: labels; the difference is arm minus rival, turned so that more is better.
        margin: in units of the metric.
        where: which of the claim's settings it speaks of; empty where there is one alone.
        metric: which of the trials' metrics; empty for the score.
    """

    arm: str
    rival: str
    margin: float = 0.0
    where: str = ""
    metric: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """The open interval in which the difference has to lie."""
        raise NotImplementedError

    @property
    def says(self) -> str:
        return f"{self.metric}: {self}" if self.metric else str(self)

    def judged(self, difference: Difference) -> Verdict:
        low, high = self.bounds
        if low < difference.low and difference.high < high:
            return "holds"
        return "does not hold" if difference.high <= low or difference.low >= high else "cannot be told"


@dataclass(frozen=True)
class Above(Criterion):
    """The arm is better than its rival by more than the margin."""

    @property
    def bounds(self) -> tuple[float, float]:
        return self.margin, math.inf

    def __str__(self) -> str:
        return f"{self.arm} is above {self.rival}" + (f" by more than {self.margin:g}" if self.margin else "")


@dataclass(frozen=True)
class NotBelow(Criterion):
    """The arm costs nothing: it is worse than its rival by less than the margin, if at all."""

    @property
    def bounds(self) -> tuple[float, float]:
        return -self.margin, math.inf

    def __str__(self) -> str:
        return f"{self.arm} is less than {self.margin:g} below {self.rival}"


@dataclass(frozen=True)
class Alike(Criterion):
    """The two differ by less than the margin."""

    @property
    def bounds(self) -> tuple[float, float]:
        return -self.margin, self.margin

    def __str__(self) -> str:
        return f"{self.arm} and {self.rival} differ by less than {self.margin:g}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A paper's central statement as an experiment.

    Attributes:
        paper: its id in the catalogue.
        says: what is claimed, in one sentence.
        measures: what the score is, in words.
        arms: label -> what is run, as plain data that `trial` understands: `method` and `options`, say. An arm that
            makes sense in some settings alone names them under `where`. Labels of arms and settings are names of
            folders, too.
        settings: label -> data or environment and budget, as plain data; every other arm is run in each.
        trial: `trial(arm, seeds, settings, directory)` gives seed -> evaluation. A function of a module, by whose name
            other processes find it, and whose result depends on nothing but arm, seeds and settings. `directory` is its
            own, to go on from where it was stopped. The items are held-out ones, or one where a run gives one number.
        criteria: all of them have to be met. Arms without any are shown for what they say.
        seeds: 0, 1, ... of the full version.
        together: seeds that a trial takes at once.
        minutes: that the full version takes on one core, about.
        quick: settings that make a version of at most a few minutes, which shows that all runs but proves nothing.
        quick_seeds: of that version.
    """

    paper: int
    says: str
    measures: str
    arms: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Mapping[str, Any]]
    trial: Trial
    criteria: tuple[Criterion, ...]
    seeds: int
    together: int = 1
    minutes: float
    quick: Mapping[str, Any]
    quick_seeds: int = 3

    def version(self, quick: bool) -> dict[str, dict[str, Any]]:
        """The settings of the full or of the quick version."""
        return {where: {**said, **(self.quick if quick else {})} for where, said in self.settings.items()}

    def arms_of(self, where: str) -> dict[str, Mapping[str, Any]]:
        """The arms that are run in a setting."""
        return {label: arm for label, arm in self.arms.items() if where in arm.get("where", self.settings)}

    def place(self, criterion: Criterion) -> str:
        return criterion.where or next(iter(self.settings))


def judge_claim(claim: Claim, found: Mapping[str, Mapping[str, Mapping[int, Evaluation]]]) -> dict[str, Any]:
    """Rows, criteria, verdict and sentences as plain data, from label of setting -> arm -> seed -> evaluation.

    The intervals of the rows hold for each alone, at 95%; those of the criteria for all together (Bonferroni).
    """
    judged = {
        where: [_row(label, arm, found[where][label]) for label, arm in claim.arms_of(where).items()] for where in found
    }
    primaries = {where: judge(rows)[0] for where, rows in judged.items()}
    rows = [
        {
            "where": where,
            "arm": row.label,
            "metric": primaries[where],
            "score": asdict(row.metrics[primaries[where]]),
            "metrics": {name: interval.value for name, interval in row.metrics.items() if name != primaries[where]},
            "seeds": {str(seed): e.means()[primaries[where]] for seed, e in found[where][row.label].items()},
            "items": len(next(iter(found[where][row.label].values())).items),
        }
        for where, rows in judged.items()
        for row in rows
    ]
    criteria = [
        _judged(each, {row.label: row for row in judged[claim.place(each)]}, primaries[claim.place(each)], claim)
        for each in claim.criteria
    ]
    worst: tuple[Verdict, ...] = ("does not hold", "cannot be told")
    verdict: Verdict = next((v for v in worst if v in [each["verdict"] for each in criteria]), "holds")
    return {"verdict": verdict, "sentences": _sentences(verdict, criteria), "criteria": criteria, "rows": rows}


def _row(label: str, arm: Mapping[str, Any], evaluations: Mapping[int, Evaluation]) -> Row:
    """One arm. Where each run gives one number, the runs are the items: all arms share their seeds."""
    each = list(evaluations.values())
    if all(len(e.items) == 1 for e in each):
        together = {name: np.concatenate([e.metrics[name] for e in each]) for name in each[0].metrics}
        each = [Evaluation([f"seed {seed}" for seed in evaluations], together, each[0].primary)]
    return Row(label, arm.get("method"), dict(arm.get("options", {})), seeds=list(evaluations), evaluations=each)


def _judged(criterion: Criterion, rows: Mapping[str, Row], primary: str, claim: Claim) -> dict[str, Any]:
    metric = criterion.metric or primary
    kind, alpha = kind_of(metric), ALPHA / len(claim.criteria)
    evaluations = [rows[label].evaluations for label in (criterion.arm, criterion.rival)]
    scores = (kind.better or 1) * aligned([*evaluations[0], *evaluations[1]], metric)[0]
    arm, rival = np.split(scores, [len(evaluations[0])])
    difference = paired_difference(
        arm,
        rival,
        paired_seeds=len(arm) >= PAIR_SEEDS_FROM,
        bounded=kind.span is not None,
        confidence=1 - alpha,
    )
    verdict, would_do = criterion.judged(difference), None
    if verdict == "cannot be told":
        slack = min(abs(difference.value - bound) for bound in criterion.bounds)
        enough = needed(replace(difference, value=slack), alpha=alpha)
        would_do = enough.items if len(arm) == 1 else enough.seeds
    return {
        "says": criterion.says,
        "where": claim.place(criterion),
        "arm": criterion.arm,
        "rival": criterion.rival,
        "verdict": verdict,
        "difference": {name: getattr(difference, name) for name in ("value", "low", "high")},
        "confidence": 1 - alpha,
        "seeds_needed": would_do,
    }


def _sentences(verdict: Verdict, criteria: Sequence[Mapping[str, Any]]) -> list[str]:
    lead = {
        "holds": "The claim holds.",
        "does not hold": "The claim does not hold here.",
        "cannot be told": "Whether the claim holds cannot be told at this budget.",
    }
    return [lead[verdict], *map(_sentence, criteria)]


def _sentence(criterion: Mapping[str, Any]) -> str:
    said = {"holds": "as claimed", "does not hold": "not so", "cannot be told": "open"}[criterion["verdict"]]
    difference = interval_text(Interval(**criterion["difference"]))
    more = f"; about {criterion['seeds_needed']:,} seeds would tell" if criterion["seeds_needed"] else ""
    return f"{criterion['where']}: {criterion['says']}: {said}, the difference is {difference}{more}."
