from __future__ import annotations

import json

import numpy as np
import pytest

from guerdon.errors import ConfigError, DataError
from guerdon.evaluation.metrics import (
    Evaluation,
    aligned,
    completion_metrics,
    kind_of,
    kl_to_start,
    nll,
    preference_metrics,
)


def test_completions():
    rewards = {"reward": np.array([[1.0, 0, 0, 0], [1, 1, 1, 1]]), "format": np.array([[0.5, 0.5, 0, 0], [1, 1, 1, 1]])}
    lengths = np.array([[1, 2, 3, 4], [8, 8, 8, 8]])
    finished = np.array([[True, True, True, False], [True] * 4])
    found = completion_metrics(rewards, lengths, finished, ks=(1, 2), binary=True)
    assert list(found) == ["pass@1", "pass@2", "reward", "reward/format", "length", "truncated"]
    np.testing.assert_allclose(found["pass@1"], [0.25, 1])
    np.testing.assert_allclose(found["pass@2"], [0.5, 1])
    np.testing.assert_allclose(found["reward/format"], [0.25, 1])
    np.testing.assert_allclose(found["length"], [2.5, 8])
    np.testing.assert_allclose(found["truncated"], [0.25, 0])
    assert "pass@1" not in completion_metrics(rewards, lengths, finished, binary=False)
    with pytest.raises(ConfigError, match="pass@8"):
        completion_metrics(rewards, lengths, finished, ks=(8,), binary=True)


def test_preferences():
    found = preference_metrics(
        np.array([-1.0, -5, -2]), np.array([-3.0, -4, -2]), np.array([-2.0, -4, -2]), np.array([-2.0, -4, -2]), beta=0.1
    )
    np.testing.assert_allclose(found["preference/margin"], [0.2, -0.1, 0])
    np.testing.assert_allclose(found["preference/accuracy"], [1, 0, 0.5])


def test_nll_is_per_token_and_says_nothing_of_empty_items():
    found = nll(np.array([-6.0, 0.0]), np.array([3, 0]))["nll"]
    assert found[0] == 2 and np.isnan(found[1])


def test_kl_is_unbiased_and_never_negative():
    rng = np.random.default_rng(0)
    policy, start = np.log([0.7, 0.2, 0.1]), np.log([0.2, 0.3, 0.5])
    exact = float((np.exp(policy) * (policy - start)).sum())
    tokens = rng.choice(3, size=(2000, 4, 5), p=np.exp(policy))  # items, completions, tokens
    found = kl_to_start(list(policy[tokens]), list(start[tokens]))["kl"]
    assert found.shape == (2000,) and found.min() >= 0
    assert found.mean() == pytest.approx(5 * exact, rel=0.03)


def test_evaluations_come_back_from_disk(tmp_path):
    before = Evaluation(["a", "b"], {"nll": np.array([1.5, np.nan])}, "nll", {"step": 3})
    before.save(tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == {"nll": [1.5, None]}
    after = Evaluation.load(tmp_path / "evaluation.json")
    assert after.items == before.items and after.settings == {"step": 3} and after.means() == {"nll": 1.5}
    np.testing.assert_array_equal(after.metrics["nll"], before.metrics["nll"])


@pytest.mark.parametrize(
    "content", ["", "[]", '{"items": ["a"]}', '{"items":["a"],"metrics":{"x":[1,2]},"primary":"x"}']
)
def test_files_that_are_no_evaluation(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(DataError):
        Evaluation.load(tmp_path / "evaluation.json")


def test_scores_are_aligned_by_item():
    a = Evaluation(["x", "y", "z"], {"nll": np.array([1.0, 2, np.nan])}, "nll")
    b = Evaluation(["z", "x", "y"], {"nll": np.array([30.0, 10, 20])}, "nll")
    scores, items = aligned([a, b], "nll")
    assert items == ["x", "y"]
    np.testing.assert_allclose(scores, [[1, 2], [10, 20]])
    with pytest.raises(DataError, match="different held-out items"):
        aligned([a, Evaluation(["x", "y", "w"], {"nll": np.zeros(3)}, "nll")], "nll")
    with pytest.raises(DataError, match="unique item keys"):
        Evaluation(["x", "x"], {"nll": np.zeros(2)}, "nll")


def test_kinds():
    assert kind_of("pass@8").better == 1 and kind_of("pass@8").span == (0, 1)
    assert kind_of("nll").better == -1 and kind_of("kl").better == 0
    assert kind_of("reward/format").better == 1 and kind_of("anything").label == "anything"
