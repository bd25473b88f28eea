"""Claim 11: its two worlds, its scores, and that its small tables learn what it says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from guerdon.claims import get_claim
from guerdon.claims.paper_11 import Ciphers, Table, Walks, auroc, logps, token_scores, trial, walkers
from guerdon.language.groups import Group
from guerdon.methods.preferences.token_q import beam_search

CLAIM = get_claim(11)
SMALL = {"pairs": 500, "beta": 0.5, "lr": 0.05, "updates": 30}


def test_the_area_under_the_curve_counts_pairs_in_their_order():
    assert auroc(np.array([3.0, 1.0, 2.0, 2.0]), np.array([True, False, True, False])) == pytest.approx(3.5 / 4)
    assert auroc(np.arange(5.0), np.arange(5) == 0) == 0.0


def test_ciphers_answer_by_the_first_letter_and_pairs_differ_in_one_letter_or_two():
    world = Ciphers(3, {"demonstrations": 400, "pairs": 50})
    assert len({tuple(key) for key in world.keys}) == 3 and all(sorted(key) == list(range(10)) for key in world.keys)

    def answer(prompt: str) -> str:
        key = world.keys["abcdefghij".index(prompt[0])]
        return "".join("abcdefghij"[key["abcdefghij".index(letter)]] for letter in prompt.rstrip("="))

    def differences(a: str, b: str) -> int:
        return sum(x != y for x, y in zip(a, b, strict=True))

    pairs = list(world.pairs())
    assert all(pair["chosen"][:6] == answer(pair["prompt"]) and len(pair["chosen"]) == 9 for pair in pairs)
    assert all(pair["chosen"][6:] == pair["rejected"][6:] for pair in pairs)
    assert {differences(pair["chosen"], pair["rejected"]) for pair in pairs} == {1, 2}
    noise = [differences(row["completion"][:6], answer(row["prompt"])) for row in world.demonstrations()]
    assert np.mean(noise) / 6 == pytest.approx(0.2, abs=0.03)
    records, changed = world.held_out()
    found = [[x != y for x, y in zip(r.completions[0], answer(r.prompt), strict=False)] for r in records]
    assert changed[:, :6].tolist() == found and not changed[:, 6:].any()
    assert not {pair["prompt"] for pair in pairs} & {record.prompt for record in records}


def test_scores_of_letters_leave_out_the_end_and_rise_with_suspicion():
    group = Group.of([1, 2], [[3, 4, 5, 0]])
    own, reference = np.array([-0.1, -5.0, -0.2, -0.3]), np.array([-0.2, -1.0, -0.2, -0.4])
    group.segments[1].values = {"logps": own, "ref_logps": reference}
    np.testing.assert_allclose(token_scores("implicit", group, 0), (reference - own)[:3], atol=1e-12)
    np.testing.assert_allclose(token_scores("ref_logps", group, 0), -reference[:3])
    np.testing.assert_allclose(token_scores("logps", group, 0), -own[:3])
    assert token_scores("random", group, 0).tolist() == token_scores("random", group, 0).tolist()


def test_walks_earn_their_steps_and_the_better_one_usually_wins():
    world = Walks(0)
    steps = world.steps
    assert world.reward(np.array([[1, 2, 2, 5]])) == pytest.approx(steps[1, 2] + steps[2, 2] + steps[2, 5])
    world.length = 2
    every = np.array([[4, a, b] for a in range(12) for b in range(12)])
    assert world.best[4] == pytest.approx(world.reward(every).max())
    world.length = 8
    chosen, rejected = world.pairs("here", 4000)
    assert (chosen[:, 0] == rejected[:, 0]).all() and chosen.shape == (4000, 9)
    gap = world.reward(chosen) - world.reward(rejected)
    assert np.mean(gap > 0) == pytest.approx(np.mean(1 / (1 + np.exp(-np.abs(gap)))), abs=0.03)


def test_a_table_gives_its_answers_their_log_probs_and_is_searched():
    logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = torch.tensor([[1, *answer] for answer in itertools.product(range(3), repeat=2)])
    found = logps(logits, every)
    assert float(found.exp().sum()) == pytest.approx(1)
    [[best]] = beam_search(Table(logits), [[1]], beams=9, max_new_tokens=2)
    assert best.tokens == tuple(every[found.argmax(), 1:].tolist())
    assert best.logp == pytest.approx(float(found.max()))


def test_dpo_on_a_table_lowers_what_was_supervised_and_raises_the_margin():
    policies = walkers(0, **SMALL)
    held_out = {}
    for label, measure in [("dpo-after-sft", "reward/chosen"), ("start", "reward/chosen")]:
        (found,) = trial(CLAIM.arms[label], [0], {"measure": measure, **SMALL}, None).values()
        held_out[label] = found.means()
    assert held_out["start"] == {"reward/chosen": 0.0, "reward/rejected": 0.0, "preference/margin": 0.0}
    assert held_out["dpo-after-sft"]["reward/chosen"] < 0 < held_out["dpo-after-sft"]["preference/margin"]
    # On what it was supervised with, the start is the likeliest of all tables, so that any other one falls (E log
    # pi/pi_ref = -KL); here up to what is left of the fit.
    chosen = torch.from_numpy(Walks(0).pairs("pairs", SMALL["pairs"])[0])
    assert float((logps(policies["dpo"], chosen) - logps(policies["sft"], chosen)).mean()) < 0


def test_search_is_measured_by_the_hidden_reward():
    settings = {"measure": "normalized", **SMALL}
    found = {arm: trial(CLAIM.arms[arm], [1], settings, None)[1].means() for arm in ("beam-1", "sampling")}
    assert 1 > found["beam-1"]["normalized"] > found["sampling"]["normalized"] > 0
    assert 0.5 < found["sampling"]["win-rate"] <= found["beam-1"]["win-rate"] <= 1


@pytest.mark.slow
def test_credit_comes_from_trained_policies_that_arms_share(tmp_path):
    settings = {**CLAIM.settings["credit"], "demonstrations": 60, "pairs": 40, "sft_epochs": 1}
    scores = {}
    for arm in ("implicit-reward", "sft-likelihood", "random"):
        assert "credit" in CLAIM.arms[arm]["where"]
        (found,) = trial(CLAIM.arms[arm], [0], settings, tmp_path / "11/credit" / arm / "seeds-0-0").values()
        scores[arm] = found.means()["auroc"]
    assert len(list((tmp_path / "11/shared").iterdir())) == 1
    assert len(set(scores.values())) == 3 and all(0.3 < score < 0.7 for score in scores.values())
