"""Structured replies as models write them: JSON in fences, after reasoning, before remarks, in Python's spelling.

What is read is what is written: a reply that was cut, or that can be read in two ways, is a failure, and failures are
counted, because a rate of 20% is a property of the method that asked.
"""

from __future__ import annotations

import json
import re
from typing import Any

from guerdon.errors import DataError

DEPTH = 64  # of values in values
OPENING = re.compile(r"[{\[]")
FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)```", re.DOTALL)
SPACE = re.compile(r"(?:\s|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
WORD = re.compile(r"[A-Za-z_$][\w$-]*")
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
CODE = re.compile(r"u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})")
WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’"}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}


class Parser:
    """Reads replies and counts those that cannot be read.

    Args:
        kind: of the value that is wanted, dict or list.
        keys: that an object has to have.

    Attributes:
        read, failed: how many could be read, and how many could not.
        failures: the first texts that could not be, for a look at them.
    """

    def __init__(self, kind: type = dict, keys: tuple[str, ...] = ()):
        self.kind, self.keys = kind, keys
        self.read = self.failed = 0
        self.failures: list[str] = []

    def __call__(self, text: str) -> Any | None:
        """The value in a reply, or None."""
        try:
            found = find_json(text, self.kind, self.keys)
        except DataError:
            self.failed += 1
            self.failures = [*self.failures, text][:10]
            return None
        self.read += 1
        return found

    @property
    def failure_rate(self) -> float:
        """Share of the replies that could not be read; 0 before the first."""
        return self.failed / max(self.read + self.failed, 1)


def find_json(text: str, kind: type = dict, keys: tuple[str, ...] = ()) -> Any:
    """The last value of a kind in a text, in its last fence that has one or else anywhere.

    Quotes may be single or typographic and stand unescaped within a text where they cannot end it; keys may have none;
    commas may trail; comments are skipped; True and None are read as well as true and null.

    Raises:
        DataError: there is none, or none with these keys.
    """
    for region in [*reversed(FENCE.findall(text)), text]:
        found = [v for v in _values(region, kind) if not isinstance(v, dict) or v.keys() >= set(keys)]
        if found:
            return found[-1]
    named = f" with {', '.join(keys)}" if keys else ""
    raise DataError(f"the reply holds no {'object' if kind is dict else 'list'}{named}: {text[:200]!r}")


def _values(text: str, kind: type) -> list[Any]:
    found, at, patience = [], 0, 20 * len(text)  # characters that may be read in vain
    while patience > 0 and (opening := OPENING.search(text, at)):
        try:
            value, at = _read(text, opening.start())
        except _UnreadableError as error:
            at = opening.end()
            patience -= max(error.at - at, 1)
            continue
        if isinstance(value, kind):
            found.append(value)
        else:
            at = opening.end()  # what is wanted may be within
    return found


def _read(text: str, start: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)
    except json.JSONDecodeError:
        reader = _Reader(text, start)
        return reader.value(0), reader.at
    except RecursionError:
        raise _UnreadableError(len(text)) from None


class _UnreadableError(Exception):
    """No value begins here; `at` is how far it was read."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at


class _Reader:
    """Reads one value from a text, tolerantly; `at` moves along."""

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at

    def value(self, depth: int) -> Any:
        here = self._here()
        if depth == DEPTH:
            raise _UnreadableError(self.at)
        if here == "{":
            return self._object(depth)
        if here == "[":
            return self._list(depth)
        if here in QUOTES:
            return self._string()
        if number := NUMBER.match(self.text, self.at):
            self.at = number.end()
            return float(number[0]) if set(number[0]) & set(".eE") else int(number[0])
        word = self._word()
        if word not in WORDS:
            raise _UnreadableError(self.at)
        return WORDS[word]

    def _object(self, depth: int) -> dict[str, Any]:
        found = {}
        self.at += 1
        while self._here() != "}":
            key = self._string() if self._here() in QUOTES else self._word()
            self._pass(":")
            found[key] = self.value(depth + 1)
            if self._here() != "}":
                self._pass(",")
        self.at += 1
        return found

    def _list(self, depth: int) -> list[Any]:
        found = []
        self.at += 1
        while self._here() != "]":
            found.append(self.value(depth + 1))
            if self._here() != "]":
                self._pass(",")
        self.at += 1
        return found

    def _string(self) -> str:
        """A quote ends it where a comma, a colon, a bracket or the end follows."""
        closing = QUOTES[self.text[self.at]]
        self.at += 1
        found = ""
        while self.at < len(self.text):
            here = self.text[self.at]
            self.at += 1
            if here == "\\" and self.at < len(self.text):
                found += self._escaped()
            elif here == closing and self._follows(",:]}"):
                return found
            else:
                found += here
        raise _UnreadableError(self.at)

    def _follows(self, marks: str) -> bool:
        """Whether one of these marks comes next, or the end of the text."""
        space = SPACE.match(self.text, self.at)
        after = space.end() if space else self.at
        return self.text[after : after + 1] in {"", *marks}

    def _escaped(self) -> str:
        here = self.text[self.at]
        self.at += 1
        if code := CODE.match(self.text, self.at - 1):
            self.at = code.end()
            return chr(int(code[1] or code[2], 16))
        return ESCAPES.get(here, here if here in "\\/\"'" else "\\" + here)

    def _word(self) -> str:
        word = WORD.match(self.text, self.at)
        if word is None:
            raise _UnreadableError(self.at)
        self.at = word.end()
        return word[0]

    def _pass(self, mark: str) -> None:
        if self._here() != mark:
            raise _UnreadableError(self.at)
        self.at += 1

    def _here(self) -> str:
        """The next character that is no space or comment."""
        space = SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at
        if self.at == len(self.text):
            raise _UnreadableError(self.at)
        return self.text[self.at]
