"""What columns mean: TRL's dataset types by TRL's column names, and `scored`, a prompt with rated completions.

The type of a file is the type of most of its first rows. Every row is then held to it: a row of another type, a column
that changes between text and messages, an empty prompt or a score that is not a number is a `RowError`, never a guess.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, cast

from guerdon.errors import DataError
from guerdon.feedback.records import Kind, Message, Record, Text
from guerdon.feedback.sources import describe

# The first type whose columns a row has is the row's type, so the more telling types come first.
TYPES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("preference", ("prompt", "chosen", "rejected")),
    ("preference", ("chosen", "rejected")),
    ("scored", ("prompt", "completions", "scores")),
    ("stepwise_supervision", ("prompt", "completions", "labels")),
    ("unpaired_preference", ("prompt", "completion", "label")),
    ("prompt_completion", ("prompt", "completion")),
    ("language_modeling", ("messages",)),
    ("language_modeling", ("text",)),
    ("prompt_only", ("prompt",)),
)
ROLES = tuple(dict.fromkeys(name for _, names in TYPES for name in names))
# What other collections call these columns, for the hint in an error message.
_SYNONYMS = {
    "instruction": "prompt",
    "question": "prompt",
    "query": "prompt",
    "response": "completion",
    "output": "completion",
    "responses": "completions",
    "outputs": "completions",
    "ratings": "scores",
    "rewards": "scores",
    "conversation": "messages",
    "conversations": "messages",
}
STEP_SEPARATOR = "\n"  # as TRL's process-reward trainer joins steps

Form = Literal["text", "messages"]
_NAMES: dict[Form, str] = {"text": "text", "messages": "a list of messages"}
_TEXTS = ("prompt", "chosen", "rejected", "completion", "completions", "messages", "text")  # roles that hold words


class RowError(Exception):
    """Why one row cannot be read, and in which column."""

    def __init__(self, why: str, column: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.column = column


@dataclass(frozen=True)
class Layout:
    """The type of a file: its kind, the columns that carry it, and whether each of them holds text or messages."""

    kind: Kind
    roles: tuple[str, ...]
    forms: dict[str, Form]

    def record(self, row: dict[str, Any], where: str) -> Record:
        """The row as a record.

        Raises:
            RowError: the row is not of this type, or a value in it cannot be learned from.
        """
        self._check_type(row)
        record = _BUILDERS[self.kind](self, row)
        record.where = where
        others = {name: value for name, value in row.items() if name not in self.roles}
        record.columns = {n: v for n, v in others.items() if v is not None or n not in ROLES} | record.columns
        return record

    def _check_type(self, row: dict[str, Any]) -> None:
        found = row_type(row)
        if found == (self.kind, self.roles):
            return
        for name in self.roles:
            if row.get(name) is None:
                raise RowError("is null" if name in row else "is missing", name)
        assert found is not None
        raise RowError(f"is of type {found[0]} ({', '.join(found[1])}), where most rows are {self.kind}")

    def text(self, row: dict[str, Any], column: str) -> Text:
        return _text(row[column], self.forms[column], column)


def row_type(row: dict[str, Any]) -> tuple[Kind, tuple[str, ...]] | None:
    """The first type whose columns the row has (null counts as absent)."""
    return next((found for found in TYPES if all(row.get(name) is not None for name in found[1])), None)


def detect(rows: list[dict[str, Any]], source: str) -> Layout:
    """The layout that most of these rows have.

    Raises:
        DataError: the columns make up no known type, or look like a type of which one column is misspelt.
    """
    types = Counter(found for row in rows if (found := row_type(row)) is not None)
    counts = Counter(name for row in rows for name, value in row.items() if value is not None)
    columns = [name for name, count in counts.items() if 2 * count >= len(rows)]
    if not types:
        raise DataError(_no_type(source, columns))
    kind, roles = types.most_common(1)[0][0]
    _check_misspelt(source, columns, kind, roles)
    forms = {
        name: _form(name, [row[name] for row in rows if row.get(name) is not None]) for name in roles if name in _TEXTS
    }
    _check_forms(source, kind, forms)
    if kind == "stepwise_supervision" and "steps" in columns:
        raise DataError(f"{source}: column 'steps' would hide the steps in 'completions'. Rename it.")
    return Layout(kind, roles, forms)


def _form(name: str, values: list[Any]) -> Form:
    if name in ("text", "messages"):
        return cast(Form, name)
    if name == "completions":
        values = [item for value in values if isinstance(value, list) for item in value[:1]]
    lists = sum(isinstance(value, list) for value in values)
    return "messages" if lists > sum(isinstance(value, str) for value in values) else "text"


def _check_forms(source: str, kind: Kind, forms: dict[str, Form]) -> None:
    told = ", ".join(f"'{name}' is {_NAMES[form]}" for name, form in forms.items())
    mixed = len(set(forms.values())) > 1
    if kind == "stepwise_supervision" and forms["completions"] == "messages":
        raise DataError(f"{source}: the steps in 'completions' must be texts, not messages.")
    if kind == "preference" and forms["chosen"] == forms["rejected"] == "messages":
        return  # a prompt given as text as well is implicit in the conversations
    if mixed and kind != "stepwise_supervision":
        raise DataError(f"{source}: {told}. Give all of them as text or all of them as messages.")


def _likeness(name: str, role: str) -> float:
    """From 0 to 1: how likely `name` is a slip for `role` (and not, as `prompt_id`, a name of its own)."""
    return SequenceMatcher(None, name.lower(), role).ratio() if abs(len(name) - len(role)) <= 2 else 0.0


_ALIKE = 0.8
_HALVES = ("chosen", "rejected", "completions")  # columns that say nothing without a second one


def _check_misspelt(source: str, columns: list[str], kind: Kind, roles: tuple[str, ...]) -> None:
    """Refuse a weaker type where the columns all but make up a stronger one: half of the feedback would be ignored."""
    for stronger, names in TYPES[: TYPES.index((kind, roles))]:
        missing = [name for name in names if name not in columns]
        others = [name for name in columns if name not in (*roles, *_HALVES)]
        near_miss = max(others, key=lambda name: _likeness(name, missing[0]), default="") if len(missing) == 1 else ""
        if near_miss and _likeness(near_miss, missing[0]) >= _ALIKE:
            raise DataError(
                f"{source}: found the columns {_quoted(columns)}. Did you mean '{missing[0]}' by '{near_miss}', for "
                f"the type {stronger} ({', '.join(names)})? Rename it; otherwise call '{near_miss}' something else."
            )
    half = any(name in columns and name not in roles for name in _HALVES)
    if half and kind in ("prompt_only", "prompt_completion", "unpaired_preference"):
        raise DataError(_no_type(source, columns))


def _no_type(source: str, columns: list[str]) -> str:
    hints = []
    for name in columns:
        nearest = max(ROLES, key=lambda role: _likeness(name, role))
        role = _SYNONYMS.get(name.lower(), nearest if _likeness(name, nearest) >= _ALIKE else "")
        if role and name not in ROLES and role not in columns:
            hints.append(f"'{role}' for '{name}'")
    hint = f" Did you mean {', '.join(hints)}?" if hints else ""
    known = "\n".join(f"  {kind}: {', '.join(names)}" for kind, names in TYPES)
    found = f"found the columns {_quoted(columns)}" if columns else "found no columns"
    return f"{source}: {found}, which make up no known type.{hint} Known types and their columns:\n{known}"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _text(value: Any, form: Form, column: str, may_be_empty: bool = False) -> Text:
    """The value, checked to be of the form and (unless it may be) not empty."""
    if form == "text":
        if not isinstance(value, str):
            raise RowError(_other_form(value, form), column)
        if not may_be_empty and not value.strip():
            raise RowError("is empty", column)
        return value
    if not isinstance(value, list):
        raise RowError(_other_form(value, form), column)
    if not value:
        raise RowError("is empty", column)
    messages = [_message(message, position, column) for position, message in enumerate(value, 1)]
    if not may_be_empty and not any(plain([message]).strip() or message.get("tool_calls") for message in messages):
        raise RowError("holds only empty messages", column)
    return messages


def _other_form(value: Any, form: Form) -> str:
    return f"is {describe(value)}, where {_NAMES[form]} is expected"


def _message(message: Any, position: int, column: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"message {position} is {describe(message)}, not an object with role and content", column)
    if "role" not in message or ("content" not in message and "tool_calls" not in message):
        keys = ", ".join(map(str, message)) or "none"
        raise RowError(f"message {position} must have 'role' and 'content'; its keys are {keys}", column)
    role, content = message["role"], message.get("content")
    if not isinstance(role, str) or not role.strip():
        raise RowError(f"the role of message {position} is {describe(role)}, not a name", column)
    parts = isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    if not isinstance(content, str) and not parts and not (content is None and message.get("tool_calls")):
        raise RowError(f"the content of message {position} is {describe(content)}, not text", column)
    # Parquet gives every message the keys of all messages and fills them with null.
    return {key: item for key, item in message.items() if item is not None or key == "content"}


def plain(text: Text | None) -> str:
    """The words of a text: of messages their contents, one below the other, without roles or template."""
    if text is None or isinstance(text, str):
        return text or ""
    contents: list[str] = []
    for message in text:
        content = message.get("content")
        if isinstance(content, str):
            contents.append(content)
        elif content is not None:
            contents.extend(str(part["text"]) for part in content if part.get("text") is not None)
    return "\n".join(contents)


def _number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"holds {describe(value)}, where a number is expected", column)
    if not abs(value) <= sys.float_info.max:  # NaN, infinite, or an integer that no float can hold
        raise RowError(f"holds {str(value)[:20]}, which is not a finite number", column)
    return float(value)


def _label(value: Any, column: str) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        told = f"'{value}'" if isinstance(value, str) else value if isinstance(value, int | float) else describe(value)
        raise RowError(f"is {told}, where true/false or 1/0 is expected", column)
    return bool(value)


def _list(row: dict[str, Any], column: str, one_for_each: list[Any] | None = None) -> list[Any]:
    values = row[column]
    if not isinstance(values, list):
        raise RowError(f"is {describe(values)}, where a list is expected", column)
    if one_for_each is not None and len(values) != len(one_for_each):
        raise RowError(f"has {len(values)} entries for {len(one_for_each)} completions", column)
    return values


def _completions(layout: Layout, row: dict[str, Any], may_be_empty: bool = False) -> list[Text]:
    values = _list(row, "completions")
    if not values:
        raise RowError("is an empty list", "completions")
    found = []
    for position, value in enumerate(values, 1):
        try:
            found.append(_text(value, layout.forms["completions"], "completions", may_be_empty))
        except RowError as error:
            raise RowError(f"entry {position} {error.why}", "completions") from error
    return found


def _language_modeling(layout: Layout, row: dict[str, Any]) -> Record:
    return Record(None, [layout.text(row, layout.roles[0])])


def _prompt_completion(layout: Layout, row: dict[str, Any]) -> Record:
    return Record(layout.text(row, "prompt"), [layout.text(row, "completion")])


def _preference(layout: Layout, row: dict[str, Any]) -> Record:
    chosen, rejected = layout.text(row, "chosen"), layout.text(row, "rejected")
    for name in ("score_chosen", "score_rejected"):  # kept as columns: how far apart the two are
        if row.get(name) is not None:
            _number(row[name], name)
    for score in _list(row, "scores", [chosen, rejected]) if row.get("scores") is not None else ():
        _number(score, "scores")
    if layout.forms.get("prompt") == layout.forms["chosen"]:
        return Record(layout.text(row, "prompt"), [chosen, rejected], [1.0, 0.0])
    prompt, chosen, rejected = extract_prompt(chosen, rejected)
    if not plain(prompt).strip():
        raise RowError("'chosen' and 'rejected' begin differently, so that no prompt can be found in them", "chosen")
    if "prompt" in layout.roles and str(layout.text(row, "prompt")).strip() not in plain(prompt):
        raise RowError("is not in the beginning that 'chosen' and 'rejected' share", "prompt")
    return Record(prompt, [chosen, rejected], [1.0, 0.0])


def extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected): the longest beginning that both share, and what follows it in each.

    As TRL's `extract_prompt` has it: of strings, the space before the first difference belongs to what follows, and
    where one is the beginning of the other, what they share ends before the last character (the last message).
    """
    shortest = min(len(chosen), len(rejected))
    at = next((i for i in range(shortest) if chosen[i] != rejected[i]), None)
    if at is None:
        at = shortest - 1
    elif at and chosen[at - 1] == " ":
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:]


def _unpaired_preference(layout: Layout, row: dict[str, Any]) -> Record:
    prompt, completion = layout.text(row, "prompt"), layout.text(row, "completion")
    return Record(prompt, [completion], [float(_label(row["label"], "label"))])


def _prompt_only(layout: Layout, row: dict[str, Any]) -> Record:
    return Record(layout.text(row, "prompt"), [])


def _stepwise_supervision(layout: Layout, row: dict[str, Any]) -> Record:
    prompt, steps = layout.text(row, "prompt"), _completions(layout, row)
    labels = [_label(label, "labels") for label in _list(row, "labels", steps)]
    answer = STEP_SEPARATOR.join(str(step) for step in steps)
    completion: Text = [{"role": "assistant", "content": answer}] if isinstance(prompt, list) else answer
    return Record(prompt, [completion], columns={"steps": steps, "labels": labels})


def _scored(layout: Layout, row: dict[str, Any]) -> Record:
    prompt = layout.text(row, "prompt")
    # A model may answer nothing at all, and be scored for it.
    completions = _completions(layout, row, may_be_empty=True)
    return Record(prompt, completions, [_number(score, "scores") for score in _list(row, "scores", completions)])


_BUILDERS: dict[Kind, Callable[[Layout, dict[str, Any]], Record]] = {
    "language_modeling": _language_modeling,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "unpaired_preference": _unpaired_preference,
    "prompt_only": _prompt_only,
    "stepwise_supervision": _stepwise_supervision,
    "scored": _scored,
}
