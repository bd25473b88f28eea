"""A DPO run read as a Q-function from the verbs: credit of tokens, beam search, realignment of another model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import guerdon
from guerdon.cli import main
from guerdon.errors import ConfigError
from guerdon.language.models import load_model
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Sampling
from guerdon.language.templates import prompt_ids, render, stop_ids
from guerdon.methods.preferences.token_q import CausalDecoder, Shift, beam_search, decode, implicit_token_rewards

MODEL = "tiny:layers=1,width=32,heads=4"
PROMPTS = ["1+2=", "3+3=", "2+5="]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with pairs, a task and a DPO run on the pairs."""
    place = tmp_path_factory.mktemp("token_q")
    sums = [(a, b) for a in range(5) for b in range(5)]
    rows = [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b}{a}"} for a, b in sums]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"prompt": f"{a}+{b} =", "answer": f"{a + b}"} for a, b in sums]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    options = {"lr": 1e-2, "batch_size": 8, "max_length": 32, "beta": 0.2, "holdout": 0.0}
    guerdon.train("dpo", model=MODEL, data=str(place / "pairs.jsonl"), out=str(place / "dpo"), **options)
    return place


def test_credit_is_the_implicit_reward_of_each_token(place, capsys):
    view = guerdon.look(str(place / "pairs.jsonl"), model=str(place / "dpo"), credit=True, records=2)
    policy, (start, tokenizer) = Policy.load(place / "dpo"), load_model(MODEL)
    for i, shown in enumerate(view["records"]):
        record = guerdon.read_feedback(str(place / "pairs.jsonl")).records[i]
        group = render(record, tokenizer, max_length=32)
        for c, completion in enumerate(shown["completions"]):
            ids = torch.from_numpy(group.sequence(c)[0])[None]
            mask = torch.from_numpy(group.sequence(c)[1])[None]
            with policy.model.plain() as trained:
                expected = implicit_token_rewards(trained, start.eval(), ids, mask, beta=0.2)[0]
            found = [run["credit"] for run in completion["runs"]]
            np.testing.assert_allclose(found, expected[-len(found) :], atol=1e-5)
            assert completion["credit"] == pytest.approx(float(expected.sum()), abs=1e-4)
    assert view["records"][0]["completions"][0]["credit"] > view["records"][0]["completions"][1]["credit"]
    assert main(["look", str(place / "pairs.jsonl"), "--model", str(place / "dpo"), "--credit"]) == 0
    assert f"credit {view['records'][0]['completions'][0]['credit']:.3g}" in capsys.readouterr().out


def test_a_policy_searches_with_its_likelihood_and_packs_groups_afterwards():
    policy, (model, tokenizer) = Policy.load(MODEL), load_model(MODEL)
    found = decode(policy, PROMPTS, Sampling(max_new_tokens=5), beams=3)
    ids = [prompt_ids(prompt, tokenizer) for prompt in PROMPTS]
    expected = beam_search(CausalDecoder(model.eval()), ids, beams=3, max_new_tokens=5, stop=stop_ids(tokenizer, model))
    assert [[tuple(c.tokens) for c in cs] for cs in found] == [[h.tokens for h in hs] for hs in expected]
    assert all(len(c.text) <= 5 for (c,) in found)
    assert policy.answer(PROMPTS, 2, Sampling(max_new_tokens=5)) is not None


def test_samples_of_a_realigned_policy():
    policy, other, third = (Policy.load(MODEL, seed=seed) for seed in range(3))
    how = Sampling(max_new_tokens=4)
    plain = decode(policy, PROMPTS, how, n=3, seed=1)
    assert [len(each) for each in plain] == [3, 3, 3]
    same = decode(policy, PROMPTS, how, n=3, seed=1, shift=Shift(other, other))
    assert [[c.tokens for c in cs] for cs in same] == [[c.tokens for c in cs] for cs in plain]
    base = Policy.load(MODEL)
    # pi_base (pi_proxy / pi_ref) with the base for reference is the proxy.
    moved = decode(policy, PROMPTS, how, n=3, seed=1, shift=Shift(third, base))
    assert [[c.tokens for c in cs] for cs in moved] == [
        [c.tokens for c in cs] for cs in decode(third, PROMPTS, how, n=3, seed=1)
    ]


def test_evaluation_by_search_and_by_realignment(place):
    how = {"task": str(place / "prompts.jsonl"), "verifier": "exact", "eval_max_new_tokens": 4, "eval_items": 2}
    (searched,) = guerdon.evaluate(str(place / "dpo"), **how, eval_beams=3).values()
    assert set(searched.means()) == {"pass@1", "reward", "reward/exact", "length", "truncated"}
    assert searched.settings["eval_beams"] == 3
    (proxied,) = guerdon.evaluate(MODEL, **how, eval_beams=3, eval_proxy=str(place / "dpo")).values()
    assert proxied.metrics["length"].tolist() == searched.metrics["length"].tolist()  # its start is the base
    with pytest.raises(ConfigError, match="eval_proxy: nowhere holds no run"):
        guerdon.evaluate(MODEL, **how, eval_proxy="nowhere")


@pytest.mark.parametrize("model", [MODEL, "nowhere"])
def test_credit_needs_a_run(place, model):
    with pytest.raises(ConfigError, match=f"{model} holds no finished run"):
        guerdon.look(str(place / "pairs.jsonl"), model=model, credit=True)
