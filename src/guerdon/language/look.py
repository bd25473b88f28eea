"""Records as the loss will see them: the rendered template, what is learned of it, and what the cut takes away."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import DataError
from guerdon.feedback.records import Record
from guerdon.language.templates import render_all, verify_template

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from guerdon.language.groups import Group as TokenGroup

STYLES = {"context": "dim", "learned": "green", "cut": "red strike"}


def look(
    records: Iterable[Record],
    tokenizer: Any,
    n: int = 3,
    *,
    max_length: int = 2048,
    credit: Callable[[TokenGroup], Sequence[np.ndarray]] | None = None,
) -> dict[str, Any]:
    """The first `n` records as plain data, in the shape that `render` draws.

    Args:
        credit: what the tokens of each completion of a group earn, aligned with its whole sequence.

    Returns:
        `template`: what is unusual about the chat template, where a record needs one. `records`: for each its `where`,
        `warnings` (also why it cannot be rendered, in which case there is nothing more), and `prompt` and `completions`
        in runs of text with `state` context, learned or cut, and `special` for tokens that are no text; a completion
        has its `score` and the number of its tokens that are `learned` and that are `cut`. With `credit` it has the sum
        of it, too, and each learned token is a run of its own with its share.
    """
    shown = list(islice(records, n))
    return {
        "template": verify_template(tokenizer) if any(record.conversational for record in shown) else [],
        "records": [_view(record, tokenizer, max_length, credit) for record in shown],
    }


def render(view: dict[str, Any]) -> RenderableType:
    """What `look` returned, for a terminal: context dim, what is learned green, what is cut struck out in red.

    With credit, learned tokens stand on green where they earn and on red where they cost, the stronger the more.
    """
    from rich.console import Group
    from rich.panel import Panel

    panels = []
    for number, record in enumerate(view["records"], start=1):
        parts: list[RenderableType] = [_styled(warning, "yellow") for warning in record["warnings"]]
        if record.get("prompt"):
            parts.append(_text(record["prompt"]))
        for completion in record.get("completions", []):
            counts = f"{completion['learned']} learned" + f", {completion['cut']} cut" * bool(completion["cut"])
            counts += f", credit {completion['credit']:.3g}" if "credit" in completion else ""
            score = "" if completion["score"] is None else f"score {completion['score']:g}, "
            parts += [_styled(f"── {score}{counts}", "bold"), _text(completion["runs"])]
        panels.append(
            Panel(Group(*parts), title=_styled(record["where"] or f"record {number}", "bold"), title_align="left")
        )
    return Group(*(_styled(f"chat template: {finding}", "yellow") for finding in view["template"]), *panels)


def _view(
    record: Record, tokenizer: Any, max_length: int, credit: Callable[[TokenGroup], Sequence[np.ndarray]] | None
) -> dict[str, Any]:
    try:
        (whole,), _ = render_all([record], tokenizer, max_length=sys.maxsize)
    except DataError as error:
        return {"where": record.where, "warnings": [str(error)]}
    _, stats = render_all([record], tokenizer, max_length=max_length, skip_bad=True)
    root = len(whole.segments[0])
    earned = [each[root:] for each in credit(whole)] if credit else None
    completions = []
    for index in range(len(whole)):
        tokens, learn = whole.sequence(index)
        states = np.where(np.arange(len(tokens)) >= max_length, "cut", np.where(learn, "learned", "context"))[root:]
        completions.append(
            {
                "score": None if record.scores is None else record.scores[index],
                "learned": int((states == "learned").sum()),
                "cut": int((states == "cut").sum()),
                "runs": _runs(tokens[root:], states, tokenizer, earned[index] if earned else None),
            }
            | ({"credit": float(earned[index].sum())} if earned else {})
        )
    prompt = _runs(whole.segments[0].tokens, np.full(root, "context"), tokenizer)
    return {"where": record.where, "warnings": stats.warnings(), "prompt": prompt, "completions": completions}


def _runs(
    tokens: np.ndarray, states: np.ndarray, tokenizer: Any, credit: np.ndarray | None = None
) -> list[dict[str, Any]]:
    special = tokenizer.added_tokens_decoder
    kinds = [
        (str(state), int(token) in special, None if credit is None else i)
        for i, (token, state) in enumerate(zip(tokens, states, strict=True))
    ]
    runs = []
    for (state, is_special, alone), indices in groupby(range(len(tokens)), key=kinds.__getitem__):
        text = tokenizer.decode(tokens[list(indices)], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        runs.append({"text": text, "state": state, "special": is_special})
        if credit is not None and alone is not None:
            runs[-1]["credit"] = float(credit[alone])
    return runs


def _text(runs: list[dict[str, Any]]) -> Text:
    from rich.text import Text

    text = Text()
    most = max((abs(run["credit"]) for run in runs if "credit" in run), default=0.0)
    for run in runs:
        style = STYLES[run["state"]]
        if most and run["state"] == "learned":
            rest = 255 - round(200 * abs(run["credit"]) / most)
            style = "black on #" + (f"{rest:02x}ff{rest:02x}" if run["credit"] > 0 else f"ff{rest:02x}{rest:02x}")
        text.append(_visible(run["text"]), style + " reverse" * run["special"])
    return text


def _styled(line: str, style: str) -> Text:
    from rich.text import Text

    return Text(_visible(line), style)


def _visible(text: str) -> str:
    """Line ends marked, and control characters spelled out, so that no record can steer the terminal."""
    spelled = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)
    return spelled.replace("\n", "↵\n")
