from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from guerdon.evaluation.statistics import Interval
from guerdon.report.plots import POINTS, Band, IntervalPlot, _Axis, line_chart


def test_a_band_goes_from_the_lowest_to_the_highest_seed():
    x = np.array([1.0, 2.0, 3.0])
    band = Band.of("a", 0, [(x, np.array([0.0, 1.0, 2.0])), (x, np.array([2.0, 3.0, 6.0]))])
    np.testing.assert_allclose(band.mean, [1, 2, 4])
    np.testing.assert_allclose(band.low, [0, 1, 2])
    np.testing.assert_allclose(band.high, [2, 3, 6])


def test_seeds_of_other_lengths_and_steps_join_without_inventing_values():
    band = Band.of("a", 0, [(np.array([0.0, 10]), np.array([0.0, 10])), (np.array([5.0]), np.array([100.0]))])
    np.testing.assert_allclose(band.x, [0, 5, 10])
    np.testing.assert_allclose(band.mean, [0, 52.5, 10])
    np.testing.assert_allclose(band.high, [0, 100, 10])


def test_long_curves_are_averaged_in_bins():
    x = np.arange(10_000.0)
    band = Band.of("a", 0, [(x, 2 * x), (x[:5000], 2 * x[:5000])])
    assert len(band.x) == POINTS
    np.testing.assert_allclose(band.mean, 2 * band.x, atol=2)


def test_charts_are_well_formed_and_to_scale():
    x = np.array([0.0, 50.0, 100.0])
    bands = [Band.of("<b>&", 1, [(x, np.array([0.0, 0.5, 1.0])), (x, np.array([0.2, 0.5, 0.8]))])]
    svg = line_chart(bands, reference=0.25, name='"quoted"')
    root = ElementTree.fromstring(svg)
    assert root.find("./polyline/title").text == "<b>&"
    points = [tuple(map(float, p.split(","))) for p in root.find("./polyline").get("points").split()]
    xs, ys = zip(*points, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] > ys[1] > ys[2]
    reference = float(re.search(r'class="reference" d="M\d+ ([\d.]+)', svg).group(1))
    assert ys[1] < reference < ys[0]
    assert len(root.findall("./polygon")) == 1


def test_constant_curves_have_a_scale():
    band = Band.of("a", 0, [(np.array([1.0, 2.0]), np.array([0.0, 0.0]))])
    ElementTree.fromstring(line_chart([band]))


def test_intervals_share_their_axis():
    plot = IntervalPlot([Interval(0.5, 0.4, 0.6), Interval(0.2, 0.1, 0.3)], reference=0.1)
    first, second = (
        ElementTree.fromstring(plot.row(i, 0, [i.value])) for i in (Interval(0.5, 0.4, 0.6), Interval(0.2, 0.1, 0.3))
    )
    at = [float(svg.find("./circle").get("cx")) for svg in (first, second)]
    left = float(re.search(r"M([\d.]+)", second.find("./path[@class='interval c0']").get("d")).group(1))
    reference = float(re.search(r"M([\d.]+)", first.find("./path[@class='reference']").get("d")).group(1))
    assert left == reference < at[1] < at[0]
    ElementTree.fromstring(plot.scale())


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (0.001, 0.0013), (0, 2_500_000)])
def test_ticks_are_round_and_inside(low, high):
    ticks = _Axis(low, high, 0, 100).ticks(4)
    assert 2 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    np.testing.assert_allclose(np.diff(ticks), np.diff(ticks)[0], rtol=1e-6)
