"""Rewards as weighted sums, and the score of reinforcement learning with verifiable rewards."""

from __future__ import annotations

import re

import numpy as np
import pytest

from guerdon.errors import ConfigError, GuerdonError
from guerdon.feedback.records import Record
from guerdon.rewards.compose import Rewards
from guerdon.rewards.rlvr import rlvr_score
from guerdon.rewards.verifiers import Verdict, Verifier

RECORD = Record("p", [], columns={"answer": 7}, where="f.jsonl:1")


def test_the_reward_is_the_weighted_sum_and_components_are_kept() -> None:
    rewards = Rewards.of({"number": 2.0, r"format:\d": 0.25, "exact": 0.0})
    scores = rewards(RECORD, ["7", "it is 7", "8"])
    assert {name: values.tolist() for name, values in scores.items()} == {
        "reward": [2.25, 2.0, 0.25],
        "number": [1, 1, 0],
        "format": [1, 0, 1],
        "exact": [1, 0, 0],
    }
    assert all(values.dtype == np.float32 for values in scores.values())


def test_one_verifier_is_binary_and_sums_are_not() -> None:
    assert Rewards.of("number").binary
    assert not Rewards.of({"number": 10.0}).binary
    assert not Rewards.of({"number": 1.0, "exact": 1.0}).binary


def test_two_of_a_kind_go_by_their_whole_specs() -> None:
    scores = Rewards.of({"format:7": 1.0, "format:8": 1.0})(RECORD, ["7"])
    assert {name: values.item() for name, values in scores.items()} == {"reward": 1, "format:7": 1, "format:8": 0}


def test_the_verifier_of_a_task_is_weighed_by_its_name() -> None:
    own = Verifier("own", "correct", lambda record, texts: Verdict(np.ones(len(texts), np.float32)))
    assert Rewards.of({"correct": 3.0, "exact": 1.0}, own)(RECORD, ["8"])["reward"].tolist() == [3]


def test_parts_with_the_name_of_another_component_are_refused() -> None:
    parts = {"exact": np.zeros(1, np.float32)}
    twin = Verifier("own", "own", lambda record, texts: Verdict(np.ones(1, np.float32), parts))
    with pytest.raises(GuerdonError, match="two components of the reward are called 'exact'"):
        Rewards.of({"exact": 1.0, "own": 1.0}, twin)(RECORD, ["8"])


def test_nothing_to_judge_with_or_to_judge() -> None:
    with pytest.raises(ConfigError, match="a reward needs at least one verifier"):
        Rewards.of({})
    assert Rewards.of("exact")(RECORD, [])["reward"].shape == (0,)


def test_a_record_that_lacks_a_column_is_found_before_anything_is_sampled() -> None:
    with pytest.raises(GuerdonError, match=re.escape("f.jsonl:2: the verifier 'exact' needs a column 'answer'")):
        Rewards.of({"format:.": 1.0, "exact": 1.0}).check(Record("p", [], where="f.jsonl:2"))


def test_rlvr_score_is_ten_nought_or_minus_ten() -> None:
    score = rlvr_score(np.array([1, 0, 1, 0]), np.array([True, True, False, False]))
    assert score.tolist() == [10, 0, -10, -10] and score.dtype == np.float32
    assert rlvr_score(np.array([1, 1]), np.array([1, 0]), bonus=1, penalty=0).tolist() == [1, 0]
