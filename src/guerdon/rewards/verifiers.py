"""Verifiers by name: what decides from the text of a completion whether, or how much, it is right.

    exact               the completion is the column `answer`, up to white space
    number              the last number of the completion equals the last number of `answer`
    math                math-verify finds the completion equal to `answer`: 1/2 = 0.5 = \\boxed{\\frac12}
    regex               the column `pattern` is found; where it has a group, the group is the column `answer`
    regex:PATTERN       the same with one pattern for all records
    format:PATTERN      the whole completion, stripped, matches
    python:module.name  a function of the user, see `guerdon.rewards.functions`

In patterns a dot matches line breaks as well.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache

import numpy as np

from guerdon.errors import ConfigError, DataError, near
from guerdon.feedback.records import Record
from guerdon.rewards.isolation import Isolated, Stopped

NAMES = ("exact", "number", "math", "regex", "format", "python")
_log = logging.getLogger(__name__)


@dataclass
class Verdict:
    """What a verifier says about n completions.

    Attributes:
        value: (n,) float32, what the reward is made of.
        parts: name -> (n,) float32, figures to be logged beside it.
    """

    value: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Verifier:
    """A callable `(record, completions) -> Verdict`.

    Attributes:
        spec: the name as given, with its argument.
        name: short name, for logs.
        judge: the decision itself.
        binary: every value is 0 or 1.
        columns: columns that a record must have.
    """

    spec: str
    name: str
    judge: Callable[[Record, list[str]], Verdict]
    binary: bool = True
    columns: tuple[str, ...] = ()

    def check(self, record: Record) -> None:
        """`DataError` where the record lacks a column that this verifier reads."""
        for column in self.columns:
            if record.columns.get(column) is None:
                has = ", ".join(f"'{name}'" for name in record.columns) or "nothing"
                raise DataError(
                    f"{where(record)}: the verifier '{self.name}' needs a column '{column}'; there is {has} "
                    "beside the prompt."
                )

    def __call__(self, record: Record, completions: list[str]) -> Verdict:
        self.check(record)
        return self.judge(record, completions)


def get_verifier(spec: str) -> Verifier:
    """The verifier that `spec` names: NAME or NAME:ARGUMENT, see the head of this module.

    Raises:
        ConfigError: an unknown name, a missing or needless argument, a bad pattern, a function that cannot be had.
    """
    name, colon, argument = spec.partition(":")
    if name not in NAMES:
        raise ConfigError(f"no verifier is called '{name}'.{near(name, NAMES)} There are {', '.join(NAMES)}.")
    if name in ("format", "python") and not argument:
        what = "PATTERN" if name == "format" else "module.function"
        raise ConfigError(f"the verifier '{name}' needs an argument: {name}:{what}.")
    if name in ("exact", "number", "math") and colon:
        raise ConfigError(f"the verifier '{name}' takes no argument; '{spec}' gives it '{argument}'.")
    if name == "python":
        from guerdon.rewards.functions import load_function

        return load_function(argument)
    if name == "format":
        pattern = _compile(argument, f"the verifier '{spec}'", ConfigError)
        return _verifier(spec, lambda record, text: pattern.fullmatch(text.strip()) is not None)
    if name == "regex":
        if not colon:
            return _verifier(spec, _column_regex, "pattern")
        pattern = _compile(argument, f"the verifier '{spec}'", ConfigError)
        columns = ["answer"] if pattern.groups else []
        return _verifier(spec, lambda record, text: _regex(pattern, record, text), *columns)
    checks = {"exact": _exact, "number": _number, "math": _math}
    return _verifier(spec, checks[name], "answer")


def where(record: Record) -> str:
    """Where a record comes from, for messages."""
    return record.where or "a record"


_NUMBER = re.compile(
    r"""(?:(?<![0-9A-Za-z)\]}])[-+])?  # a sign, unless what stands before makes it an operator or a hyphen
        (?:[$€£]\ ?)?
        (?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))  # digits, in groups of thousands or not
        (?:\.[0-9]+)?
        (?:[eE][-+]?[0-9]{1,3}(?![0-9]))?""",
    re.VERBOSE,
)


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators and currency sign, or None.

    A minus belongs to the number unless it is an operator: "-5" and "x = -5" hold -5, "10-5" and "10 - 5" hold 5. (The
    pattern of Tulu 3, `[-+]?\\d*\\.\\d+|\\d+`, loses the sign of integers.) As there, a number in an afterthought
    ("7, found in 2 minutes") is the last one.
    """
    found = _NUMBER.findall(text.replace("−", "-"))
    return re.sub(r"[,$€£ +]", "", found[-1].replace("e+", "e").replace("E+", "E")) if found else None


def _number(record: Record, text: str) -> bool:
    label, number = last_number(str(record.columns["answer"])), last_number(text)
    if label is None:
        raise DataError(
            f"{where(record)}: the verifier 'number' finds no number in the answer {record.columns['answer']!r}."
        )
    return number is not None and Decimal(number) == Decimal(label)


def _exact(record: Record, text: str) -> bool:
    return text.split() == str(record.columns["answer"]).split()


def _column_regex(record: Record, text: str) -> bool:
    pattern = _compile(str(record.columns["pattern"]), f"{where(record)}, column 'pattern'", DataError)
    return _regex(pattern, record, text)


def _regex(pattern: re.Pattern[str], record: Record, text: str) -> bool:
    found = pattern.search(text)
    if found is None or not pattern.groups:
        return found is not None
    if record.columns.get("answer") is None:
        raise DataError(f"{where(record)}: pattern {pattern.pattern!r} has a group, but there is no column 'answer'.")
    return (found.group(1) or "").split() == str(record.columns["answer"]).split()


def _compile(pattern: str, where: str, error: type[ConfigError] | type[DataError]) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as problem:
        raise error(f"{where}: {pattern!r} is not a regular expression: {problem}.") from problem


def _math(record: Record, text: str) -> bool:
    answer = str(record.columns["answer"])
    try:
        equal = _math_worker()(answer, text)
    except Stopped as stopped:
        _log.warning("%s: math-verify %s on '%s'; it counts as wrong", where(record), stopped, start(text))
        return False
    if equal is None:
        raise DataError(f"{where(record)}: the verifier 'math' finds no expression in the answer {answer!r}.")
    return equal


@cache
def _math_worker() -> Isolated:
    return Isolated("guerdon.rewards.verifiers.math_checker")


def math_checker() -> Callable[[str, str], bool | None]:
    """`(answer, completion) -> equal`, None where the answer holds no expression. Runs in a child process.

    An answer without LaTeX delimiters is LaTeX as a whole; in completions math-verify looks for `\\boxed{}`, `$...$`
    and plain expressions. Its own time limits are off: they use signals and fail outside the main thread.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError("the verifier 'math' needs math-verify: pip install 'guerdon[tasks]'.") from error

    def check(answer: str, completion: str) -> bool | None:
        delimited = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
        gold = parse(answer if delimited else f"\\boxed{{{answer}}}", parsing_timeout=None)
        return verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None) if gold else None

    return check


def start(text: str) -> str:
    """The first characters of a text on one line, for messages."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


def _verifier(spec: str, check: Callable[[Record, str], bool], *columns: str) -> Verifier:
    def judge(record: Record, completions: list[str]) -> Verdict:
        return Verdict(np.array([check(record, text) for text in completions], dtype=np.float32))

    return Verifier(spec, spec.partition(":")[0], judge, columns=columns)
