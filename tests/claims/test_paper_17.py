"""Claim 17: its sums, its judge, and that its arms learn from what they should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from guerdon.chains import read_chain
from guerdon.claims import get_claim
from guerdon.claims.paper_17 import CHAIN, judge, rated, recipe, trial, worked, write_data
from guerdon.training.rundir import RunDir

ROOT = Path(__file__).parents[2]


def test_sums_are_worked_digit_by_digit():
    assert worked(47, 85, 132) == "7+5=12 4+8+1=13 132"
    assert worked(10, 12, 23) == "0+2=02 1+1+0=02 23"


def test_some_demonstrations_are_wrong_or_endless_and_no_prompt_is_demonstrated(tmp_path):
    write_data(tmp_path)
    read = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("demonstrations", "clean", "prompts")
    }
    assert [len(rows) for rows in read.values()] == [5000, 5000, 3100]
    assert not {row["prompt"] for row in read["demonstrations"]} & {row["prompt"] for row in read["prompts"]}
    for rows, right, endless in ((read["demonstrations"], 0.75, 0.15), (read["clean"], 1.0, 0.0)):
        sums = [tuple(map(int, row["prompt"].rstrip("=").split("+"))) for row in rows]
        results = [int(row["completion"].split()[2]) for row in rows]
        assert np.mean([a + b == c for (a, b), c in zip(sums, results, strict=True)]) == pytest.approx(right, abs=0.02)
        assert np.mean([len(row["completion"]) > 40 for row in rows]) == pytest.approx(endless, abs=0.02)


def test_the_judge_is_right_four_times_in_five_and_does_not_change_its_mind():
    said = [judge(f"{a}+{b}=", f"it is {a + b}", str(a + b)) for a in range(50) for b in range(50)]
    assert np.mean(said) == pytest.approx(0.8, abs=0.03)
    assert said[:50] == [judge(f"0+{b}=", f"it is {b}", str(b)) for b in range(50)]
    wrong = [judge(f"{a}+{b}=", f"it is {a + b + 1}", str(a + b)) for a in range(50) for b in range(50)]
    assert np.mean(wrong) == pytest.approx(0.2, abs=0.03)


def test_ratings_rise_with_the_length_where_the_judge_likes_it(tmp_path):
    rows = [{"prompt": "1+1=", "completions": ["2", "2222"], "scores": [1.0, 0.0], "answer": "2"}]
    (tmp_path / "samples.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert json.loads(rated(tmp_path / "samples.jsonl", 0.0))["scores"] == [1.0, 0.0]
    assert json.loads(rated(tmp_path / "samples.jsonl", 0.5))["scores"] == [1.5, 2.0]


def test_the_recipe_that_comes_with_guerdon_is_the_chain_of_the_claim():
    assert read_chain(ROOT / "recipes/tulu3-laptop.yaml") == recipe(**CHAIN)
    assert {each["chain"]["rounds"] for each in get_claim(17).settings.values()} == {CHAIN["rounds"]}


@pytest.mark.slow
def test_arms_start_from_the_stages_of_one_chain(tmp_path):
    chain = {"prompts": 12, "rounds": 1, "max_updates": 2}
    settings = {"measure": "pass@1", "long": 0.0, "chain": chain}
    claim = get_claim(17)
    for label in ("sft", "verifier-and-reward-model", "dpo-sum"):
        directory = tmp_path / "17/accuracy" / label / "seeds-0-0"
        (found,) = trial(claim.arms[label], [0], settings, directory).values()
        assert found.primary == "pass@1" and len(found.items) == 310
        if label == "sft":
            assert found.means()["kl"] == pytest.approx(0, abs=1e-5)
    (place,) = (tmp_path / "17/shared").iterdir()
    rl = RunDir(tmp_path / "17/accuracy/verifier-and-reward-model/seeds-0-0/seed-0").config
    assert rl["training"]["model"] == str(place / "chain/6-dpo/policy")
    assert rl["options"]["reward_model"] == rl["options"]["value_model"] == str(place / "chain/5-reward-model/policy")
    dpo = RunDir(tmp_path / "17/accuracy/dpo-sum/seeds-0-0/seed-0").config
    assert dpo["training"]["model"] == str(place / "chain/2-sft/policy") and dpo["options"]["beta"] == 0.25
