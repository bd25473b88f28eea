"""Feedback as it is read: typed, checked row by row, and split without letting a prompt stand on both sides."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.feedback.records import Kind, Record
from guerdon.feedback.schema import RowError, detect
from guerdon.feedback.sources import Row, open_source

_SAMPLE = 1000  # rows by which the type is told
_LISTED = 5  # bad rows that the error message lists
# Columns that say something about the answers, and what they say.
_TOLD_BY = {
    "answer": "answers",
    "label": "classes",
    "critique": "critiques",
    "rationale": "rationales",
    "spans": "spans",
    "images": "images",
}


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: where it stands, in which column (if in one), and why."""

    where: str
    column: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: column '{self.column}' {self.why}" if self.column else f"{self.where}: {self.why}"


@dataclass
class Feedback:
    """What the user brought: records of one kind, where they are from, and the rows that could not be read."""

    kind: Kind
    records: list[Record]
    source: str
    bad: list[BadRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of kind and records (in order, without where they stand): equal for equal feedback."""
        digest = hashlib.sha256(self.kind.encode())
        for record in self.records:
            digest.update(_canonical([record.prompt, record.completions, record.scores, record.columns]))
        return digest.hexdigest()

    @property
    def conversational(self) -> bool:
        return any(record.conversational for record in self.records)

    def says(self) -> set[str]:
        """What the feedback says, to be matched with what a method learns from.

        `demonstrations`: answers to imitate (the chosen ones of a preference too). `preferences`: one answer over
        another to the same prompt, given as such or by different scores. `scores`, `labels` (liked or not), `steps`:
        judgements of completions and of steps. `prompts`: something to answer. And by columns: `answers` to check
        against, `classes` of texts, `critiques`, `rationales`, `spans`, `images`.
        """
        columns = {name for record in self.records for name, value in record.columns.items() if value is not None}
        says = {told for column, told in _TOLD_BY.items() if column in columns}
        if self.kind != "language_modeling":
            says.add("prompts")
        if self.kind in ("language_modeling", "prompt_completion", "preference"):
            says.add("demonstrations")
        if self.kind == "preference" or any(len(set(r.scores or ())) > 1 for r in self.records):
            says.add("preferences")
        if self.kind == "scored":
            says.add("scores")
        if self.kind == "unpaired_preference":
            says.add("labels")
        if self.kind == "stepwise_supervision":
            says.add("steps")
        return says

    def split(self, share: float, seed: int = 0) -> tuple[Feedback, Feedback]:
        """(train, held out): `share` of the prompts, with all their records, is held out.

        No prompt stands on both sides (in language modelling: no text), and where there are two prompts or more and the
        share is neither 0 nor 1, neither side is empty. Which prompts are held out depends on the prompts and the seed,
        not on the order of the rows.

        Raises:
            ConfigError: the share is not within 0 and 1.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"a share of {share} cannot be held out: it must lie within 0 and 1.")
        keys = [_split_key(record, seed) for record in self.records]
        ranked = sorted(set(keys))
        count = round(share * len(ranked))
        if 0 < share < 1:
            count = min(max(count, 1), len(ranked) - 1)
        held_out = set(ranked[: max(count, 0)])
        sides: tuple[list[Record], list[Record]] = ([], [])
        for key, record in zip(keys, self.records, strict=True):
            sides[key in held_out].append(record)
        return Feedback(self.kind, sides[0], self.source), Feedback(self.kind, sides[1], self.source)


def read_feedback(source: str, *, skip_bad: bool = False, limit: int | None = None, split: str = "train") -> Feedback:
    """Read and check feedback from a file, a saved `datasets` directory or a hub id.

    Args:
        source: a `.jsonl`, `.ndjson`, `.json` (array of objects, object of columns), `.csv` or `.parquet` file, text in
            UTF-8; a directory that `datasets` saved; or `owner/name`, `owner/name:config` on the Hugging Face hub.
        skip_bad: go on past rows that cannot be read; they are in `Feedback.bad`.
        limit: read only this many rows.
        split: which split of a dataset with several.

    The type is told by the columns, named as TRL names them (`schema.TYPES`); every other column is kept in
    `Record.columns`. Lines in `Record.where` count from 1; where a format has no lines, rows do.

    Raises:
        DataError: the source cannot be read, its columns make up no known type, or (without `skip_bad`) a row is bad.
    """
    rows = islice(open_source(source, split), limit)
    sample = list(islice(rows, _SAMPLE))
    good = [row.columns for row in sample if row.columns is not None]
    if not sample:
        raise DataError(f"{source}: holds no rows.")
    if not good:
        raise DataError(_bad_rows(source, [_bad(row) for row in sample], len(sample), "No row could be read."))
    layout = detect(good, source)

    records: list[Record] = []
    bad: list[BadRow] = []
    for row in chain(sample, rows):
        if row.columns is None:
            bad.append(_bad(row))
            continue
        try:
            records.append(layout.record(row.columns, row.where))
        except RowError as error:
            bad.append(BadRow(row.where, error.column, error.why))
    if bad and not records:
        raise DataError(_bad_rows(source, bad, len(bad), f"No row is a whole {layout.kind} row."))
    if bad and not skip_bad:
        advice = "Mend them, or leave them out with --skip-bad."
        raise DataError(_bad_rows(source, bad, len(bad) + len(records), advice))
    return Feedback(layout.kind, records, source, bad)


def _bad(row: Row) -> BadRow:
    return BadRow(row.where, row.column, row.why)


def _bad_rows(source: str, bad: list[BadRow], total: int, advice: str) -> str:
    lines = [f"{source}: {len(bad)} of {total} rows cannot be read:", *(f"  {row}" for row in bad[:_LISTED])]
    if len(bad) > _LISTED:
        lines.append(f"  and {len(bad) - _LISTED} more")
    return "\n".join([*lines, advice])


def _split_key(record: Record, seed: int) -> bytes:
    content = record.completions[0] if record.prompt is None else record.prompt
    content = content.strip() if isinstance(content, str) else content
    return hashlib.sha256(_canonical([seed, content])).digest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_digestible).encode()


def _digestible(value: Any) -> str:
    """What JSON has no form for: bytes, arrays and images by their content, dates as they print."""
    content = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else None
    return str(value) if content is None else hashlib.sha256(content).hexdigest()
