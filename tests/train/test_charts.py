"""Charts: places, ticks and smoothing against formulas written here; SVG that is well formed."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorakit.train.report.charts import (
    MOST_POINTS,
    Frame,
    Grid,
    Series,
    bar_chart,
    heat_map,
    label,
    line_chart,
    padded,
    smooth,
    thinned,
    ticks,
)

finite = st.floats(-1e9, 1e9)


@given(finite, finite, st.integers(2, 12))
def test_ticks_are_round_inside_and_few(a: float, b: float, most: int) -> None:
    low, high = min(a, b), max(a, b)
    assume(high - low > 1e-6 * max(1.0, abs(high)))
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most
    span = high - low
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)
    if len(found) > 1:
        pace = found[1] - found[0]
        mantissa = pace / 10 ** math.floor(math.log10(pace) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3


def test_ticks_of_nothing() -> None:
    assert ticks(1.0, 1.0) == [1.0]
    assert ticks(0, 80, 9) == [0, 10, 20, 30, 40, 50, 60, 70, 80]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.5, "1.5"), (0.001, "1e-3"), (0.00125, "1.25e-3"), (1234.6, "1,235"), (2e7, "2e7"),
     (-0.5, "-0.5"), (0.25, "0.25")],
)  # fmt: skip
def test_labels(value: float, text: str) -> None:
    assert label(value) == text


def test_a_frame_places_its_corners() -> None:
    frame = Frame(200, 100, (10, 20), (0, 1), left=30, right=10, top=5, bottom=15)
    assert (frame.x(10), frame.x(20)) == (30, 190)
    assert (frame.y(0), frame.y(1)) == (85, 5)
    assert Frame(200, 100, (0, 0), (1, 1)).y(1) == pytest.approx(42)  # the middle


def test_smoothing_is_the_mean_under_a_bell() -> None:
    points = [(float(i), float(i % 3)) for i in range(40)]
    sigma = 2.0
    found = smooth(points, share=sigma / len(points))
    for i, (x, y) in enumerate(found):
        near = [j for j in range(40) if abs(i - j) <= 6]  # three deviations
        weights = [math.exp(-((i - j) ** 2) / (2 * sigma**2)) for j in near]
        expected = sum(w * points[j][1] for w, j in zip(weights, near, strict=True)) / sum(weights)
        assert x == points[i][0]
        assert y == pytest.approx(expected, rel=1e-12)  # float64 sums of thirteen numbers


@given(st.lists(st.floats(-10, 10), max_size=60))
def test_smoothing_stays_within_the_values_and_keeps_a_constant(values: list[float]) -> None:
    points = list(enumerate(values))
    found = [y for _, y in smooth(points)]
    assert len(found) == len(values)
    assert all(min(values) - 1e-9 <= y <= max(values) + 1e-9 for y in found)


def test_long_series_stay_small_and_keep_their_peaks() -> None:
    values = [math.sin(i / 500) for i in range(20_000)]
    values[12_345] = 7.0
    points = [(float(i), y) for i, y in enumerate(values)]
    assert len(smooth(points)) == MOST_POINTS
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert (12_345.0, 7.0) in kept
    assert list(kept) == sorted(kept)
    assert thinned(points[:50]) == points[:50]


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in parsed(svg).iter() if node.tag == "text"]


def test_a_line_chart_is_well_formed_and_lies_in_its_frame() -> None:
    points = [(0.0, 2.5), (40.0, 1.5), (80.0, 1.25)]
    frame = Frame(960, 380, (0, 80), padded(1.25, 2.5))
    svg = line_chart(
        'Loss "over" <steps>',
        [Series(points, "train"), Series(points, "valid", markers=True)],
        frame,
        levels=[(2.5, "the base <b>")],
        best=(80.0, 1.25, "best 1.250"),
    )
    root = parsed(svg)
    assert root.attrib["aria-label"] == 'Loss "over" <steps>'
    assert "the base <b>" in texts(svg)
    assert "best 1.250" in texts(svg)
    line = next(node for node in root.iter("polyline") if node.attrib["class"] == "train")
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert places[0][0] == pytest.approx(frame.x(0), abs=0.05)
    assert places[2][1] == pytest.approx(frame.y(1.25), abs=0.05)
    assert all(0 <= x <= 960 and 0 <= y <= 380 for x, y in places)
    assert len([n for n in root.iter("circle") if n.attrib["class"] == "validdot"]) == 3


def test_a_heat_map_has_a_cell_per_value_and_the_means_of_its_rows() -> None:
    values = {("q", "0"): 1.0, ("q", "1"): 3.0, ("v<", "1"): 2.0}
    grid = Grid(("q", "v<"), ("0", "1"), values, {place: f"{place}" for place in values})
    svg = heat_map("norms", grid)
    cells = [float(n.attrib["fill-opacity"]) for n in parsed(svg).iter("rect")]
    assert cells == pytest.approx([0.08, 1.0, 0.54])
    starts = sorted({float(n.attrib["x"]) for n in parsed(svg).iter("rect")})
    assert starts[1] - starts[0] == pytest.approx(90)  # few columns stay beside each other
    assert max(starts) + 90 < min(
        float(n.attrib["x"]) for n in parsed(svg).iter("text") if n.attrib["class"] == "value"
    )
    assert [t for t in texts(svg) if t == "2"] == ["2", "2"]  # both rows have mean 2


def test_bars() -> None:
    frame = Frame(470, 190, (0, 1), (0, 10))
    svg = bar_chart("lengths", [("1", 10.0, "ten"), ("5", 0.0, "none")], frame)
    heights = [float(n.attrib["height"]) for n in parsed(svg).iter("rect")]
    assert heights == pytest.approx([190 - 30 - 14, 0])
