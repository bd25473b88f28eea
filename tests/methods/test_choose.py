"""More computation for each answer: what is chosen, that the samples are those of the policy, and that it helps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import guerdon
from guerdon.errors import ConfigError
from guerdon.language.forward import GroupModel
from guerdon.language.groups import Group
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Sampling
from guerdon.language.templates import prompt_ids, stop_ids
from guerdon.methods.planning.candidates import best_of_n, final_answer, vote, vote_weights
from guerdon.methods.planning.choose import choose, reward_scorer
from guerdon.methods.planning.line_search import line_search

PROMPTS = ["one", "two?", "and three"]
TINY = "tiny:layers=1,width=16,heads=2"


@pytest.fixture(scope="module")
def policy(tiny) -> Policy:
    model, tokenizer = tiny
    return Policy(GroupModel(model), tokenizer)


def test_best_of_n_is_the_first_of_the_highest():
    assert best_of_n([0.1, 3.0, -2.0, 3.0]) == 1


@pytest.mark.parametrize(
    ("answers", "weights", "winner"),
    [
        (["4", "5", "4"], None, 0),
        (["4", "5", "4"], [0.2, 0.7, 0.2], 1),
        (["4", "5", "4"], [0.3, 0.5, 0.4], 2),  # of the winners the heaviest
        ([None, None, "5"], None, 2),  # who says nothing has no vote
        ([None, None], [0.1, 0.9], 1),
        (["5", "4"], None, 0),
    ],
)
def test_votes(answers, weights, winner):
    assert vote(answers, weights) == winner


def test_weights_of_a_vote_know_no_constant():
    scores = np.array([1.0, -2.0, 700.0])
    np.testing.assert_allclose(vote_weights(scores), vote_weights(scores - 1000))
    np.testing.assert_allclose(vote_weights([0.0, np.log(3)]), [0.25, 0.75])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 and 2 is <answer> 4 </answer> or 5", "4"),
        (r"so \boxed{7} it is, step 3", "7"),
        ("I count 1,200 sheep.", "1200"),
        ("Well.\nThe capital is  Paris.\n", "the capital is paris"),
        (" \n", None),
        ("...", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


def test_answers_are_chosen_among_the_samples_of_the_policy(policy):
    sampling = Sampling(max_new_tokens=6)
    drawn = policy.answer(PROMPTS, 2 * 5, sampling)

    def scorer(prompts, answers):
        return [np.array([float(sum(map(ord, text)) % 97) for text in each]) for each in answers]

    best = choose(policy, PROMPTS, 2, sampling, how="best-of-n", candidates=5, scorer=scorer)
    voted = choose(policy, PROMPTS, 2, sampling, how="vote", candidates=5, answer=lambda text: text[:1] or None)
    weighted = choose(
        policy, PROMPTS, 2, sampling, how="vote", candidates=5, scorer=scorer, answer=lambda text: text[:1] or None
    )
    for p, samples in enumerate(drawn):
        for i in range(2):
            part = [c.text for c in samples[5 * i : 5 * i + 5]]
            (scores,) = scorer(None, [part])
            assert best[p][i].text == part[int(scores.argmax())]
            shares = {text[:1]: sum(other[:1] == text[:1] for other in part) for text in part}
            shares.pop("", None)
            assert not shares or shares[voted[p][i].text[:1]] == max(shares.values())
            masses = {text[:1]: sum(w for o, w in zip(part, vote_weights(scores), strict=True) if o[:1] == text[:1])
                      for text in part if text}  # fmt: skip
            assert not masses or weighted[p][i].text[:1] == max(masses, key=lambda first: masses[first])
    with pytest.raises(ConfigError, match="best-of-n chooses by score"):
        choose(policy, PROMPTS, 1, sampling, how="best-of-n", candidates=5)


def test_lines_are_those_of_one_answer_with_its_log_probs(policy):
    """Many short lines: every token was drawn from the policy where it stands, and nothing is longer than allowed."""
    sampling = Sampling(max_new_tokens=24)
    ids = [prompt_ids(prompt, policy.tokenizer) for prompt in PROMPTS]
    ends = stop_ids(policy.tokenizer, policy.model.model)
    asked = []

    def judge(p, partial):
        asked.append((p, [c.text for c in partial]))
        return np.array([len(c.text.splitlines()) - len(c.text) / 100 for c in partial])  # many lines, and short ones

    found = line_search(
        policy.sampler, policy.tokenizer, ids, [(p,) for p in range(3)], sampling, ends=ends, width=3, branches=4,
        judge=judge,
    )  # fmt: skip
    groups = [Group.of(p, [c.tokens]) for p, c in zip(ids, found, strict=True)]
    policy.annotate(groups, "logps")
    for group, completion in zip(groups, found, strict=True):
        assert 0 < len(completion.tokens) <= 24 and completion.finished == (completion.tokens[-1] in ends)
        np.testing.assert_allclose(group.segments[1].values["logps"], completion.logps, atol=1e-4)
    rounds = [texts for p, texts in asked if p == 0]
    assert len(rounds[0]) == 12 and all(len(texts) <= 12 for texts in rounds[1:])
    best = [max(len(text.splitlines()) - len(text) / 100 for text in texts) for texts in rounds]
    final = len(found[0].text.splitlines()) - len(found[0].text) / 100
    assert final == pytest.approx(best[-1]) and len(rounds) > 1


def test_search_over_one_token_is_the_likeliest_of_its_samples(policy):
    sampling = Sampling(max_new_tokens=1)
    found = choose(policy, PROMPTS, 2, sampling, how="lines", candidates=9)
    again = choose(policy, PROMPTS, 2, sampling, how="lines", candidates=9)
    assert [[c.tokens for c in each] for each in found] == [[c.tokens for c in each] for each in again]
    wide = choose(policy, PROMPTS, 1, sampling, how="lines", candidates=900)
    greedy = policy.answer(PROMPTS, 1, Sampling(max_new_tokens=1, temperature=0))
    assert [each[0].tokens for each in wide] == [each[0].tokens for each in greedy]


@pytest.fixture
def judged(tmp_path: Path, monkeypatch) -> Path:
    """Prompts, a verifier that counts vowels, and a reward model that has learned to like them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    words = lambda letters: "".join(rng.choice(list(letters), 6))  # noqa: E731
    rows = [{"prompt": f"{i} is", "chosen": words("aeiou"), "rejected": words("bcdfg")} for i in range(40)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    Path("vowels.py").write_text(
        "def share(prompt, completion):\n    return sum(c in 'aeiou' for c in completion) / max(len(completion), 1)\n"
    )
    guerdon.train(
        "reward-model", model=TINY, data="pairs.jsonl", lr=3e-2, batch_size=16, epochs=4, holdout=0.0, out="judge"
    )
    return tmp_path


def test_evaluating_with_a_search_for_each_answer(judged):
    how = {"task": "prompts.jsonl", "verifier": "python:vowels.share", "eval_items": 4, "eval_samples": 2}
    how |= {"eval_max_new_tokens": 6}
    plain = guerdon.evaluate(TINY, **how)[0]
    best = guerdon.evaluate(TINY, **how, eval_choose="best-of-n", eval_candidates=24, eval_scorer="judge")[0]
    lines = guerdon.evaluate(TINY, **how, eval_choose="lines", eval_candidates=16, eval_scorer="judge")[0]
    assert best.means()["reward"] > plain.means()["reward"] + 0.1
    assert lines.means()["reward"] > plain.means()["reward"] + 0.1
    assert "kl" in plain.metrics and "kl" not in best.metrics and best.settings["eval_choose"] == "best-of-n"
    one = guerdon.evaluate(TINY, **how, eval_choose="vote", eval_candidates=1)[0]
    np.testing.assert_array_equal(one.metrics["reward"], plain.metrics["reward"])  # a vote of one is a sample
    for options, message in (
        ({"eval_choose": "best-of-n"}, "give the run of a reward model as eval_scorer"),
        ({"eval_scorer": "judge"}, "there are none: set eval_choose"),
        ({"eval_choose": "vote", "eval_beams": 2}, "leave data, eval_beams"),
        ({"eval_choose": "vote", "eval_candidates": 0}, "eval_candidates is 0"),
        ({"eval_choose": "vote", "eval_scorer": TINY}, "is no reward model"),
    ):
        with pytest.raises(ConfigError, match=message):
            guerdon.evaluate(TINY, **how, **options)


def test_a_judge_rates_what_is_said_with_its_own_tokenizer(judged):
    scorer = reward_scorer(Policy.load("judge"))
    first, second = scorer(["7 is", "8 is"], [["aeiou", "bcdfg"], ["ouaea", "gfdcb", "aaaaa"]])
    assert len(first) == 2 and len(second) == 3
    assert first[0] > first[1] and second[0] > second[1]
