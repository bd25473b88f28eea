"""Generated tasks: sides that never meet, items that never change, and what counts as an answer."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from guerdon.errors import DataError
from guerdon.tasks import Task, load_task, reasoning
from guerdon.tasks.reasoning import answers

TINY_SUMS = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"


@pytest.fixture(scope="module")
def sums() -> Task:
    return load_task(TINY_SUMS)


def questions(records: list) -> list[str]:
    return [record.columns["question"] for record in records]


@pytest.mark.parametrize("name", ["chain_sum", "leg_counting", "basic_arithmetic", "letter_counting", "word_ladder"])
def test_train_and_test_are_disjoint_for_every_seed(name: str) -> None:
    tasks = [load_task(f"reasoning-gym:{name}", seed=seed, train_size=60, test_size=20) for seed in (0, 1)]
    held_out = questions(tasks[0].test)
    assert held_out == questions(tasks[1].test) and len(set(held_out)) == 20
    for task in tasks:
        assert len(set(questions(task.train))) == 60
        assert not set(questions(task.train)) & set(held_out)
    assert questions(tasks[0].train) != questions(tasks[1].train)
    assert tasks[0].digest != tasks[1].digest


def test_a_small_space_is_used_up_and_says_so(sums: Task) -> None:
    assert len(sums.train) + len(sums.test) == 200  # ten digits, twice, with plus or minus
    assert not set(questions(sums.train)) & set(questions(sums.test))
    assert 0.15 < len(sums.test) / 200 < 0.35
    assert [note.split(":")[0] for note in sums.notes] == [
        f"{len(sums.train)} training questions, not the 2000 asked for",
        f"{len(sums.test)} held-out questions, not the 200 asked for",
    ]
    other = load_task(TINY_SUMS, seed=5)
    assert set(questions(other.train)) == set(questions(sums.train)) and other.digest != sums.digest
    assert load_task(TINY_SUMS).digest == sums.digest


def test_what_counts_as_right_in_a_sum(sums: Task) -> None:
    record = next(r for r in sums.train if r.columns["answer"] == "-6")
    right = ["-6", " -6\n", "The answer is -6", "2 - 8 = -6.", "\\boxed{-6}", "<answer>-6</answer> or 7", "-6.0"]
    wrong = ["6", "2 - 8 = 6.", "", "no idea", "<answer>6</answer> -6", "-6 or 7"]
    scores = sums.score(record, right + wrong)
    assert scores["reward"].tolist() == [1] * len(right) + [0] * len(wrong)
    assert scores["correct"].tolist() == scores["reward"].tolist() and sums.binary
    assert all(score == 1 for score in scores["score"][: len(right)])
    assert all(score < 1 for score in scores["score"][len(right) :])


def test_partial_scores_are_a_component_and_not_the_reward() -> None:
    task = load_task("reasoning-gym:letter_counting", train_size=1, test_size=1)
    record = task.train[0]
    scores = task.score(record, [record.columns["answer"], f"{record.columns['answer']} letters, or 99"])
    assert scores["reward"].tolist() == [1, 0]
    assert scores["score"][0] == 1 and 0 < scores["score"][1] < 1


@pytest.mark.parametrize(
    ("extract", "completion", "reference", "expected"),
    [
        ("auto", "4 + 3 = 7.", "7", ["4 + 3 = 7.", "7"]),
        ("auto", "I think\nThe answer is: Yes.", "Yes", ["I think\nThe answer is: Yes.", "Yes"]),
        ("auto", "no number", "7", ["no number"]),
        ("auto", "<answer>6</answer> <answer> 7 </answer> 8", "7", ["7"]),
        ("auto", "a\nb", None, ["a\nb", "b"]),
        ("auto", " ", "7", [""]),
        ("whole", " 4 + 3 = 7 ", "7", ["4 + 3 = 7"]),
        ("tag", "7", "7", []),
        ("tag", "<answer>a\nb</answer>", "7", ["a\nb"]),
        ("last-number", "1,000 - 1", "999", ["1"]),
        ("last-number", "none", "7", []),
    ],
)
def test_answers(extract: reasoning.Extract, completion: str, reference: str | None, expected: list[str]) -> None:
    assert answers(completion, reference, extract) == expected


def test_prompts_as_the_spec_wants_them() -> None:
    spec = "reasoning-gym:chain_sum?prompt=Q: {question}%0AA:&train_size=3&test_size=2"
    chat = load_task(f"{spec}&system=Be brief.")
    assert (len(chat.train), len(chat.test), chat.notes) == (3, 2, [])
    record = chat.train[0]
    text = f"Q: {record.columns['question']}\nA:"
    assert record.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    assert load_task(f"{spec}&chat=false").train[0].prompt == text
    assert len(load_task(spec, train_size=5).train) == 5
    assert json.loads(json.dumps(record.columns)) == record.columns


def test_parameters_reach_the_generator() -> None:
    spec = 'reasoning-gym:simple_equations?operators=["%2B"]&operators_weights=[1]&max_terms=2&train_size=9&test_size=1'
    equations = [question.split("=")[0] for question in questions(load_task(spec).train)]
    assert all("+" in e and "*" not in e and " - " not in e for e in equations)


def test_a_verifier_by_name_takes_the_place_of_the_tasks_own_or_joins_it(sums: Task) -> None:
    task = load_task(f"{TINY_SUMS}&train_size=5&test_size=2", verifier={"correct": 1.0, "exact": 0.5})
    record = task.train[0]
    scores = task.score(record, [record.columns["answer"], f"It is {record.columns['answer']}"])
    assert scores["reward"].tolist() == [1.5, 1] and not task.binary
    assert set(scores) == {"reward", "correct", "score", "exact"}
    alone = load_task(f"{TINY_SUMS}&train_size=5&test_size=2", verifier="number")
    assert set(alone.score(record, ["1"])) == {"reward", "number"}


def test_items_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    """This generator draws from sets, whose order changes from process to process."""
    code = "from guerdon.tasks import load_task\n"
    code += "print(load_task('reasoning-gym:isomorphic_strings', train_size=10, test_size=5).digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": "src"},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_an_item_that_has_changed_since_is_refused(sums: Task) -> None:
    record = sums.train[0]
    record = type(record)(record.prompt, [], columns=record.columns | {"question": "1 + 1 ="}, where=record.where)
    with pytest.raises(DataError, match=r"chain_sum: item \d+ of seed \d+ is another question in this version"):
        sums.score(record, ["2"])


def test_an_answer_that_blows_up_its_scorer_is_wrong_and_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = reasoning.Isolated("guerdon.tasks.reasoning.generators", seconds=1.0)
    monkeypatch.setattr(reasoning, "_child", lambda: child)
    task = load_task("reasoning-gym:countdown?train_size=1&test_size=1")
    with caplog.at_level(logging.WARNING):
        scores = task.score(task.train[0], ["9**9**9**9", "not a formula ((", "1"])
    assert scores["reward"].tolist() == [0, 0, 0]
    assert "the scorer took more than 1 s of CPU time on '9**9**9**9'; it counts as wrong" in caplog.text
    answer = task.train[0].columns["answer"]
    assert task.score(task.train[0], [answer])["reward"].tolist() == [1]
