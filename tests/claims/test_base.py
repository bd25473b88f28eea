"""Criteria on intervals, and the judgement of a claim from the numbers of its seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from guerdon.claims import Above, Alike, Claim, NotBelow, all_claims, get_claim
from guerdon.claims.base import Criterion, judge_claim
from guerdon.claims.running import stored_result
from guerdon.errors import ConfigError
from guerdon.evaluation.metrics import Evaluation
from guerdon.evaluation.statistics import Difference


def difference(low: float, high: float) -> Difference:
    return Difference((low + high) / 2, low, high, 0.5, 5, 1, 2, 0.0, 0.0, 0.0)


def claim(*criteria: Criterion) -> Claim:
    return Claim(
        paper=99, says="Ours is better.", measures="score", arms={"ours": {}, "theirs": {}}, settings={"here": {}},
        trial=lambda *_: {}, criteria=criteria, seeds=3, minutes=0, quick={},
    )  # fmt: skip


def runs(*scores: float) -> dict[int, Evaluation]:
    return {seed: Evaluation(["run"], {"return": np.array([score])}, "return") for seed, score in enumerate(scores)}


@pytest.mark.parametrize(
    ("criterion", "low", "high", "verdict"),
    [
        (Above("a", "b", 0.2), 0.21, 0.9, "holds"),
        (Above("a", "b", 0.2), 0.19, 0.9, "cannot be told"),
        (Above("a", "b", 0.2), 0.01, 0.2, "does not hold"),
        (NotBelow("a", "b", 0.05), -0.04, 0.0, "holds"),
        (NotBelow("a", "b", 0.05), -0.06, 0.5, "cannot be told"),
        (NotBelow("a", "b", 0.05), -0.5, -0.06, "does not hold"),
        (Alike("a", "b", 0.05), -0.04, 0.04, "holds"),
        (Alike("a", "b", 0.05), -0.04, 0.06, "cannot be told"),
        (Alike("a", "b", 0.05), -0.06, 0.04, "cannot be told"),
        (Alike("a", "b", 0.05), 0.06, 0.5, "does not hold"),
        (Alike("a", "b", 0.05), -0.5, -0.06, "does not hold"),
    ],
)
def test_the_whole_interval_decides(criterion, low, high, verdict):
    assert criterion.judged(difference(low, high)) == verdict


def test_a_criterion_may_speak_of_another_metric_of_which_less_is_better():
    found = {
        label: {s: Evaluation(["run"], {"return": np.zeros(1), "nodes/7": np.array([n])}, "return")
                for s, n in enumerate(nodes)}
        for label, nodes in {"ours": (10.0, 11.0, 12.0), "theirs": (100.0, 120.0, 140.0)}.items()
    }  # fmt: skip
    judged = judge_claim(claim(Above("ours", "theirs", metric="nodes/7")), {"here": found})
    (criterion,) = judged["criteria"]
    assert criterion["difference"]["value"] == pytest.approx(109) and judged["verdict"] == "holds"
    assert criterion["says"] == "nodes/7: ours is above theirs"


def test_runs_of_one_number_are_paired_by_their_seeds_and_the_interval_is_for_all_criteria():
    ours, theirs = np.array([3.0, 5.0, 4.0, 7.0]), np.array([1.0, 2.5, 2.0, 4.0])
    judged = judge_claim(
        claim(Above("ours", "theirs"), NotBelow("theirs", "ours", 10)),
        {"here": {"ours": runs(*ours), "theirs": runs(*theirs)}},
    )
    first = judged["criteria"][0]
    gap = ours - theirs
    half = stats.t.ppf(1 - 0.05 / 2 / 2, 3) * gap.std(ddof=1) / 2
    assert first["difference"] == pytest.approx(
        {"value": gap.mean(), "low": gap.mean() - half, "high": gap.mean() + half}, abs=2e-4
    )
    assert judged["verdict"] == "holds" and judged["sentences"][0] == "The claim holds."
    assert judged["sentences"][1].startswith("here: ours is above theirs: as claimed, the difference is 2.375 [")
    score = judged["rows"][0]["score"]
    half = stats.t.ppf(0.975, 3) * ours.std(ddof=1) / 2
    assert (score["low"], score["high"]) == pytest.approx((ours.mean() - half, ours.mean() + half), abs=2e-4)
    assert judged["rows"][0]["seeds"] == {"0": 3.0, "1": 5.0, "2": 4.0, "3": 7.0}


def test_one_failed_criterion_fails_the_claim_and_one_open_leaves_it_open():
    found = {"here": {"ours": runs(1, 2, 3, 2), "theirs": runs(1.1, 1.8, 3.1, 2.2)}}
    near, far = Alike("ours", "theirs", 1.0), Above("ours", "theirs", 5.0)
    open_ = Above("ours", "theirs")
    assert judge_claim(claim(near), found)["verdict"] == "holds"
    unsure = judge_claim(claim(near, open_), found)
    assert unsure["verdict"] == "cannot be told" and unsure["criteria"][1]["seeds_needed"] > 4
    assert f"about {unsure['criteria'][1]['seeds_needed']:,} seeds would tell" in unsure["sentences"][2]
    assert judge_claim(claim(near, open_, far), found)["verdict"] == "does not hold"


def test_held_out_items_are_shared_and_seeds_are_not_items():
    rng = np.random.default_rng(0)
    items = [f"item {i}" for i in range(50)]
    difficulty = rng.normal(size=50)

    def arm(level: float) -> dict[int, Evaluation]:
        return {
            seed: Evaluation(items, {"reward": difficulty + level + 0.1 * rng.normal(size=50)}, "reward")
            for seed in range(3)
        }

    judged = judge_claim(claim(Above("ours", "theirs", 0.2)), {"here": {"ours": arm(0.5), "theirs": arm(0.0)}})
    gap = judged["criteria"][0]["difference"]
    assert judged["verdict"] == "holds" and gap["high"] - gap["low"] < 0.2  # the spread of the difficulty cancels
    assert len(judged["rows"][0]["seeds"]) == 3


def test_less_is_better_where_the_metric_says_so():
    found = {
        "here": {
            arm: {s: Evaluation(["run"], {"nll": np.array([level + 0.01 * s])}, "nll") for s in range(4)}
            for arm, level in (("ours", 1.0), ("theirs", 2.0))
        }
    }
    assert judge_claim(claim(Above("ours", "theirs", 0.5)), found)["verdict"] == "holds"


@pytest.mark.parametrize("paper", all_claims())
def test_every_claim_is_well_formed(paper):
    each = get_claim(f"{paper:02d}")
    assert each.paper == paper and each.criteria and each.seeds >= 3 and each.quick_seeds >= 2
    for criterion in each.criteria:
        assert {criterion.arm, criterion.rival} <= set(each.arms) and each.place(criterion) in each.settings
    labels = [*each.arms, *each.settings]
    assert all(label.replace("-", "").isalnum() and label == label.lower() for label in labels)
    assert each.says.endswith(".")


@pytest.mark.parametrize("paper", [paper for paper in all_claims() if stored_result(paper)])
def test_stored_results_follow_from_their_seeds(paper):
    stored, each = stored_result(paper), get_claim(paper)
    assert stored["arms"] == {k: dict(v) for k, v in each.arms.items()}
    assert stored["settings"] == each.version(quick=False)
    assert not stored["quick"] and stored["seeds"] >= each.seeds
    assert {"guerdon", "cpu", "created"} <= set(stored["environment"])
    found = {where: {} for where in each.settings}
    for row in stored["rows"]:
        metric = row["metric"]
        assert np.mean(list(row["seeds"].values())) == pytest.approx(row["score"]["value"])
        found[row["where"]][row["arm"]] = {
            int(seed): Evaluation(["run"], {metric: np.array([score])}, metric) for seed, score in row["seeds"].items()
        }
    if any(row.get("items", 1) > 1 for row in stored["rows"]) or any(criterion.metric for criterion in each.criteria):
        return  # the intervals are over items, too, or of numbers that are not kept
    again = judge_claim(each, found)
    assert (again["verdict"], again["criteria"]) == (stored["verdict"], stored["criteria"])


def test_an_unknown_paper_is_told_which_there_are():
    with pytest.raises(ConfigError, match=r"no claim of a paper '999': there are 01, "):
        get_claim(999)
    with pytest.raises(ConfigError, match="no claim of a paper 'riql'"):
        get_claim("riql")
