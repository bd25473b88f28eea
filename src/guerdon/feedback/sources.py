"""Rows and where they stand, from every form in which a file of feedback comes.

A source yields `Row`s one after the other: a mapping of columns, or the reason why the row cannot be had. What a row
means is decided in `schema`; here a row only has to be found, decoded and located. Whatever breaks the source as a
whole (no such file, a Parquet file without its end) raises one `DataError`.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guerdon.errors import DataError, near

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
_BOM = b"\xef\xbb\xbf"
# JSON can spell half of a surrogate pair, which is no character: tokenizers and UTF-8 files cannot hold it.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(slots=True)
class Row:
    """One row of a source: its columns, or None and the reason `why` it cannot be read."""

    where: str
    columns: dict[str, Any] | None
    why: str = ""
    column: str = ""


def open_source(source: str, split: str = "train") -> Iterator[Row]:
    """The rows of a file, a saved `datasets` directory or a hub id (`owner/name`, `owner/name:config`), in order.

    `split` chooses among the splits of a `DatasetDict` or a hub dataset; a single file has none.

    Raises:
        DataError: the source does not exist, has no known form, or breaks off.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _saved_dataset(path, source, split)
    if path.is_file():
        return _file(path, source)
    suffix = path.suffix.lower()
    if _HUB_ID.fullmatch(source) and suffix not in SUFFIXES and not path.parent.is_dir():
        return _hub(source, split)
    raise DataError(f"{source}: no such file or directory.{_nearby(path)} A hub id has the form owner/name.")


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no directory '{path.parent}' either."
    return near(path.name, [entry.name for entry in path.parent.iterdir()])


def _file(path: Path, source: str) -> Iterator[Row]:
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise DataError(f"{source}: files that end in '{suffix}' cannot be read; known are {', '.join(SUFFIXES)}.")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(f"{source}: cannot be opened: {error.strerror}.") from error
    if not head:
        raise DataError(f"{source}: the file is empty.")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{source}: is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {source}")
    return readers[suffix](path, source)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset of the line, its bytes without a byte-order mark)."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            skipped = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            yield number, offset + skipped, line[skipped:]
            offset += len(line)


def _not_utf8(error: UnicodeDecodeError, offset: int = 0) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte offset {offset + error.start} of the file"


def _json_lines(path: Path, source: str) -> Iterator[Row]:
    for number, offset, line in _lines(path):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            text = line.decode("utf-8")
            yield _json_row(where, json.loads(text), text)
        except UnicodeDecodeError as error:
            yield Row(where, None, _not_utf8(error, offset))
        except json.JSONDecodeError as error:
            if number == 1 and line.strip() in (b"{", b"["):
                raise DataError(
                    f"{source}: holds one JSON value over several lines; JSON Lines hold one object on each line. "
                    "Rename the file to .json."
                ) from error
            yield Row(where, None, f"not JSON: {error.msg} (character {error.pos + 1} of the line)")
        except RecursionError:
            yield Row(where, None, "not usable: JSON nested too deeply")


def _json_row(where: str, value: Any, raw: str) -> Row:
    if not isinstance(value, dict):
        return Row(where, None, f"is {describe(value)}, not an object with columns")
    if _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            return Row(where, None, f"holds half of a surrogate pair, \\u{ord(error.object[error.start]):04x}")
    return Row(where, value)


def _json(path: Path, source: str) -> Iterator[Row]:
    """An array of objects, an object of columns, or (as many `.json` files are) JSON lines."""
    data = path.read_bytes()
    try:
        text = data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = len(data) - len(error.object)
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{source}:{line}: {_not_utf8(error, offset)}.") from error
    start = _skip_space(text, 0)
    if start == len(text):
        raise DataError(f"{source}: the file is empty.")
    if text[start] == "[":
        yield from _json_array(text, start + 1, source)
        return
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _broken_json(source, error) from error
    if _skip_space(text, end) < len(text):
        yield from _json_lines(path, source)
    elif _holds_columns(value):
        yield from _columns(value, text, source)
    elif isinstance(value, dict):
        yield _json_row(f"{source}:{text.count(chr(10), 0, start) + 1}", value, text)
    else:
        raise DataError(f"{source}: holds {describe(value)}; it must be an array of objects or an object of columns.")


def _holds_columns(value: Any) -> bool:
    """Whether an object maps columns to lists of cells; a lone row of messages is also an object of lists."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(cells, list) and not any(is_message(cell) for cell in cells) for cells in value.values())
    )


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _broken_json(source: str, error: json.JSONDecodeError) -> DataError:
    return DataError(f"{source}:{error.lineno}: not JSON: {error.msg} (column {error.colno}).")


def _json_array(text: str, at: int, source: str) -> Iterator[Row]:
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    at = _skip_space(text, at)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken_json(source, error) from error
        yield _json_row(f"{source}:{line}", value, text[at:end])
        at = _skip_space(text, end)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise _broken_json(source, json.JSONDecodeError("Expecting ',' or ']' after an array element", text, at))


def _columns(columns: dict[str, list[Any]], text: str, source: str) -> Iterator[Row]:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"'{name}' {length}" for name, length in lengths.items())
        raise DataError(f"{source}: columns of different lengths: {told}.")
    for number, values in enumerate(zip(*columns.values(), strict=True), 1):
        row = dict(zip(columns, values, strict=True))
        yield _json_row(f"{source}:row {number}", row, text)


def _csv(path: Path, source: str) -> Iterator[Row]:
    """Cells are text; where a list of messages, strings or numbers belongs, the cell holds it as JSON."""

    def decoded() -> Iterator[str]:
        for number, offset, line in _lines(path):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{source}:{number}: {_not_utf8(error, offset)}.") from error

    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(decoded(), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not header:
                raise DataError(f"{source}:{line}: not CSV: {error}.") from error
            yield Row(f"{source}:{line}", None, f"not CSV: {error}")
            continue
        if not cells:
            continue
        if not header:
            header = cells
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise DataError(f"{source}:{line}: two columns are called '{twice}'.")
        elif len(cells) != len(header):
            yield Row(f"{source}:{line}", None, f"has {len(cells)} cells; the header has {len(header)}")
        else:
            yield _csv_row(f"{source}:{line}", dict(zip(header, cells, strict=True)))


_MESSAGES_CELL = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")  # single quotes: Python's repr, refused
_CSV_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _csv_row(where: str, cells: dict[str, str]) -> Row:
    columns: dict[str, Any] = {}
    for name, cell in cells.items():
        columns[name] = cell
        if name in ("messages", "completions", "scores", "labels") and cell.lstrip().startswith("["):
            try:
                columns[name] = json.loads(cell)
            except json.JSONDecodeError as error:
                return Row(where, None, f"is not a JSON list: {error.msg}", name)
        elif name in ("prompt", "completion", "chosen", "rejected") and _MESSAGES_CELL.match(cell):
            try:
                columns[name] = json.loads(cell)
            except json.JSONDecodeError as error:
                return Row(where, None, f"is not a JSON list of messages: {error.msg}", name)
        elif name == "label":
            columns[name] = _CSV_LABELS.get(cell.strip().lower(), cell)
        elif name in ("score_chosen", "score_rejected"):
            try:
                columns[name] = float(cell)
            except ValueError:
                return Row(where, None, f"is '{cell}', not a number", name)
    return Row(where, columns)


def _parquet(path: Path, source: str) -> Iterator[Row]:
    pyarrow = data_library("pyarrow", source)
    parquet = data_library("pyarrow.parquet", source)
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Row(f"{source}:row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{source}: not a whole Parquet file ({_first_line(error)}). It may have been cut off: write or download "
            "it again."
        ) from error


def data_library(name: str, path: object) -> Any:
    """pyarrow or datasets, which only some sources need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{path}: needs {name.split('.')[0]}: pip install 'guerdon[data]'.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _dataset_rows(dataset: Iterable[dict[str, Any]], source: str) -> Iterator[Row]:
    for number, row in enumerate(dataset, 1):
        yield Row(f"{source}:row {number}", dict(row))


def _saved_dataset(path: Path, source: str, split: str) -> Iterator[Row]:
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if not saved:
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
        hint = f" It holds {', '.join(inside[:5])}: name one of these." if inside else ""
        raise DataError(f"{source}: a directory, but not one that `datasets` saved (save_to_disk).{hint}")

    datasets = data_library("datasets", source)
    pyarrow = data_library("pyarrow", source)
    try:
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                splits = ", ".join(dataset)
                raise DataError(f"{source}: has no split '{split}'; there are {splits}.{near(split, dataset)}")
            dataset = dataset[split]
        yield from _dataset_rows(dataset, source)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source}: not a whole saved dataset ({_first_line(error)}). Save it again.") from error


def _hub(source: str, split: str) -> Iterator[Row]:
    datasets = data_library("datasets", source)
    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except ConnectionError as error:
        raise DataError(
            f"{source}: there is no such file here, and the Hugging Face hub cannot be reached to look for a dataset "
            f"of that name ({_first_line(error)}). Check the path or the network."
        ) from error
    except Exception as error:  # the hub fails in as many ways as there are builders
        raise DataError(f"{source}: cannot be loaded from the Hugging Face hub: {str(error).strip()}") from error
    yield from _dataset_rows(dataset, source)


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value


def describe(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list of messages" if value and is_message(value[0]) else "a list"
    return f"a value of type {type(value).__name__}"
