"""The whole report: what it counts, in which unit, how fast, and that it prints what a stranger wrote as it stands."""

from __future__ import annotations

import io
import json
import random
import time

import pytest
from rich.console import Console

from guerdon.feedback.inspect import inspect_feedback, render
from guerdon.feedback.readers import read_feedback


def by_what(report: dict) -> dict[str, dict]:
    return {finding["what"]: finding for finding in report["findings"]}


def printed(report: dict) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(report))
    return console.export_text()


PREFERENCES = [
    {"prompt": "one two three", "chosen": "a b c d", "rejected": "a b"},
    {"prompt": "one two three", "chosen": "a b", "rejected": "a b c d"},
    {"prompt": "four", "chosen": "x y z", "rejected": "x", "answer": "7"},
    {"prompt": "five", "chosen": "same", "rejected": "same "},
    {"prompt": "", "chosen": "b", "rejected": "c"},
]


def test_a_report_of_preferences(write):
    source = write("a.jsonl", *PREFERENCES)
    report = inspect_feedback(read_feedback(source, skip_bad=True), max_length=6)
    assert json.loads(json.dumps(report)) == report
    facts = ("kind", "conversational", "rows", "bad_rows", "prompts", "completions", "columns", "says", "unit")
    assert {name: report[name] for name in facts} == {
        "kind": "preference",
        "conversational": False,
        "rows": 4,
        "bad_rows": 1,
        "prompts": 3,
        "completions": 8,
        "columns": {"answer": 1},
        "says": ["answers", "demonstrations", "preferences", "prompts"],
        "unit": "words",
    }
    assert report["lengths"]["prompt"] == {"mean": 2.0, "min": 1.0, "5%": 1.0, "median": 2.0, "95%": 3.0, "max": 3.0}
    assert report["lengths"]["chosen"]["mean"] == 2.5 and report["lengths"]["rejected"]["max"] == 4.0
    assert report["lengths"]["row"]["max"] == 7.0
    assert report["length_bias"]["better_is_longer"] == pytest.approx(2 / 3)
    assert report["scripts"] == {"latin": 1.0}
    found = by_what(report)
    assert [f["level"] for f in report["findings"]] == sorted(
        (f["level"] for f in report["findings"]), key=["error", "warning", "info"].index
    )
    assert found["rows that cannot be read and are left out"]["examples"] == [f"{source}:5: column 'prompt' is empty"]
    cut = found["rows of more than 6 words, which would be cut, counted in words; there are more in tokens"]
    assert (cut["count"], cut["share"], cut["examples"]) == (2, 0.5, [f"{source}:1", f"{source}:2"])
    assert "The longest has 7 words" in cut["advice"]
    assert found["pairs of answers that are preferred both ways round"]["examples"] == [f"{source}:1 and {source}:2"]
    assert found["pairs whose chosen and rejected answers are identical"]["examples"] == [f"{source}:4"]
    text = printed(report)
    for words in ("preference (standard)", "4 and 1 that cannot be read", "3 different", "length in words", "5%"):
        assert words in text


def test_tokens_are_counted_in_chunks_by_the_given_function(write):
    calls = []

    def count(texts: list[str]) -> list[int]:
        calls.append(len(texts))
        return [len(text) for text in texts]

    rows = [{"prompt": "p" * (1 + i % 3), "completion": "c" * 4} for i in range(2500)]
    report = inspect_feedback(read_feedback(write("a.jsonl", *rows)), count, max_length=6)
    assert calls == [1000, 1000, 500] * 2
    assert report["unit"] == "tokens" and report["lengths"]["completion"]["mean"] == 4.0
    assert by_what(report)["rows of more than 6 tokens, which would be cut"]["count"] == 833
    tight = inspect_feedback(read_feedback(write("a.jsonl", *rows)), count, max_length=2)
    assert by_what(tight)["prompts that leave no room for an answer in 2 tokens"]["count"] == 834 - 1 + 833
    assert "length in tokens" in printed(report)


@pytest.mark.parametrize(
    ("row", "lengths", "more"),
    [
        ({"text": "a b"}, {"completion", "row"}, set()),
        ({"prompt": "a"}, {"prompt", "row"}, set()),
        ({"prompt": "a", "completion": "b", "label": True}, {"prompt", "completion", "row"}, {"labels"}),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, {"prompt", "completion", "row"}, {"labels"}),
        (
            {"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]},
            {"prompt", "completion", "row"},
            {"scores", "length_bias"},
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"completion", "row"},
            set(),
        ),
    ],
)
def test_every_kind_is_reported(write, row, lengths, more):
    report = inspect_feedback(read_feedback(write("a.jsonl", row, row)))
    assert set(report["lengths"]) == lengths
    assert more == set(report) & {"labels", "scores", "length_bias"}
    assert by_what(report)["rows that repeat an earlier row"]["count"] == 1
    assert report["kind"] in printed(report)


def test_nothing_odd(write):
    report = inspect_feedback(read_feedback(write("a.jsonl", {"prompt": "a", "completion": "b"})))
    assert report["findings"] == [] and "Nothing odd was found." in printed(report)


def test_markup_in_the_data_is_printed_as_it_stands(write):
    source = write("[red]a.jsonl", {"prompt": "a", "completion": "b", "[bold]x[/bold]": 1})
    text = printed(inspect_feedback(read_feedback(source)))
    assert "[red]a.jsonl" in text and "[bold]x[/bold]" in text


def test_time_grows_with_the_rows(write):
    rng = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]

    def rows(n: int) -> list[dict]:
        return [
            {
                "prompt": f"prompt {i // 2} " + " ".join(rng.choices(words, k=20)),
                "chosen": " ".join(rng.choices(words, k=60)),
                "rejected": " ".join(rng.choices(words, k=60)),
            }
            for i in range(n)
        ]

    def seconds(n: int) -> float:
        feedback = read_feedback(write("a.jsonl", *rows(n)))
        started = time.process_time()
        inspect_feedback(feedback)
        return time.process_time() - started

    # All pairs of one prompt are the worst case of the checks that look at a prompt as a whole.
    same = [{"prompt": "p", "chosen": f"a{i}", "rejected": f"a{i + 1}"} for i in range(20_000)]
    feedback = read_feedback(write("b.jsonl", *same, {"prompt": "p", "chosen": "a20000", "rejected": "a0"}))
    started = time.process_time()
    report = inspect_feedback(feedback)
    assert by_what(report)["prompts with a preference cycle (A over B over C over A)"]["count"] == 1
    assert time.process_time() - started < 5
    seconds(500)
    assert seconds(16_000) < 16 * seconds(4_000)
