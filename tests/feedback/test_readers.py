"""Feedback as a whole: what is listed and skipped, its digest, what it says, and splits that never share a prompt."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError
from guerdon.feedback.readers import BadRow, Feedback, read_feedback
from guerdon.feedback.records import Record


def feedback_of(prompts: list, kind="prompt_completion") -> Feedback:
    return Feedback(kind, [Record(p, [f"answer {i}"], where=f"a:{i}") for i, p in enumerate(prompts)], "a")


def test_the_first_bad_rows_are_listed_and_all_are_counted(write):
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}
    source = write("a.jsonl", good, *[bad] * 7, good)
    with pytest.raises(DataError) as caught:
        read_feedback(source)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{source}: 7 of 9 rows cannot be read:"
    assert lines[1:6] == [f"  {source}:{line}: column 'completion' is empty" for line in range(2, 7)]
    assert lines[6:] == ["  and 2 more", "Mend them, or leave them out with --skip-bad."]
    feedback = read_feedback(source, skip_bad=True)
    assert len(feedback) == 2 and feedback.bad == [
        BadRow(f"{source}:{n}", "completion", "is empty") for n in range(2, 9)
    ]


def test_nothing_but_bad_rows_cannot_be_skipped(write):
    for rows, told in (
        ([{"prompt": "", "completion": "a"}] * 2, "No row is a whole prompt_completion row."),
        ([1, 2], "No row could be read."),
    ):
        with pytest.raises(DataError, match="2 of 2 rows cannot be read") as caught:
            read_feedback(write("a.jsonl", *rows), skip_bad=True)
        assert str(caught.value).endswith(told)


def test_limit_counts_rows(write):
    source = write("a.jsonl", *[{"prompt": str(i)} for i in range(2000)], {"prompt": ""})
    assert [r.prompt for r in read_feedback(source, limit=3).records] == ["0", "1", "2"]
    assert len(read_feedback(source, limit=1500)) == 1500


def test_digest_is_of_content_and_order_alone(write):
    rows = [{"prompt": "a", "completion": "b", "n": 1}, {"prompt": "c", "completion": "d", "n": 2}]
    digest = read_feedback(write("a.jsonl", *rows)).digest
    assert len(digest) == 64
    assert read_feedback(write("b.jsonl", *rows)).digest == digest
    assert read_feedback(write("c.jsonl", *[dict(reversed(row.items())) for row in rows])).digest == digest
    assert read_feedback(write("d.jsonl", *rows[::-1])).digest != digest
    assert read_feedback(write("e.jsonl", rows[0], rows[1] | {"n": 3})).digest != digest


def test_digest_holds_arrays_and_dates():
    import datetime

    import numpy as np

    def digest(value) -> str:
        return Feedback("prompt_only", [Record("a", [], columns={"x": value})], "a").digest

    assert digest(np.arange(3)) == digest(np.arange(3)) != digest(np.arange(3)[::-1])
    assert digest(b"a") != digest(b"b")
    assert digest(datetime.date(2020, 1, 1)) != digest(datetime.date(2020, 1, 2))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a"}, {"demonstrations"}),
        ({"prompt": "a", "completion": "b"}, {"demonstrations", "prompts"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"demonstrations", "preferences", "prompts"}),
        ({"prompt": "a", "completion": "b", "label": True}, {"labels", "prompts"}),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]}, {"scores", "preferences", "prompts"}),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}, {"scores", "prompts"}),
        ({"prompt": "a", "completions": ["b"], "labels": [1]}, {"steps", "prompts"}),
        ({"prompt": "a", "answer": "b", "critique": None}, {"answers", "prompts"}),
        (
            {"prompt": "a", "critique": "b", "rationale": "c", "spans": [], "images": []},
            {"prompts", "critiques", "rationales", "spans", "images"},
        ),
    ],
)
def test_says(write, row, says):
    assert read_feedback(write("a.jsonl", row)).says() == says


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_split_is_disjoint_whole_and_indifferent_to_order(numbers, share, seed):
    prompts = [f"prompt {n}" for n in numbers]
    feedback = feedback_of(prompts)
    train, held_out = feedback.split(share, seed)
    assert not {r.prompt for r in train.records} & {r.prompt for r in held_out.records}
    assert sorted(r.where for r in train.records + held_out.records) == sorted(r.where for r in feedback.records)
    different = len(set(prompts))
    if different > 1:
        expected = min(max(round(share * different), 1), different - 1)
        assert len({r.prompt for r in held_out.records}) == expected
        assert train.records and held_out.records
    else:
        assert not held_out.records
    shuffled = Feedback(feedback.kind, random.Random(0).sample(feedback.records, len(prompts)), "b")
    assert {r.prompt for r in shuffled.split(share, seed)[1].records} == {r.prompt for r in held_out.records}


def test_split_depends_on_the_seed_and_keeps_the_order():
    feedback = feedback_of([f"p{i}" for i in range(100)])
    held_out = {seed: [r.prompt for r in feedback.split(0.2, seed)[1].records] for seed in (0, 1)}
    assert len(held_out[0]) == len(held_out[1]) == 20 and set(held_out[0]) != set(held_out[1])
    order = [r.prompt for r in feedback.records]
    assert held_out[0] == sorted(held_out[0], key=order.index)


def test_split_of_text_is_by_content_and_of_conversations_by_messages():
    texts = ["one", "two", "one", "three", " two "]
    feedback = Feedback("language_modeling", [Record(None, [text]) for text in texts], "a")
    for seed in range(5):
        sides = [{r.completions[0].strip() for r in side.records} for side in feedback.split(0.5, seed)]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == {"one", "two", "three"}
    conversations = feedback_of([[{"role": "user", "content": f"{i % 3}"}] for i in range(9)])
    train, held_out = conversations.split(0.34)
    assert (len(train), len(held_out)) == (6, 3)


def test_split_of_all_nothing_and_too_much():
    feedback = feedback_of(["a", "b"])
    assert [len(side) for side in feedback.split(0)] == [2, 0]
    assert [len(side) for side in feedback.split(1)] == [0, 2]
    with pytest.raises(ConfigError, match=r"a share of 1\.5 cannot be held out"):
        feedback.split(1.5)
