"""One record of feedback: a prompt, what was answered to it, and what was said about each answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]  # {"role": ..., "content": ...}, as in transformers' chat templates
Text = str | list[Message]

Kind = Literal[
    "language_modeling",  # text | messages
    "prompt_completion",  # prompt, completion
    "preference",  # prompt, chosen, rejected (prompt may be implicit in both)
    "unpaired_preference",  # prompt, completion, label
    "prompt_only",  # prompt
    "stepwise_supervision",  # prompt, completions (the steps of ONE answer), labels
    "scored",  # prompt, completions (alternatives), scores
]


@dataclass(slots=True)
class Record:
    """One prompt, the completions that share it, and one score for each.

    A demonstration has one completion and no scores; a preference has two with scores 1 and 0 (chosen first); an
    unpaired preference has one with score 1 (liked) or 0; ratings have n with n scores. In language modelling `prompt`
    is None.

    Attributes:
        prompt: a string, a list of messages, or None.
        completions: strings, or lists of messages where the record is conversational.
        scores: one number per completion, higher is better, or None where nothing was said.
        columns: every other column by name (answer, critique, rationale, spans, steps, labels, images, ...).
        where: where the record came from, `file:line`, for messages about it.
    """

    prompt: Text | None
    completions: list[Text]
    scores: list[float] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def conversational(self) -> bool:
        texts = [self.prompt, *self.completions]
        return any(isinstance(text, list) for text in texts)


def texts(records: Iterable[Record]) -> Iterator[str]:
    """The words of every prompt, completion and answer, for tokenizers that are built from data."""
    for record in records:
        for text in (record.prompt, *record.completions, record.columns.get("answer")):
            if isinstance(text, list):
                yield from (str(message.get("content", "")) for message in text)
            elif text is not None:
                yield str(text)
