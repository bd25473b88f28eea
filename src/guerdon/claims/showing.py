"""A claim's result, as plain data, for people: tables for the terminal, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from guerdon.evaluation.statistics import Interval
from guerdon.evaluation.wording import interval_text
from guerdon.report.plots import interval_image

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"holds": "green", "does not hold": "red", "cannot be told": "yellow"}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Scores of the arms, then the criteria."""
    from rich.markup import escape
    from rich.table import Table

    version = "quick version" if result["quick"] else "full version"
    title = f"{result['paper']:02d} ({version}): {result['measures']}, over {result['seeds']} seeds, with 95% intervals"
    scores = Table(title=title)
    for name in ("setting", "arm", "score", *_metrics(result)):
        scores.add_column(name, justify="left" if name in ("setting", "arm") else "right")
    for where, rows in groupby(result["rows"], key=lambda row: row["where"]):
        for i, row in enumerate(rows):
            others = [f"{row['metrics'][name]:.3g}" if name in row["metrics"] else "" for name in _metrics(result)]
            scores.add_row(
                "" if i else escape(where), escape(row["arm"]), interval_text(Interval(**row["score"])), *others
            )
        scores.add_section()
    criteria = Table(title="criteria, with intervals that hold for all of them together")
    for name in ("setting", "criterion", "difference", "verdict"):
        criteria.add_column(name)
    for each in result["criteria"]:
        difference = interval_text(Interval(**each["difference"]))
        style = STYLES[each["verdict"]]
        criteria.add_row(escape(each["where"]), escape(each["says"]), difference, f"[{style}]{each['verdict']}[/]")
    return [scores, criteria]


def overview(claims: Sequence[Mapping[str, Any]]) -> Table:
    """What is claimed, what trying it takes, and what came of it."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("paper", "claim", "seeds", "minutes", "result"):
        table.add_column(name, overflow="fold", justify="right" if name in ("seeds", "minutes") else "left")
    for claim in claims:
        found = claim["result"]
        state = "never run" if found is None else f"[{STYLES[found['verdict']]}]{found['verdict']}[/]"
        made = "" if found is None else f" ({found['created'][:10]}, guerdon {found['guerdon']})"
        number, seeds, minutes = f"{claim['paper']:02d}", str(claim["seeds"]), f"{claim['minutes']:g}"
        table.add_row(number, escape(claim["says"]), seeds, minutes, state + made)
    return table


def plot(result: Mapping[str, Any]) -> str:
    """The arms' scores with 95% intervals and their seeds as ticks, one axis for each setting: an SVG image."""
    return interval_image(
        [
            (where, [(row["arm"], Interval(**row["score"]), list(row["seeds"].values())) for row in rows])
            for where, rows in groupby(result["rows"], key=lambda row: row["where"])
        ]
    )


def _metrics(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in result["rows"] for name in row["metrics"]))
