"""Records as the loss will see them: the rendered template, what is learned of it, and what the cut takes away."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import DataError
from guerdon.feedback.records import Record
from guerdon.language.templates import render_all, verify_template

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

STYLES = {"context": "dim", "learned": "green", "cut": "red strike"}


def look(records: Iterable[Record], tokenizer: Any, n: int = 3, *, max_length: int = 2048) -> dict[str, Any]:
    """The first `n` records as plain data, in the shape that `render` draws.

    Returns:
        `template`: what is unusual about the chat template, where a record needs one. `records`: for each its `where`,
        `warnings` (also why it cannot be rendered, in which case there is nothing more), and `prompt` and `completions`
        in runs of text with `state` context, learned or cut, and `special` for tokens that are no text; a completion
        has its `score` and the number of its tokens that are `learned` and that are `cut`.
    """
    shown = list(islice(records, n))
    return {
        "template": verify_template(tokenizer) if any(record.conversational for record in shown) else [],
        "records": [_view(record, tokenizer, max_length) for record in shown],
    }


def render(view: dict[str, Any]) -> RenderableType:
    """What `look` returned, for a terminal: context dim, what is learned green, what is cut struck out in red."""
    from rich.console import Group
    from rich.panel import Panel

    panels = []
    for number, record in enumerate(view["records"], start=1):
        parts: list[RenderableType] = [_styled(warning, "yellow") for warning in record["warnings"]]
        if record.get("prompt"):
            parts.append(_text(record["prompt"]))
        for completion in record.get("completions", []):
            counts = f"{completion['learned']} learned" + f", {completion['cut']} cut" * bool(completion["cut"])
            score = "" if completion["score"] is None else f"score {completion['score']:g}, "
            parts += [_styled(f"── {score}{counts}", "bold"), _text(completion["runs"])]
        panels.append(
            Panel(Group(*parts), title=_styled(record["where"] or f"record {number}", "bold"), title_align="left")
        )
    return Group(*(_styled(f"chat template: {finding}", "yellow") for finding in view["template"]), *panels)


def _view(record: Record, tokenizer: Any, max_length: int) -> dict[str, Any]:
    try:
        (whole,), _ = render_all([record], tokenizer, max_length=sys.maxsize)
    except DataError as error:
        return {"where": record.where, "warnings": [str(error)]}
    _, stats = render_all([record], tokenizer, max_length=max_length, skip_bad=True)
    root = len(whole.segments[0])
    completions = []
    for index in range(len(whole)):
        tokens, learn = whole.sequence(index)
        states = np.where(np.arange(len(tokens)) >= max_length, "cut", np.where(learn, "learned", "context"))[root:]
        completions.append(
            {
                "score": None if record.scores is None else record.scores[index],
                "learned": int((states == "learned").sum()),
                "cut": int((states == "cut").sum()),
                "runs": _runs(tokens[root:], states, tokenizer),
            }
        )
    prompt = _runs(whole.segments[0].tokens, np.full(root, "context"), tokenizer)
    return {"where": record.where, "warnings": stats.warnings(), "prompt": prompt, "completions": completions}


def _runs(tokens: np.ndarray, states: np.ndarray, tokenizer: Any) -> list[dict[str, Any]]:
    special = tokenizer.added_tokens_decoder
    kinds = [(str(state), int(token) in special) for token, state in zip(tokens, states, strict=True)]
    runs = []
    for (state, is_special), indices in groupby(range(len(tokens)), key=kinds.__getitem__):
        text = tokenizer.decode(tokens[list(indices)], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        runs.append({"text": text, "state": state, "special": is_special})
    return runs


def _text(runs: list[dict[str, Any]]) -> Text:
    from rich.text import Text

    text = Text()
    for run in runs:
        text.append(_visible(run["text"]), STYLES[run["state"]] + " reverse" * run["special"])
    return text


def _styled(line: str, style: str) -> Text:
    from rich.text import Text

    return Text(_visible(line), style)


def _visible(text: str) -> str:
    """Line ends marked, and control characters spelled out, so that no record can steer the terminal."""
    spelled = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)
    return spelled.replace("\n", "↵\n")
