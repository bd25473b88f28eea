"""Feedback on its way back to a file: whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from guerdon.errors import DataError
from guerdon.feedback.records import Kind, Record
from guerdon.feedback.sources import data_library

Rows = Iterator[tuple[dict[str, Any], str]]  # each row beside its JSON


def write_feedback(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> int:
    """Write rows of columns to a `.jsonl`, `.ndjson`, `.parquet` or `.csv` file and return how many there were.

    The rows go to a temporary file beside `path`, which takes its place only when all are written: whoever reads `path`
    sees the old file or the whole new one. CSV holds lists and objects as JSON, and types only of the columns that
    `read_feedback` knows.

    Raises:
        DataError: an unknown suffix, a row that JSON cannot hold (its number and column are named), or a full disk.
    """
    path = Path(path)
    check_target(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            count = _WRITERS[path.suffix.lower()](file, _checked(rows, path), path)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return count


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise `DataError` where no feedback could be written to a file of this name."""
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise DataError(f"{path}: feedback is written to {', '.join(_WRITERS)} files, not to '{path.suffix}'.")
    if path.is_dir():
        raise DataError(f"{path}: cannot be written: Is a directory.")


def _checked(rows: Iterable[dict[str, Any]], path: Path) -> Rows:
    for number, row in enumerate(rows, 1):
        for name in row:
            if not isinstance(name, str):
                raise DataError(f"{path}: row {number} has the column name {name!r}, which is not text.")
        try:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False)
            text.encode("utf-8")
        except (TypeError, ValueError, RecursionError):
            column, why = _culprit(row)
            raise DataError(f"{path}: row {number}, column '{column}' cannot be written: {why}.") from None
        yield row, text


def _culprit(row: dict[str, Any]) -> tuple[str, str]:
    """The column that JSON cannot hold, and why."""
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False, allow_nan=False).encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            return name, str(error)
    raise AssertionError("every column can be written alone")


def _write_json_lines(file: IO[bytes], rows: Rows, path: Path) -> int:
    count = 0
    for _, text in rows:
        file.write(text.encode("utf-8") + b"\n")
        count += 1
    return count


def _write_parquet(file: IO[bytes], rows: Rows, path: Path) -> int:
    pyarrow, parquet = data_library("pyarrow", path), data_library("pyarrow.parquet", path)
    values = [row for row, _ in rows]
    names = dict.fromkeys(name for row in values for name in row)
    columns = {}
    for name in names:
        try:
            columns[name] = pyarrow.array([row.get(name) for row in values])
        except pyarrow.ArrowException as error:
            raise DataError(
                f"{path}: column '{name}' holds values of different types, which Parquet cannot ({error}). "
                "Write .jsonl instead."
            ) from error
    parquet.write_table(pyarrow.table(columns), file)
    return len(values)


def _write_csv(file: IO[bytes], rows: Rows, path: Path) -> int:
    values = [row for row, _ in rows]
    names = list(dict.fromkeys(name for row in values for name in row))
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(names)
    for row in values:
        writer.writerow([_cell(row.get(name)) for name in names])
    text.detach()
    return len(values)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


_WRITERS: dict[str, Callable[[IO[bytes], Rows, Path], int]] = {
    ".jsonl": _write_json_lines,
    ".ndjson": _write_json_lines,
    ".parquet": _write_parquet,
    ".csv": _write_csv,
}


def record_to_row(record: Record, kind: Kind) -> dict[str, Any]:
    """The row of columns from which `read_feedback` makes this record (but for where it stands)."""
    columns = dict(record.columns)
    if kind == "language_modeling":
        text = record.completions[0]
        return {"messages" if isinstance(text, list) else "text": text, **columns}
    row: dict[str, Any] = {"prompt": record.prompt}
    if kind == "prompt_completion":
        row["completion"] = record.completions[0]
    elif kind == "preference":
        row["chosen"], row["rejected"] = record.completions
    elif kind == "unpaired_preference":
        assert record.scores is not None
        row |= {"completion": record.completions[0], "label": bool(record.scores[0])}
    elif kind == "stepwise_supervision":
        row |= {"completions": columns.pop("steps"), "labels": columns.pop("labels")}
    elif kind == "scored":
        row |= {"completions": record.completions, "scores": record.scores}
    return row | columns
