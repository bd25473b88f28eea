"""A comparison in words and as a table: the verdict in sentences, numbers as people write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from guerdon.evaluation.comparison import BASE, Against, Comparison, Row
from guerdon.evaluation.metrics import kind_of
from guerdon.evaluation.statistics import Difference, Interval

if TYPE_CHECKING:
    from rich.table import Table


def verdict(comparison: Comparison) -> list[str]:
    """Plain sentences, the most important one first."""
    methods, pairs, primary = comparison.methods, comparison.pairs, comparison.primary
    if not methods:
        return ["No method has a finished trial: nothing can be said yet.", *_reservations(comparison)]
    said = []
    single = [row.label for row in methods if len(row.seeds) == 1]
    if single:
        who = "One seed per method" if len(single) == len(methods) else f"One seed of {_and(single)}"
        said.append(
            f"{who} is no result about the method: it speaks of the policies trained here, "
            "and the intervals cover the choice of held-out items only."
        )
    best, *others = methods
    score = f"{comparison.kind.label} {interval_text(best.metrics[primary])}"
    over = f"over {_count(len(best.seeds), 'seed')} and {_count(best.scores.shape[1], 'held-out item')}"
    rivals = [row for row in others if not pairs[best.label, row.label].distinguishable]
    beaten = [row for row in others if row not in rivals]

    def gaps(rows: list[Row]) -> str:
        return _and([f"{row.label} by {interval_text(pairs[best.label, row.label].difference)}" for row in rows])

    if not others:
        said.append(f"{best.label} reaches {score} {over}.")
    elif not rivals:
        said.append(f"{best.label} is best: {score} {over}, ahead of {gaps(beaten)}.")
    else:
        said.append(
            f"{best.label} has the best mean, {score} {over}, but cannot be told apart from "
            f"{_and([row.label for row in rivals])} at this budget: it is ahead of {gaps(rivals)}."
        )
        said += [f"{best.label} against {row.label}: {_would_do(pairs[best.label, row.label])}" for row in rivals]
        if beaten:
            said.append(f"{best.label} is better than {gaps(beaten)}.")
    return said + _against_start(comparison) + _reservations(comparison)


def tables(comparison: Comparison) -> list[Table]:
    """The comparison for the terminal: the primary metric with its intervals, then everything else and the cost."""
    from rich.markup import escape
    from rich.table import Table

    best = comparison.methods[0] if comparison.methods else None
    label = comparison.kind.label
    scores = Table(title=f"{label} on held-out items, with 95% intervals")
    for name in ("method", "seeds", label, "IQM", "behind the best", "P(best is better)"):
        scores.add_column(name, justify="left" if name == "method" else "right")
    costs = ("tokens", "samples", "wall", "CPU", "memory")
    details: dict[str, list[str]] = {name: [] for name in (*shared_metrics(comparison), *costs)}
    rest = Table("", title="means and cost of a trial")
    for row in comparison.rows:
        total = len(row.seeds) + len(row.failed) + len(row.waiting)
        count = str(len(row.seeds)) if len(row.seeds) == total else f"{len(row.seeds)} of {total}"
        name = "untrained start" if row.method is None else row.label
        if not row.seeds:
            scores.add_row(escape(name), count, "[red]failed[/]" if row.failed else "waiting")
            continue
        against = comparison.pairs.get((best.label, row.label)) if best else None
        scores.add_row(
            escape(name) + (" [red](failed trials)[/]" if row.failed else ""),
            count,
            interval_text(row.metrics[comparison.primary]),
            interval_text(row.iqm) if row.iqm else "",
            "" if against is None else interval_text(against.difference) + ("" if against.distinguishable else " (?)"),
            "" if against is None else interval_text(against.above),
        )
        rest.add_column(escape(name), justify="right")
        values = [number_text(row.metrics[n].value) if n in row.metrics else "" for n in shared_metrics(comparison)]
        for cells, value in zip(details.values(), [*values, *cost_texts(row.cost)], strict=True):
            cells.append(value)
    for name, cells in details.items():
        if any(cells):  # who learns from logged data has sampled nothing
            rest.add_row(kind_of(name).label, *cells)
    if any(not against.distinguishable for against in comparison.pairs.values()):
        scores.caption = "(?) cannot be told from the best at this budget"
    return [scores, rest]


def shared_metrics(comparison: Comparison) -> list[str]:
    """The metrics that at least one row has, in the order of the evaluations."""
    return list(dict.fromkeys(name for row in comparison.rows for name in row.metrics))


def number_text(value: float) -> str:
    """Three decimals below 10, whole numbers from 1,000, three digits between."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval_text(interval: Interval | Difference) -> str:
    return f"{number_text(interval.value)} [{number_text(interval.low)}, {number_text(interval.high)}]"


def cost_texts(cost: Mapping[str, float]) -> list[str]:
    """Tokens, samples, wall, CPU and memory in words; empty where a trial did not say."""

    def count(name: str) -> str:
        value = cost.get(name)
        return "" if value is None else f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value:,.0f}"

    def seconds(name: str) -> str:
        value = cost.get(name)
        if value is None:
            return ""
        return f"{value:.1f} s" if value < 100 else f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"

    memory = f"{cost['memory'] / 2**30:.2f} GiB" if "memory" in cost else ""
    return [count("tokens"), count("samples"), seconds("wall"), seconds("cpu"), memory]


def _against_start(comparison: Comparison) -> list[str]:
    start = comparison.rows[0]
    if not start.seeds:
        return []
    improved: list[str] = []
    same: list[str] = []
    worse: list[str] = []
    for row in comparison.methods:
        above = comparison.pairs.get((row.label, BASE))
        against = above or comparison.pairs[BASE, row.label]
        (same if not against.distinguishable else improved if above else worse).append(row.label)
    at = f"the untrained start ({interval_text(start.metrics[comparison.primary])})"
    said = []
    if improved:
        said.append(f"{_and(improved)} {'improves' if len(improved) == 1 else 'improve'} on {at}.")
    if same:
        said.append(f"{_and(same)} cannot be told apart from {at}.")
    if worse:
        said.append(f"{_and(worse)} {'is' if len(worse) == 1 else 'are'} worse than {at}.")
    return said


def _reservations(comparison: Comparison) -> list[str]:
    said = []
    for row in comparison.rows:
        total = len(row.seeds) + len(row.failed) + len(row.waiting)
        if row.failed and row.seeds:
            said.append(
                f"{len(row.failed)} of {total} trials of {row.label} failed; its score rests on the others and may "
                "flatter it."
            )
        elif row.failed:
            said.append(f"{'Every trial' if total > 1 else 'The trial'} of {row.label} that ran has failed.")
    waiting = sum(len(row.waiting) for row in comparison.rows)
    if waiting:
        said.append(f"{_count(waiting, 'trial')} not finished: this is a view of what there is.")
    if not comparison.settings["budget"]:
        said.append("No common budget was set: each method ran to its own end, and the costs differ.")
    if comparison.looks:
        counts = ", ".join(str(look["seeds"]) for look in comparison.looks)
        said.append(
            f"The comparison was enlarged after an earlier look (seeds then: {counts}); "
            "the intervals do not account for having looked."
        )
    return said


def _would_do(against: Against) -> str:
    d, would_do = against.difference, against.needed
    assert would_do is not None
    if not d.trained:
        return "at least two seeds each are needed before anything can be said about the methods."
    seeds = f"{would_do.seeds:,} seeds at these {d.items:,} items" if would_do.seeds else ""
    items = f"{would_do.items:,} items at these {_count(d.seeds, 'seed')}" if would_do.items else ""
    if not seeds and not items:
        return "no feasible number of seeds or items would tell a difference as small as the one seen."
    lead = f"if the true difference is the one seen, about {' or '.join(filter(None, [seeds, items]))} would be needed"
    if not items:
        return f"{lead}; more items alone cannot help, the spread between seeds dominates."
    if not seeds:
        return f"{lead}; more seeds alone cannot help, the held-out items are too few."
    return f"{lead} (power 0.8)."


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
