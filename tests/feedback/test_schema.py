"""Types and their rows: every kind, standard and conversational, and every row that is refused."""

from __future__ import annotations

import pytest

from guerdon.errors import DataError
from guerdon.feedback.readers import read_feedback
from guerdon.feedback.schema import extract_prompt, plain


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def message(source: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_feedback(source, **options)
    return str(caught.value)


# name: (row, kind, prompt, completions, scores)
TYPES = {
    "text": ({"text": "hello"}, "language_modeling", None, ["hello"], None),
    "messages": (
        {"messages": user("a") + assistant("b")},
        "language_modeling",
        None,
        [user("a") + assistant("b")],
        None,
    ),
    "prompt-completion": ({"prompt": "a", "completion": "b"}, "prompt_completion", "a", ["b"], None),
    "prompt-completion messages": (
        {"prompt": user("a"), "completion": assistant("b")},
        "prompt_completion",
        user("a"),
        [assistant("b")],
        None,
    ),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", "a", ["b", "c"], [1.0, 0.0]),
    "preference messages": (
        {"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("c")},
        "preference",
        user("a"),
        [assistant("b"), assistant("c")],
        [1.0, 0.0],
    ),
    "implicit prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "preference",
        "The sky is",
        [" blue.", " green."],
        [1.0, 0.0],
    ),
    "implicit prompt messages": (
        {"chosen": user("a") + assistant("b"), "rejected": user("a") + assistant("c")},
        "preference",
        user("a"),
        [assistant("b"), assistant("c")],
        [1.0, 0.0],
    ),
    "prompt as text beside conversations": (
        {"prompt": "a", "chosen": user("a") + assistant("b"), "rejected": user("a") + assistant("c")},
        "preference",
        user("a"),
        [assistant("b"), assistant("c")],
        [1.0, 0.0],
    ),
    "null prompt is implicit": (
        {"prompt": None, "chosen": "x b", "rejected": "x c"},
        "preference",
        "x",
        [" b", " c"],
        [1.0, 0.0],
    ),
    "liked": ({"prompt": "a", "completion": "b", "label": True}, "unpaired_preference", "a", ["b"], [1.0]),
    "disliked": ({"prompt": "a", "completion": "b", "label": 0}, "unpaired_preference", "a", ["b"], [0.0]),
    "liked messages": (
        {"prompt": user("a"), "completion": assistant("b"), "label": 1.0},
        "unpaired_preference",
        user("a"),
        [assistant("b")],
        [1.0],
    ),
    "prompt": ({"prompt": "a"}, "prompt_only", "a", [], None),
    "prompt messages": ({"prompt": user("a")}, "prompt_only", user("a"), [], None),
    "steps": (
        {"prompt": "a", "completions": ["s", "t"], "labels": [True, 0]},
        "stepwise_supervision",
        "a",
        ["s\nt"],
        None,
    ),
    "steps messages": (
        {"prompt": user("a"), "completions": ["s", "t"], "labels": [True, False]},
        "stepwise_supervision",
        user("a"),
        [assistant("s\nt")],
        None,
    ),
    "scored": (
        {"prompt": "a", "completions": ["b", ""], "scores": [2, -0.5]},
        "scored",
        "a",
        ["b", ""],
        [2.0, -0.5],
    ),
    "scored messages": (
        {"prompt": user("a"), "completions": [assistant("b"), assistant("")], "scores": [1, 0]},
        "scored",
        user("a"),
        [assistant("b"), assistant("")],
        [1.0, 0.0],
    ),
}


@pytest.mark.parametrize("name", TYPES)
def test_every_type(write, name):
    row, kind, prompt, completions, scores = TYPES[name]
    feedback = read_feedback(write("a.jsonl", row | {"answer": "42", "task": {"level": 3}}))
    (record,) = feedback.records
    assert feedback.kind == kind
    assert (record.prompt, record.completions, record.scores) == (prompt, completions, scores)
    columns = {"answer": "42", "task": {"level": 3}}
    if kind == "stepwise_supervision":
        columns |= {"steps": ["s", "t"], "labels": [True, False]}
    assert record.columns == columns
    assert feedback.conversational == ("messages" in name or "beside" in name)


def test_scores_of_a_preference_stay_columns(write):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 9, "score_rejected": 2.5}
    assert read_feedback(write("a.jsonl", row)).records[0].columns == {"score_chosen": 9, "score_rejected": 2.5}
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "scores": [9, 2.5]}
    record = read_feedback(write("a.jsonl", row)).records[0]
    assert record.scores == [1.0, 0.0] and record.columns == {"scores": [9, 2.5]}


def test_messages_beside_their_first_prompt_are_language_modelling(write):
    row = {"prompt": "a", "prompt_id": "7", "messages": user("a") + assistant("b")}
    feedback = read_feedback(write("a.jsonl", row))
    assert feedback.kind == "language_modeling" and feedback.records[0].columns == {"prompt": "a", "prompt_id": "7"}


GOOD = {
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "scored": {"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]},
    "steps": {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
    "messages": {"messages": user("a") + assistant("b")},
    "implicit": {"chosen": user("a") + assistant("b"), "rejected": user("a") + assistant("c")},
    "both": {"prompt": "a", "chosen": user("a") + assistant("b"), "rejected": user("a") + assistant("c")},
}

BAD = [
    ("preference", {"prompt": " \n"}, "prompt", "is empty"),
    ("preference", {"chosen": ""}, "chosen", "is empty"),
    ("preference", {"rejected": None}, "rejected", "is null"),
    ("preference", {"rejected": ...}, "rejected", "is missing"),
    ("preference", {"prompt": ...}, "prompt", "is missing"),
    ("preference", {"prompt": user("a")}, "prompt", "is a list of messages, where text is expected"),
    ("preference", {"chosen": 3}, "chosen", "is a number, where text is expected"),
    ("preference", {"scores": [1]}, "scores", "has 1 entries for 2 completions"),
    ("preference", {"scores": 1}, "scores", "is a number, where a list is expected"),
    ("preference", {"score_chosen": "9"}, "score_chosen", "holds text, where a number is expected"),
    ("prompt_completion", {"completion": ["b"]}, "completion", "is a list, where text is expected"),
    (
        "prompt_completion",
        {"label": True},
        "",
        "is of type unpaired_preference (prompt, completion, label), where most rows are prompt_completion",
    ),
    ("unpaired", {"label": 2}, "label", "is 2, where true/false or 1/0 is expected"),
    ("unpaired", {"label": "yes"}, "label", "is 'yes', where true/false or 1/0 is expected"),
    ("unpaired", {"label": [1]}, "label", "is a list, where true/false or 1/0 is expected"),
    ("scored", {"completions": []}, "completions", "is an empty list"),
    ("scored", {"completions": "b"}, "completions", "is text, where a list is expected"),
    ("scored", {"completions": ["b", 3]}, "completions", "entry 2 is a number, where text is expected"),
    ("scored", {"scores": [1]}, "scores", "has 1 entries for 2 completions"),
    ("scored", {"scores": [1, float("nan")]}, "scores", "holds nan, which is not a finite number"),
    ("scored", {"scores": [1, float("-inf")]}, "scores", "holds -inf, which is not a finite number"),
    ("scored", {"scores": [1, 10**400]}, "scores", "which is not a finite number"),
    ("scored", {"scores": [True, False]}, "scores", "holds true/false, where a number is expected"),
    ("scored", {"scores": ["1", "0"]}, "scores", "holds text, where a number is expected"),
    ("steps", {"labels": [True]}, "labels", "has 1 entries for 2 completions"),
    ("steps", {"labels": [True, 0.5]}, "labels", "is 0.5, where true/false or 1/0 is expected"),
    ("steps", {"completions": ["b", ""]}, "completions", "entry 2 is empty"),
    ("messages", {"messages": "a"}, "messages", "is text, where a list of messages is expected"),
    ("messages", {"messages": []}, "messages", "is empty"),
    ("messages", {"messages": ["a"]}, "messages", "message 1 is text, not an object with role and content"),
    (
        "messages",
        {"messages": [{"from": "human", "value": "a"}]},
        "messages",
        "message 1 must have 'role' and 'content'; its keys are from, value",
    ),
    ("messages", {"messages": [{"role": "user"}]}, "messages", "message 1 must have 'role' and 'content'"),
    ("messages", {"messages": [{"role": 1, "content": "a"}]}, "messages", "the role of message 1 is a number"),
    ("messages", {"messages": [*user("a"), {"role": "assistant", "content": None}]}, "messages", "message 2 is null"),
    ("messages", {"messages": [{"role": "user", "content": ["a"]}]}, "messages", "content of message 1 is a list"),
    ("messages", {"messages": user(" ") + assistant("")}, "messages", "holds only empty messages"),
    ("implicit", {"chosen": user("x") + assistant("b")}, "chosen", "begin differently, so that no prompt can be found"),
    ("both", {"prompt": "something else"}, "prompt", "is not in the beginning that 'chosen' and 'rejected' share"),
]


@pytest.mark.parametrize(("kind", "change", "column", "why"), BAD)
def test_every_bad_row(write, kind, change, column, why):
    bad = {name: value for name, value in (GOOD[kind] | change).items() if value is not ...}
    source = write("a.jsonl", GOOD[kind], GOOD[kind], bad, GOOD[kind])
    feedback = read_feedback(source, skip_bad=True)
    (row,) = feedback.bad
    assert len(feedback.records) == 3
    assert row.where == f"{source}:3" and row.column == column and why in row.why
    told = message(source)
    assert f"{source}: 1 of 4 rows cannot be read:\n  {row}\n" in told and "--skip-bad" in told


def test_a_late_row_is_held_to_the_type_of_the_first(write):
    rows = [{"prompt": f"{i}", "completion": "b"} for i in range(1500)]
    source = write("a.jsonl", *rows, {"prompt": "a"}, *rows[:10])
    assert [row.where for row in read_feedback(source, skip_bad=True).bad] == [f"{source}:1501"]


def test_multimodal_contents_and_tool_calls_are_messages(write):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    parts = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}
    feedback = read_feedback(write("a.jsonl", {"prompt": [parts], "completion": [call]}))
    assert feedback.records[0].completions == [[call]]
    assert plain(feedback.records[0].prompt) == "what is it"


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (["prompt", "choosen", "rejected"], "Did you mean 'chosen' by 'choosen', for the type preference"),
        (["choosen", "rejected"], "Did you mean 'chosen' for 'choosen'?"),
        (["Prompt", "Completion"], "Did you mean 'prompt' for 'Prompt', 'completion' for 'Completion'?"),
        (["prompt", "completion", "lable"], "Did you mean 'label' by 'lable', for the type unpaired_preference"),
        (["prompt", "completion", "labels"], "Did you mean 'label' by 'labels', for the type unpaired_preference"),
        (["prompt", "chosen"], "found the columns 'prompt', 'chosen', which make up no known type"),
        (["prompt", "completion", "rejected"], "make up no known type"),
        (["question", "response"], "Did you mean 'prompt' for 'question', 'completion' for 'response'?"),
        (["a", "b"], "found the columns 'a', 'b', which make up no known type. Known types"),
    ],
)
def test_wrong_columns(write, columns, told):
    text = message(write("a.jsonl", *[dict.fromkeys(columns, "x")] * 3))
    assert told in text
    if "no known type" in text:
        assert "  preference: prompt, chosen, rejected\n" in text and "  scored: prompt, completions, scores\n" in text


def test_completions_without_scores(write):
    assert "make up no known type" in message(write("a.jsonl", {"prompt": "a", "completions": ["b"]}))
    told = message(write("a.jsonl", {"prompt": "a", "completions": ["b"], "score": [1]}))
    assert "Did you mean 'scores' by 'score', for the type scored" in told


def test_rows_without_columns(write):
    assert "found no columns" in message(write("a.jsonl", {}, {}))


@pytest.mark.parametrize(
    "row", [{"prompt": user("a"), "completion": "b"}, {"prompt": "a", "completion": assistant("b")}]
)
def test_text_and_messages_are_not_mixed(write, row):
    assert "Give all of them as text or all of them as messages" in message(write("a.jsonl", row))


def test_steps_column_beside_steps(write):
    assert "column 'steps' would hide the steps" in message(write("a.jsonl", GOOD["steps"] | {"steps": 2}))
    told = message(write("a.jsonl", GOOD["steps"] | {"completions": [assistant("a")], "labels": [True]}))
    assert "the steps in 'completions' must be texts" in told


PAIRS = [
    ("The sky is blue.", "The sky is green."),
    ("The sky is blue.", "The sky isn't."),
    ("Human: hi\n\nAssistant: I am", "Human: hi\n\nAssistant: It is"),
    ("one two", "one two three"),
    ("one two three", "one two"),
    ("same", "same"),
    ("a  b", "a  c"),
    ("x", "y"),
    (user("a") + assistant("b"), user("a") + assistant("c")),
    (user("a") + assistant("b") + user("c") + assistant("d"), user("a") + assistant("b") + user("c") + assistant("e")),
    (user("a") + assistant("b"), user("a") + assistant("b") + user("c")),
    (user("a") + assistant("b"), user("a") + assistant("b")),
    (user("a"), user("b")),
]


@pytest.mark.parametrize(("chosen", "rejected"), PAIRS)
def test_implicit_prompts_are_those_of_trl(chosen, rejected):
    trl = pytest.importorskip("trl.data_utils")
    prompt, ours, theirs = extract_prompt(chosen, rejected)
    assert {"prompt": prompt, "chosen": ours, "rejected": theirs} == trl.extract_prompt(
        {"chosen": chosen, "rejected": rejected}
    )
    assert prompt + ours == chosen and prompt + theirs == rejected


@pytest.mark.parametrize("name", ["preference", "preference messages", "prompt as text beside conversations"])
def test_given_prompts_are_those_of_trl(write, name):
    trl = pytest.importorskip("trl.data_utils")
    row = TYPES[name][0]
    record = read_feedback(write("a.jsonl", row)).records[0]
    found = {"prompt": record.prompt, "chosen": record.completions[0], "rejected": record.completions[1]}
    assert found == trl.maybe_extract_prompt(row)
