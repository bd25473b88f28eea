"""The trial of claim 13 with a tiny model: tested on items that no search has seen, beside what search had promised."""

from __future__ import annotations

import pytest

from guerdon.claims.paper_13 import CLAIM, trial

TINY = {"model": "tiny:layers=1,width=16,heads=2,vocab=word", "verbalizers": ("negative=bad", "positive=good")}


def test_arms_are_tested_on_the_same_items_with_their_own_prompts(tmp_path):
    settings = CLAIM.version(quick=True)["negation"]
    settings["training"] = {**settings["training"], **TINY, "precision": "fp32", "max_samples": 20}
    found = {}
    for label, arm in CLAIM.arms.items():
        (tmp_path / label).mkdir()
        found[label] = trial(arm, [0, 1], settings, tmp_path / label)
    items = found["full-prompt"][0].items
    assert len(items) == 20
    for label, seeds in found.items():
        for evaluation in seeds.values():
            assert (evaluation.items, evaluation.primary) == (items, "accuracy")
            means = evaluation.means()
            assert {"accuracy", "reward", "search", "validation", "tokens"} == set(means)
            assert 0 <= means["search"] <= 1 and means["tokens"] == int(means["tokens"])
        assert seeds[0].means()["tokens"] != 0
        assert (seeds[0].metrics["reward"] != seeds[1].metrics["reward"]).any(), label  # other demonstrations
    full, best = (found[label][0].means()["tokens"] for label in ("full-prompt", "promptquine"))
    assert best < full


def test_what_is_compared_has_the_same_budget():
    for settings in CLAIM.settings.values():
        assert settings["training"]["max_samples"] >= 100
    assert {each.where for each in CLAIM.criteria} == set(CLAIM.settings)
    assert CLAIM.arms["promptquine"]["options"] == pytest.approx({"population": 6, "reproductions": 10})
