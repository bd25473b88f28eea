"""`guerdon inspect`: what a feedback file holds, and what is odd in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.feedback.decontaminate import contamination, exact_copies
from guerdon.feedback.diagnostics import (
    CHECKS,
    CHECKS_OF_KIND,
    Finding,
    View,
    found,
    label_balance,
    length_bias,
    scripts,
)
from guerdon.feedback.readers import Feedback

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

CountTokens = Callable[[list[str]], list[int]]
_CHUNK = 1000  # texts counted at once
_QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}
LEVELS = {"error": "bold red", "warning": "yellow", "info": "cyan"}  # of findings, the gravest first: their colours


def inspect_feedback(
    feedback: Feedback,
    count_tokens: CountTokens | None = None,
    max_length: int = 2048,
    against: Feedback | None = None,
) -> dict[str, Any]:
    """What the feedback holds and what is odd in it, as plain data.

    Args:
        feedback: as `read_feedback` returns it.
        count_tokens: the number of tokens of each of a list of texts; without it lengths are counted in words.
        max_length: tokens of a prompt with one completion, beyond which it would be cut.
        against: what policies will be tested on, whose prompts should not be among these.

    Returns:
        `source`, `kind`, `conversational`, `rows`, `bad_rows`, `prompts` (different ones), `completions`, `columns`
        (name to number of rows), `says`, `digest`; `unit` and `lengths` (of bare text, without chat template: prompt,
        completion, and `row`, a prompt with its longest completion); `scripts` (name to share of rows); `length_bias`,
        `scores`, `labels` where the kind has them; and `findings`, the gravest first: see `diagnostics`.
    """
    view = View.of(feedback)
    records = feedback.records
    unit = "words" if count_tokens is None else "tokens"
    count = count_tokens or _words
    prompt_lengths = _counted(view.prompt_words, count)
    flat = iter(_counted([text for words in view.answer_words for text in words], count))
    lengths = [[next(flat) for _ in words] for words in view.answer_words]

    columns = Counter(name for r in records for name, value in r.columns.items() if value is not None)
    report: dict[str, Any] = {
        "source": feedback.source,
        "kind": feedback.kind,
        "conversational": feedback.conversational,
        "rows": len(records),
        "bad_rows": len(feedback.bad),
        "prompts": len(set(view.prompts)) if feedback.kind != "language_modeling" else 0,
        "completions": sum(map(len, lengths)),
        "columns": dict(columns),
        "says": sorted(feedback.says()),
        "digest": feedback.digest,
        "unit": unit,
        "max_length": max_length,
        "lengths": _lengths(feedback, prompt_lengths, lengths),
    }
    findings = found(
        "error",
        "rows that cannot be read and are left out",
        [str(row) for row in feedback.bad],
        len(feedback.bad) + len(records),
        "Mend them.",
    )
    findings += _truncation(feedback, prompt_lengths, lengths, max_length, unit)
    findings += _contamination(view, View.of(against)) if against is not None else []
    for check in (*CHECKS, *CHECKS_OF_KIND.get(feedback.kind, ())):
        findings += check(view)
    report["scripts"], more = scripts(view)
    findings += more
    if feedback.kind in ("preference", "scored"):
        report["length_bias"], more = length_bias(view, lengths)
        findings += more
    if feedback.kind in ("unpaired_preference", "stepwise_supervision"):
        report["labels"], more = label_balance(view)
        findings += more
    if feedback.kind == "scored":
        report["scores"] = _quantiles([score for r in records for score in r.scores or ()])
    report["findings"] = sorted(findings, key=lambda finding: list(LEVELS).index(finding["level"]))
    return report


def _words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def _counted(texts: list[str], count: CountTokens) -> list[int]:
    return [n for start in range(0, len(texts), _CHUNK) for n in count(texts[start : start + _CHUNK])]


def _quantiles(values: list[Any]) -> dict[str, float]:
    array = np.asarray(values, dtype=float)
    quantiles = np.quantile(array, list(_QUANTILES.values()))
    return {"mean": float(array.mean()), **dict(zip(_QUANTILES, quantiles.tolist(), strict=True))}


def _lengths(feedback: Feedback, prompts: list[int], answers: list[list[int]]) -> dict[str, dict[str, float]]:
    parts: dict[str, list[int]] = {}
    if feedback.kind != "language_modeling":
        parts["prompt"] = prompts
    if feedback.kind == "preference":
        parts |= {"chosen": [a[0] for a in answers], "rejected": [a[1] for a in answers]}
    elif feedback.kind != "prompt_only":
        parts["completion"] = [n for sizes in answers for n in sizes]
    parts["row"] = [prompt + max(sizes, default=0) for prompt, sizes in zip(prompts, answers, strict=True)]
    return {name: _quantiles(values) for name, values in parts.items()}


def _truncation(
    feedback: Feedback, prompts: list[int], answers: list[list[int]], max_length: int, unit: str
) -> list[Finding]:
    cut, nothing_left = [], []
    longest = 0
    for record, prompt, sizes in zip(feedback.records, prompts, answers, strict=True):
        length = prompt + max(sizes, default=0)
        longest = max(longest, length)
        if prompt >= max_length and sizes:
            nothing_left.append(record.where)
        elif length > max_length:
            cut.append(record.where)
    counted = "" if unit == "tokens" else ", counted in words; there are more in tokens"
    total = len(feedback.records)
    advice = f"The longest has {longest} {unit}, before any chat template: raise the maximum, or leave them out."
    no_room = f"prompts that leave no room for an answer in {max_length} {unit}"
    too_long = f"rows of more than {max_length} {unit}, which would be cut{counted}"
    return [*found("error", no_room, nothing_left, total, advice), *found("warning", too_long, cut, total, advice)]


def _contamination(train: View, test: View) -> list[Finding]:
    """Test prompts that are copied, or more than half of which one prompt covers with 8-grams (Tulu 3)."""
    overlap = contamination(train.prompt_words, test.prompt_words)
    seen = exact_copies(train.prompt_words, test.prompt_words) | overlap.flagged()
    where = [
        test.records[i].where + (f" in {train.records[overlap.source[i]].where}" if overlap.source[i] >= 0 else "")
        for i in np.flatnonzero(seen)
    ]
    what = f"prompts of {test.feedback.source} that stand here, too, whole or more than half"
    return found("error", what, where, len(test), "Leave the rows out that hold them, or test on others.")


def render(report: dict[str, Any]) -> Group:
    """What `inspect_feedback` returned, for `rich.console.Console.print`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    form = "conversational" if report["conversational"] else "standard"
    facts = Table.grid(padding=(0, 2))
    rows = f"{report['rows']:,}" + (f" and {report['bad_rows']:,} that cannot be read" if report["bad_rows"] else "")
    told = {
        "type": f"{report['kind']} ({form})",
        "rows": rows,
        "prompts": f"{report['prompts']:,} different" if report["prompts"] else "",
        "completions": f"{report['completions']:,}",
        "says": ", ".join(report["says"]),
        "columns": ", ".join(report["columns"]),
        "scripts": ", ".join(f"{name} {share:.1%}" for name, share in report["scripts"].items()),
        "labels": ", ".join(f"{count:,} {name}" for name, count in report.get("labels", {}).items()),
        "digest": report["digest"][:16],
    }
    bias = report.get("length_bias")
    if bias and bias["better_is_longer"] is not None:
        low, high = bias["interval"]
        told["length bias"] = (
            f"the better answer is longer in {bias['better_is_longer']:.1%} [{low:.1%}, {high:.1%}] of "
            f"{bias['of_different_length']:,} pairs of different length; "
            f"{bias['mean_difference']:+.1f} {report['unit']} on average"
            + (f"; correlation {bias['correlation']:+.2f}" if bias["correlation"] is not None else "")
        )
    for name, value in told.items():
        if value:
            facts.add_row(Text(name, style="dim"), Text(value))

    lengths = Table(title=Text(f"length in {report['unit']}, without chat template"), title_justify="left")
    lengths.add_column("")
    for name in ("mean", *_QUANTILES):
        lengths.add_column(name, justify="right")
    for part, quantiles in report["lengths"].items():
        lengths.add_row(part, *(f"{quantiles[name]:,.0f}" for name in ("mean", *_QUANTILES)))
    if "scores" in report:
        lengths.add_section()
        lengths.add_row("score", *(f"{report['scores'][name]:,.3g}" for name in ("mean", *_QUANTILES)))

    return Group(Text(report["source"], style="bold"), facts, "", lengths, "", findings_table(report["findings"]))


def findings_table(findings: list[dict[str, Any]]) -> Table | Text:
    """What was found odd, as `inspect_feedback` returns it under `findings`; or that nothing was."""
    from rich.table import Table
    from rich.text import Text

    if not findings:
        return Text("Nothing odd was found.", style="green")
    table = Table(show_header=False, box=None, padding=(0, 1))
    for finding in findings:
        examples = ", ".join(finding["examples"][:3]) + (", ..." if finding["count"] > 3 else "")
        table.add_row(
            Text(finding["level"], style=LEVELS[finding["level"]]),
            Text(f"{finding['count']:,}", justify="right"),
            Text.assemble(
                f"{finding['what']} ({finding['share']:.1%})\n", (f"{examples}\n", "dim"), (finding["advice"], "italic")
            ),
        )
    return table
