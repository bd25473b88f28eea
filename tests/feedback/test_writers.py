"""Files that are whole or not there, and rows that read back as the records they were made of."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guerdon.errors import DataError
from guerdon.feedback.readers import read_feedback
from guerdon.feedback.records import Record
from guerdon.feedback.writers import record_to_row, write_feedback

words = st.text(max_size=12)
filled = words.filter(str.strip)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=4,
)
extras = st.dictionaries(st.sampled_from(["answer", "critique", "spans", "task", "id"]), plain_json, max_size=3)
scores = st.floats(-1e6, 1e6)


def messages(role: str):
    return filled.map(lambda text: [{"role": role, "content": text}])


@st.composite
def feedback(draw) -> tuple[str, Record]:
    kind = draw(
        st.sampled_from(
            [
                "language_modeling",
                "prompt_completion",
                "preference",
                "unpaired_preference",
                "prompt_only",
                "stepwise_supervision",
                "scored",
            ]
        )
    )
    chat = draw(st.booleans())
    prompts, answers = (messages("user"), messages("assistant")) if chat else (filled, filled)
    columns = draw(extras)
    prompt = draw(prompts)
    if kind == "language_modeling":
        text = prompt + draw(answers) if chat else prompt
        return kind, Record(None, [text], None, columns)
    if kind == "prompt_only":
        return kind, Record(prompt, [], None, columns)
    if kind == "stepwise_supervision":
        steps = draw(st.lists(st.tuples(filled, st.booleans()), min_size=1, max_size=4))
        answer = "\n".join(step for step, _ in steps)
        columns |= {"steps": [step for step, _ in steps], "labels": [label for _, label in steps]}
        return kind, Record(prompt, [[{"role": "assistant", "content": answer}] if chat else answer], None, columns)
    if kind == "scored":
        rated = draw(st.lists(st.tuples(answers, scores), min_size=1, max_size=4))
        return kind, Record(prompt, [answer for answer, _ in rated], [score for _, score in rated], columns)
    count = {"preference": 2}.get(kind, 1)
    told = {"preference": [1.0, 0.0], "unpaired_preference": [float(draw(st.booleans()))]}.get(kind)
    return kind, Record(prompt, [draw(answers) for _ in range(count)], told, columns)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(feedback())
def test_records_survive_json_lines(tmp_path, made):
    kind, record = made
    path = tmp_path / "a.jsonl"
    assert write_feedback(path, [record_to_row(record, kind)]) == 1
    read = read_feedback(str(path))
    record.where = f"{path}:1"
    assert read.kind == kind and read.records == [record]
    assert all(type(score) is float for score in read.records[0].scores or ())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(feedback(), st.sampled_from([".parquet", ".csv"]))
def test_records_survive_tables(tmp_path, made, suffix):
    kind, record = made
    record.columns = {name: value for name, value in record.columns.items() if name in ("steps", "labels")}
    record.columns["answer"] = "4"
    path = tmp_path / f"a{suffix}"
    write_feedback(path, [record_to_row(record, kind)] * 2)
    read = read_feedback(str(path))
    record.where = read.records[0].where
    assert read.kind == kind and read.records[0] == record and len(read) == 2


def test_rows_of_many_columns_make_one_table(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": 'b, "c"\r\nd', "note": "x"}]
    for name in ("a.csv", "a.parquet"):
        write_feedback(tmp_path / name, rows)
        records = read_feedback(str(tmp_path / name)).records
        assert [r.prompt for r in records] == ["a", 'b, "c"\r\nd']
        assert records[1].columns["note"] == "x"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "score": np.float32(1)}, "row 2, column 'score' cannot be written"),
        ({"prompt": "a", "scores": [float("nan")]}, "row 2, column 'scores' cannot be written: Out of range float"),
        ({"prompt": "\ud800"}, "row 2, column 'prompt' cannot be written"),
        ({3: "a"}, "row 2 has the column name 3, which is not text"),
    ],
)
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path, row, told):
    path = tmp_path / "a.jsonl"
    write_feedback(path, [{"prompt": "old"}])
    with pytest.raises(DataError) as caught:
        write_feedback(path, [{"prompt": "new"}, row])
    assert told in str(caught.value)
    assert path.read_text() == '{"prompt": "old"}\n'
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_an_interrupted_source_of_rows_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_feedback(path, [{"prompt": "old"}])

    def rows():
        yield {"prompt": "new"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_feedback(path, rows())
    assert path.read_text() == '{"prompt": "old"}\n' and os.listdir(tmp_path) == ["a.jsonl"]


def test_parquet_columns_have_one_type(tmp_path):
    with pytest.raises(DataError, match=r"column 'n' holds values of different types.* Write \.jsonl instead"):
        write_feedback(tmp_path / "a.parquet", [{"n": 1}, {"n": "b"}])
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match=r"written to \.jsonl, \.ndjson, \.parquet, \.csv files, not to '\.txt'"):
        write_feedback(tmp_path / "a.txt", [])
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        write_feedback(tmp_path / "file" / "a.jsonl", [{"prompt": "a"}])
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be written: Is a directory"):
        write_feedback(tmp_path / "b.jsonl", [{"prompt": "a"}])
    assert sorted(os.listdir(tmp_path)) == ["b.jsonl", "file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path, monkeypatch):
    from pathlib import Path

    path = tmp_path / "a.jsonl"
    write_feedback(path, [{"prompt": "old"}])
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: opened(Path("/dev/full"), mode))
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        write_feedback(path, [{"prompt": "new"}])
    monkeypatch.undo()
    assert path.read_text() == '{"prompt": "old"}\n'


def test_new_directories_are_made(tmp_path):
    assert write_feedback(tmp_path / "x" / "y" / "a.jsonl", ({"prompt": str(i)} for i in range(3))) == 3
    assert len(read_feedback(str(tmp_path / "x" / "y" / "a.jsonl"))) == 3
