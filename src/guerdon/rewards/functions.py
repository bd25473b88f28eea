"""Reward functions of the user, `python:module.function`, with either of two signatures told apart by their parameters.

    def f(prompts, completions, **columns) -> list[float]                   TRL's: lists, one entry per completion
    def f(prompt, completion, **columns) -> float | bool | dict[str, float]     one completion; a dict names components

Columns are passed by name, all of them where the function takes `**columns`, else those it names. A conversational
record has its prompt as a list of messages; TRL's signature then gets each completion as one too, the other a string.
The components of a dict are logged by name, and their sum is the reward. A function annotated `-> bool` is binary.
The function is the user's own code and runs in this process.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.feedback.records import Record
from guerdon.plugins import import_function
from guerdon.rewards.verifiers import Verdict, Verifier, start, where


def load_function(path: str) -> Verifier:
    """The verifier made of the function at a dotted path; modules are found in the working directory too.

    Raises:
        ConfigError: no such module or function, a module that fails to import, or a signature that is neither.
    """
    function = import_function(path)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"python:{path} is not a function.") from error
    together = "completions" in parameters
    if not together and "completion" not in parameters:
        raise ConfigError(
            f"the reward function {path} takes ({', '.join(parameters)}); it has to take either "
            "(prompts, completions, **columns) or (prompt, completion, **columns)."
        )
    judge = _judge_together if together else _judge_one_by_one
    returns = inspect.signature(function).return_annotation
    return Verifier(
        f"python:{path}",
        path.rpartition(".")[2],
        lambda record, completions: judge(_Call(path, function, record), completions),
        binary=returns in (bool, "bool", list[bool], "list[bool]"),
    )


class _Call:
    """One function on one record: what it is given, and how its mistakes are told."""

    def __init__(self, path: str, function: Callable[..., Any], record: Record) -> None:
        self.path, self.function, self.record = path, function, record

    def __call__(self, completion: str, given: dict[str, Any]) -> Any:
        """The function's result; `completion` is only for messages."""
        parameters = inspect.signature(self.function).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            given = {p.name: given[p.name] for p in parameters if p.name in given}
        for p in parameters:
            if p.name not in given and p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                columns = ", ".join(f"'{name}'" for name in self.record.columns) or "none"
                raise DataError(
                    f"{where(self.record)}: the reward function {self.path} asks for '{p.name}', which is no column "
                    f"of the record (its columns: {columns})."
                )
        try:
            return self.function(**given)
        except (Exception, SystemExit) as error:
            raise self.failure(completion, f"raised {_said(error)}") from error

    def failure(self, completion: str, what: str) -> GuerdonError:
        return GuerdonError(
            f"the reward function {self.path} {what}; record: {where(self.record)}, completion: '{start(completion)}'."
        )

    def number(self, value: Any, completion: str) -> float:
        """A finite number, or a `GuerdonError` that says what came instead."""
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
            value = value.item()  # a NumPy or torch scalar
        if not isinstance(value, Real):
            raise self.failure(completion, f"returned {_spelled(value)} where a number has to be")
        if not abs(float(value)) <= float(np.finfo(np.float32).max):
            raise self.failure(completion, f"returned {float(value)}")
        return float(value)


def _judge_together(call: _Call, completions: list[str]) -> Verdict:
    record, n = call.record, len(completions)
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    given = {name: [value] * n for name, value in record.columns.items()} | {
        "prompts": [record.prompt] * n,
        "completions": messages if record.conversational else completions,
    }
    values = call(completions[0], given)
    if isinstance(values, str) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        raise call.failure(completions[0], f"returned {_spelled(values)} where a list of {n} numbers has to be")
    if len(values) != n:
        raise call.failure(completions[0], f"returned {len(values)} rewards for {n} completions")
    numbers = [call.number(values[i], text) for i, text in enumerate(completions)]
    return Verdict(np.array(numbers, dtype=np.float32))


def _judge_one_by_one(call: _Call, completions: list[str]) -> Verdict:
    rows: list[dict[str, float]] = []
    for text in completions:
        value = call(text, call.record.columns | {"prompt": call.record.prompt, "completion": text})
        row = value if isinstance(value, dict) else {"": value}
        if not row:
            raise call.failure(text, "returned an empty dict")
        if rows and row.keys() != rows[0].keys():
            raise call.failure(text, f"returned the components {_names(row)} after {_names(rows[0])}")
        rows.append({name: call.number(part, text) for name, part in row.items()})
    parts = {name: np.array([row[name] for row in rows], dtype=np.float32) for name in rows[0]}
    return Verdict(np.sum(list(parts.values()), axis=0), {name: part for name, part in parts.items() if name})


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(row) or "(one number)"


def _spelled(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {start(repr(value))}"


def _said(error: BaseException) -> str:
    """The exception on one line, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {start(str(error))}{place}"
