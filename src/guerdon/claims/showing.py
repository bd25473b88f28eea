"""A claim's result, as plain data, for people: tables for the terminal, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from guerdon.evaluation.statistics import Interval
from guerdon.evaluation.wording import interval_text
from guerdon.report.plots import IntervalPlot

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"holds": "green", "does not hold": "red", "cannot be told": "yellow"}
CSS = """
 text { font: 12px system-ui, sans-serif; fill: #5d6671 } .title { font-weight: 600 } .cell text { font-size: 10.5px }
 circle { fill: #0b69a8 } .interval { stroke: #0b69a8; stroke-width: 2; fill: none }
 .seed { stroke: #0b69a8; opacity: .5; fill: none } .grid { stroke: #8d96a0; fill: none }
"""
NAMES = 200  # pixels left of the plots


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
            others = [f"{row['metrics'][name]:.3g}" for name in _metrics(result)]
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
    y, parts = 0, []
    for where, group in groupby(result["rows"], key=lambda row: row["where"]):
        rows = list(group)
        intervals = [Interval(**row["score"]) for row in rows]
        seeds: Sequence[list[float]] = [list(row["seeds"].values()) for row in rows]
        cells = IntervalPlot(intervals, [score for each in seeds for score in each])
        y += 22
        parts.append(_text(y - 6, where, "title"))
        for row, interval, points in zip(rows, intervals, seeds, strict=True):
            parts += [_text(y + 15, row["arm"]), _at(y, cells.row(interval, None, points))]
            y += cells.height
        parts.append(_at(y, cells.scale()))
        y += 22
    opening = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}">')
    style = Markup("<style>{}</style>").format(Markup(CSS))
    return Markup("").join([opening.format(NAMES + IntervalPlot.width, y), style, *parts, Markup("</svg>\n")])


def _metrics(result: Mapping[str, Any]) -> list[str]:
    return list(result["rows"][0]["metrics"])


def _text(y: int, text: str, css: str = "") -> Markup:
    return Markup('<text x="8" y="{}" class="{}">{}</text>').format(y, css, text)


def _at(y: int, cell: Markup) -> Markup:
    return Markup('<g transform="translate({},{})">{}</g>').format(NAMES, y, cell)
