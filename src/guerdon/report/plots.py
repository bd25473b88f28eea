"""Plots as SVG without a plotting library: light, and themed by the style sheet of the page or of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from guerdon.evaluation.statistics import Interval

COLOURS = 8  # classes c0 ... c7 of the style sheet
POINTS = 80  # of a curve; longer ones are averaged in bins
NAMES = 200  # pixels left of an image of intervals
CSS = """
 text { font: 12px system-ui, sans-serif; fill: #5d6671 } .title { font-weight: 600 } .cell text { font-size: 10.5px }
 circle { fill: #0b69a8 } .interval { stroke: #0b69a8; stroke-width: 2; fill: none }
 .seed { stroke: #0b69a8; opacity: .5; fill: none } .grid { stroke: #8d96a0; fill: none }
 .reference { stroke: #8d96a0; stroke-dasharray: 3 3; fill: none }
"""

Curve = tuple[np.ndarray, np.ndarray]  # x and y of one seed


@dataclass(frozen=True)
class Band:
    """One method's curve: the mean of its seeds, from the lowest to the highest of them."""

    label: str
    colour: int
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, label: str, colour: int, curves: Sequence[Curve]) -> Band:
        """Join the seeds' curves on the points of any of them; outside its range a seed says nothing."""
        curves = _binned(curves)
        x = np.unique(np.concatenate([curve[0] for curve in curves]))
        seeds = np.ma.masked_invalid([np.interp(x, *curve, left=np.nan, right=np.nan) for curve in curves])
        parts = (seeds.mean(0), seeds.min(0), seeds.max(0))
        return cls(label, colour, x, *(np.ma.filled(part, np.nan) for part in parts))


def line_chart(bands: Sequence[Band], *, reference: float | None = None, name: str = "") -> Markup:
    """Curves with bands; `reference` is a dashed level, the untrained start."""
    width, height, left, right, top, bottom = 360, 190, 46, 8, 8, 22
    ys = np.concatenate([np.concatenate([b.low, b.high]) for b in bands] + [np.array([reference or np.nan], float)])
    x_axis = _Axis.over(np.concatenate([b.x for b in bands]), left, width - right, pad=0.0)
    y_axis = _Axis.over(ys, height - bottom, top, pad=0.06)
    parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, name)]
    for value in y_axis.ticks(4):
        y = y_axis(value)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(left, y, width - right))
        parts.append(_text(left - 6, y + 3.5, _tick(value), "end"))
    for value in x_axis.ticks(5):
        parts.append(_text(x_axis(value), height - 6, _tick(value), "end" if x_axis(value) > width - 24 else "middle"))
    if reference is not None:
        parts.append(
            Markup('<path class="reference" d="M{} {:.1f}H{}"/>').format(left, y_axis(reference), width - right)
        )
    for b in bands:
        xs, low, high, mean = x_axis(b.x), y_axis(b.low), y_axis(b.high), y_axis(b.mean)
        if len(b.x) == 1:
            parts.append(Markup('<circle class="c{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(b.colour, xs[0], mean[0]))
            continue
        if not np.array_equal(b.low, b.high):
            outline = _points(np.concatenate([xs, xs[::-1]]), np.concatenate([high, low[::-1]]))
            parts.append(Markup('<polygon class="band c{}" points="{}"/>').format(b.colour, outline))
        parts.append(
            Markup('<polyline class="line c{}" points="{}"><title>{}</title></polyline>').format(
                b.colour, _points(xs, mean), b.label
            )
        )
    return Markup("").join([*parts, Markup("</svg>")])


class IntervalPlot:
    """Rows of intervals over one axis, a cell for each row of a table and one for the axis below them."""

    width, height = 260, 22

    def __init__(self, intervals: Sequence[Interval], points: Sequence[float] = (), reference: float | None = None):
        ends = [end for i in intervals for end in (i.low, i.high)]
        values = np.array([*ends, *points, *([] if reference is None else [reference])], float)
        self.axis = _Axis.over(values, 8, self.width - 8, pad=0.03)
        self.reference = reference

    def row(self, interval: Interval, colour: int | None, points: Sequence[float] = ()) -> Markup:
        """The interval as a line, its estimate as a dot, and `points` (the seeds) as ticks."""
        at, middle = self.axis, self.height / 2
        css = "base" if colour is None else f"c{colour}"
        parts = [self._open(self.height), self._reference_line(self.height)]
        parts += [
            Markup('<path class="seed {}" d="M{:.1f} {}v12"/>').format(css, at(point), middle - 6) for point in points
        ]
        parts.append(
            Markup(
                '<path class="interval {}" d="M{:.1f} {}H{:.1f}"/><circle class="{}" cx="{:.1f}" cy="{}" r="4"/>'
            ).format(css, at(interval.low), middle, at(interval.high), css, at(interval.value), middle)
        )
        return Markup("").join([*parts, Markup("</svg>")])

    def scale(self) -> Markup:
        """The axis."""
        parts = [self._open(18)]
        for value in self.axis.ticks(5):
            parts.append(Markup('<path class="grid" d="M{:.1f} 0v4"/>').format(self.axis(value)))
            parts.append(_text(self.axis(value), 15, _tick(value), "middle"))
        return Markup("").join([*parts, Markup("</svg>")])

    def _open(self, height: int) -> Markup:
        return Markup('<svg class="cell" viewBox="0 0 {} {}" width="{}" height="{}" aria-hidden="true">').format(
            self.width, height, self.width, height
        )

    def _reference_line(self, height: int) -> Markup:
        if self.reference is None:
            return Markup("")
        return Markup('<path class="reference" d="M{:.1f} 0v{}"/>').format(self.axis(self.reference), height)


def interval_image(
    sections: Sequence[tuple[str, Sequence[tuple[str, Interval, Sequence[float]]]]], reference: float | None = None
) -> Markup:
    """Sections of rows (name, interval, points) under a title, each over an axis of its own: an SVG image for a file.

    Args:
        reference: a dashed level in every section.
    """
    y, parts = 0, []
    for title, rows in sections:
        cells = IntervalPlot([interval for _, interval, _ in rows], [p for *_, each in rows for p in each], reference)
        if title:
            y += 22
            parts.append(Markup('<text x="8" y="{}" class="title">{}</text>').format(y - 6, title))
        for name, interval, points in rows:
            parts.append(Markup('<text x="8" y="{}">{}</text>').format(y + 15, name))
            parts.append(_at(y, cells.row(interval, None, points)))
            y += cells.height
        parts.append(_at(y, cells.scale()))
        y += 22
    opening = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}">')
    style = Markup("<style>{}</style>").format(Markup(CSS))
    return Markup("").join([opening.format(NAMES + IntervalPlot.width, y), style, *parts, Markup("</svg>\n")])


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float  # pixels
    stop: float

    @classmethod
    def over(cls, values: np.ndarray, start: float, stop: float, pad: float) -> _Axis:
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        margin = (high - low) * pad or (abs(high) * 0.1 or 0.5) * (high == low)
        return cls(low - margin, high + margin, start, stop)

    def __call__(self, value):
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round values, about `count` of them."""
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda step: abs(math.log(step / raw)))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _binned(curves: Sequence[Curve]) -> Sequence[Curve]:
    """Long curves as means over bins of x, which are the same for all of them."""
    if max(len(x) for x, _ in curves) <= POINTS:
        return curves
    edges = np.linspace(min(x.min() for x, _ in curves), max(x.max() for x, _ in curves), POINTS + 1)
    binned = []
    for x, y in curves:
        bins = np.clip(np.searchsorted(edges, x, "right") - 1, 0, POINTS - 1)
        counts = np.bincount(bins, minlength=POINTS)
        some = counts > 0
        binned.append((((edges[:-1] + edges[1:]) / 2)[some], np.bincount(bins, y, POINTS)[some] / counts[some]))
    return binned


def _points(xs: np.ndarray, ys: np.ndarray) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _at(y: int, cell: Markup) -> Markup:
    return Markup('<g transform="translate({},{})">{}</g>').format(NAMES, y, cell)


def _tick(value: float) -> str:
    value = 0.0 if abs(value) < 1e-12 else value
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.6g}"
