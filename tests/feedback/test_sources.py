"""Every form a source can have, and every way in which it can be broken, with the message that says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import guerdon
from guerdon.errors import DataError
from guerdon.feedback.readers import read_feedback
from guerdon.feedback.sources import describe

PACKAGE = str(Path(guerdon.__file__).parent.parent)
ROWS = [{"prompt": "2+2", "completion": "4"}, {"prompt": "1+2", "completion": "three\nis it"}]


def message(source: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_feedback(source, **options)
    return str(caught.value)


def wheres(source: str, **options) -> list[str]:
    return [record.where.removeprefix(source) for record in read_feedback(source, **options).records]


def test_json_lines_count_blank_lines_and_tolerate_a_byte_order_mark(write):
    first, second = map(json.dumps, ROWS)
    source = write("a.jsonl", b"\xef\xbb\xbf" + f"{first}\r\n\n  \n{second}".encode())
    assert wheres(source) == [":1", ":4"]
    assert read_feedback(source).records[1].completions == ["three\nis it"]


def test_json_array_has_exact_lines(write):
    source = write("a.json", json.dumps(ROWS, indent=2))
    assert wheres(source) == [":2", ":6"]
    assert wheres(write("b.json", "[" + ",".join(map(json.dumps, ROWS)) + "]")) == [":1", ":1"]


def test_json_object_of_columns(write):
    columns = {"prompt": ["2+2", "1+2"], "completion": ["4", "3"]}
    source = write("a.json", json.dumps(columns))
    feedback = read_feedback(source)
    assert [r.prompt for r in feedback.records] == ["2+2", "1+2"]
    assert wheres(source) == [":row 1", ":row 2"]
    uneven = message(write("b.json", json.dumps({"prompt": ["a"], "completion": ["b", "c"]})))
    assert "columns of different lengths: 'prompt' 1, 'completion' 2" in uneven


def test_json_object_of_lists_of_messages_is_one_row(write):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    feedback = read_feedback(write("a.json", json.dumps(row, indent=1)))
    assert feedback.kind == "language_modeling" and feedback.records[0].completions == [row["messages"]]


def test_json_file_of_json_lines(write):
    source = write("a.json", *ROWS)
    assert wheres(source) == [":1", ":2"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"prompt": "a"},\n {"prompt": }]', ":2: not JSON: Expecting value (column 13)"),
        ('[{"prompt": "a"}\n {"prompt": "b"}]', ":2: not JSON: Expecting ',' or ']' after an array element (column 2)"),
        ('[{"prompt": "a"},\n', ":2: not JSON"),
        ('{"prompt": ', ":1: not JSON"),
        ("3", "holds a number; it must be an array of objects or an object of columns"),
        (" \n", "the file is empty"),
        ("[]", "holds no rows"),
    ],
)
def test_broken_json(write, text, told):
    source = write("a.json", text)
    assert source + told in message(source) or told in message(source)


def test_csv_lines_and_cells(write):
    source = write(
        "a.csv",
        'prompt,completions,scores,note\r\n"two\nlines","[""a"", ""b""]","[1, 0.5]",[1]\r\n\r\nq,"[""c""]",[2],\r\n',
    )
    feedback = read_feedback(source)
    assert feedback.kind == "scored"
    assert wheres(source) == [":2", ":5"]
    assert feedback.records[0].prompt == "two\nlines"
    assert feedback.records[0].completions == ["a", "b"] and feedback.records[0].scores == [1.0, 0.5]
    assert [r.columns for r in feedback.records] == [{"note": "[1]"}, {"note": ""}]  # other cells stay text


def test_csv_messages_labels_and_scores_of_a_pair(write):
    messages = json.dumps([{"role": "user", "content": "a"}]).replace('"', '""')
    answer = json.dumps([{"role": "assistant", "content": "b"}]).replace('"', '""')
    feedback = read_feedback(write("a.csv", f'prompt,completion,label\n"{messages}","{answer}",TRUE\n'))
    assert feedback.conversational and feedback.records[0].scores == [1.0]
    feedback = read_feedback(write("b.csv", "prompt,chosen,rejected,score_chosen,score_rejected\np,c,r,8,2.5\n"))
    assert feedback.records[0].columns == {"score_chosen": 8.0, "score_rejected": 2.5}
    # An answer that is JSON, but no conversation, is text.
    feedback = read_feedback(write("c.csv", 'prompt,completion\np,"[{""name"": 1}]"\n'))
    assert feedback.records[0].completions == ['[{"name": 1}]']


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompt,completion\na,b\nc\n", ":3: has 1 cells; the header has 2"),
        ('prompt,completion\na,b\nc,"d\ne,f\n', ":3: not CSV: unexpected end of data"),
        ("prompt,prompt\na,b\n", ":1: two columns are called 'prompt'"),
        ("prompt,completion\n", "holds no rows"),
        ("prompt,completions,scores\na,[1,[2]\n", ":2: column 'completions' is not a JSON list"),
        ('prompt,completions,scores\na,"[""b""",[1]\n', ":2: column 'completions' is not a JSON list"),
        ("prompt,completion\n\"[{'role': 'user', 'content': 'a'}]\",b\n", ":2: column 'prompt' is not a JSON list of"),
        ("prompt,chosen,rejected,score_chosen\na,b,c,high\n", ":2: column 'score_chosen' is 'high', not a number"),
        ("prompt,completion,label\na,b,maybe\n", ":2: column 'label' is 'maybe', where true/false or 1/0 is expected"),
    ],
)
def test_broken_csv(write, text, told):
    assert told in message(write("a.csv", text))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_not_utf8_names_line_and_byte_offset(write, name):
    content = {
        "a.jsonl": b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n',
        "a.json": b'[{"prompt": "a"},\n{"prompt": "caf\xe9"}]',
        "a.csv": b"prompt\na\nb\ncaf\xe9\n",
    }[name]
    line = {"a.csv": 4}.get(name, 2)
    told = message(write(name, content))
    assert f"{name}:{line}: not UTF-8: byte 0xe9 at byte offset {content.index(0xE9)} of the file" in told


def test_not_utf8_after_a_byte_order_mark(write):
    content = b"\xef\xbb\xbf" + b'{"prompt": "\xe9"}\n'
    for name in ("a.jsonl", "a.json"):
        assert f"byte offset {content.index(0xE9)} of" in message(write(name, content))


def test_utf16_is_recognised(write):
    told = message(write("a.csv", "prompt\na\n".encode("utf-16")))
    assert "is UTF-16, not UTF-8" in told and "iconv" in told


def test_bad_lines_of_json_lines(write):
    source = write(
        "a.jsonl", '{"prompt": "a"}\n[1]\n{"prompt": "b"\n"c"\n{"prompt": "\\ud83d"}\n{"prompt": "\\ud83d\\ude00"}\n'
    )
    bad = read_feedback(source, skip_bad=True).bad
    assert [str(row).removeprefix(source) for row in bad] == [
        ":2: is a list, not an object with columns",
        ":3: not JSON: Expecting ',' delimiter (character 16 of the line)",
        ":4: is text, not an object with columns",
        ":5: holds half of a surrogate pair, \\ud83d",
    ]
    assert wheres(source, skip_bad=True) == [":1", ":6"]


def test_pretty_printed_json_under_the_wrong_name(write):
    assert "Rename the file to .json" in message(write("a.jsonl", json.dumps(ROWS, indent=2)))


def test_deep_nesting_is_a_bad_row(write):
    source = write("a.jsonl", '{"prompt": "a"}\n{"prompt": ' + "[" * 100_000 + "\n")
    assert read_feedback(source, skip_bad=True).bad[0].where == f"{source}:2"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_empty_file(write, name):
    assert message(write(name, b"")) == f"{write(name, b'')}: the file is empty."


def test_missing_file_suggests_what_lies_near(write, tmp_path):
    write("preferences.jsonl", *ROWS)
    told = message(str(tmp_path / "preference.jsonl"))
    assert "no such file or directory. Did you mean 'preferences.jsonl'?" in told
    assert f"There is no directory '{tmp_path / 'nowhere'}' either" in message(str(tmp_path / "nowhere" / "a.jsonl"))
    assert "A hub id has the form owner/name" in message("feedbak")


def test_unknown_suffix(write):
    assert "files that end in '.txt' cannot be read; known are .jsonl" in message(write("a.txt", "hello"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_unreadable_file(write):
    source = write("a.jsonl", *ROWS)
    Path(source).chmod(0)
    assert "cannot be opened: Permission denied" in message(source)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}], "n": 1},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "n": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    feedback = read_feedback(str(path))
    assert [r.completions[0] for r in feedback.records] == [row["messages"] for row in rows]  # no null keys
    assert wheres(str(path)) == [":row 1", ":row 2"]
    whole = path.read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:5], b"not parquet at all"):
        path.write_bytes(cut)
        assert "not a whole Parquet file" in message(str(path))
    middle = len(whole) // 4
    path.write_bytes(whole[:4] + bytes(middle) + whole[4 + middle :])
    assert "not a whole Parquet file" in message(str(path))


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert wheres(str(tmp_path / "one")) == [":row 1", ":row 2"]
    assert [r.prompt for r in read_feedback(str(tmp_path / "two")).records] == ["2+2", "1+2"]
    assert [r.prompt for r in read_feedback(str(tmp_path / "two"), split="test").records] == ["1+2"]
    told = message(str(tmp_path / "two"), split="tests")
    assert "has no split 'tests'; there are train, test. Did you mean 'test'?" in told

    arrow = next((tmp_path / "one").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert "not a whole saved dataset" in message(str(tmp_path / "one"))
    arrow.unlink()
    assert "not a whole saved dataset" in message(str(tmp_path / "one"))


def test_directory_that_is_no_dataset(write, tmp_path):
    write("a.jsonl", *ROWS)
    told = message(str(tmp_path))
    assert "a directory, but not one that `datasets` saved" in told and "It holds a.jsonl: name one of these." in told


def test_hub_that_cannot_be_reached(tmp_path):
    code = "from guerdon.feedback.readers import read_feedback; read_feedback('some-owner/some-data:config')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": PACKAGE}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "DataError: some-owner/some-data:config: there is no such file here" in last
    assert "the Hugging Face hub cannot be reached" in last


def test_hub_rows_are_read_and_its_errors_told(monkeypatch):
    # The hub itself is out of reach here: what stands in for it is a real dataset, and an error that the hub gives.
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if config == "none":
            raise ValueError("BuilderConfig 'none' not found. Available: ['main']")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    feedback = read_feedback("owner/name:main", split="test")
    assert asked == [("owner/name", "main", "test")]
    assert [r.where for r in feedback.records] == ["owner/name:main:row 1", "owner/name:main:row 2"]
    assert "cannot be loaded from the Hugging Face hub: BuilderConfig 'none' not found" in message("owner/name:none")


def test_missing_library_names_the_extra(write, monkeypatch):
    source = write("a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert message(source) == f"{source}: needs pyarrow: pip install 'guerdon[data]'."


def test_json_lines_need_no_heavy_library(write):
    source = write("a.jsonl", *ROWS)
    code = (
        "import sys; from guerdon.feedback.readers import read_feedback; import guerdon.feedback.inspect;"
        f"read_feedback({source!r}); print(*({{'torch', 'pyarrow', 'datasets', 'pandas', 'rich'}} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": PACKAGE}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"),
        (True, "true/false"),
        ("a", "text"),
        (1.5, "a number"),
        ({}, "an object"),
        ([], "a list"),
        ([{"role": "user"}], "a list of messages"),
        (b"", "a value of type bytes"),
    ],
)
def test_describe(value, words):
    assert describe(value) == words
