"""Chart primitives: scales, ticks, numbers as text, and marks in their places."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from reference_model.charts import (
    Chart,
    Scale,
    nice_range,
    number,
    plus_minus,
    superscript,
    tick_label,
)


def test_scales_map_their_ends_to_zero_and_one():
    linear, log = Scale(-2, 6), Scale(0.01, 100, log=True)
    assert (linear(-2), linear(2), linear(6)) == (0, 0.5, 1)
    assert log(0.01) == 0
    assert log(1) == pytest.approx(0.5, abs=1e-15)  # logarithms round
    assert log(100) == 1


def test_values_far_outside_do_not_leave_the_page():
    assert Scale(0, 1)(1e9) == 2
    assert Scale(0, 1)(-1e9) == -1
    assert Scale(1, 10, log=True)(0.0) == -1


@pytest.mark.parametrize(
    ("low", "high", "log", "message"),
    [
        (1, 1, False, r"low < high, both finite \(got 1, 1\)"),
        (0, math.nan, False, "both finite"),
        (0, 1, True, r"needs low > 0 \(got 0\)"),
    ],
)
def test_impossible_scales_are_refused(low: float, high: float, log: bool, message: str):
    with pytest.raises(ValueError, match=message):
        Scale(low, high, log)


@pytest.mark.parametrize(
    ("scale", "most", "expected"),
    [
        (Scale(0, 1), 6, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Scale(-0.34, 0.91), 4, [0, 0.5]),
        (Scale(0, 102_400), 5, [0, 25_000, 50_000, 75_000, 100_000]),
        (Scale(0.17, 0.62, log=True), 6, [0.2, 0.3, 0.5]),
        (Scale(4.4, 6.3, log=True), 6, [4.5, 5, 5.5, 6]),
        (Scale(1e-6, 1e-2, log=True), 5, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]),
    ],
)
def test_ticks_are_round_and_few(scale: Scale, most: int, expected: list[float]):
    # Products like 3 × 0.1 are off by an ulp.
    assert scale.ticks(most) == pytest.approx(expected, rel=1e-12)


def test_nice_range_leaves_air_and_skips_what_cannot_be_drawn():
    scale = nice_range([1.0, math.nan, 3.0, math.inf])
    assert scale.low < 1 < 3 < scale.high < 4
    log = nice_range([0.0, -1.0, 0.1, 0.4], log=True)
    assert 0.05 < log.low < 0.1
    assert nice_range([2.0]).low < 2 < nice_range([2.0]).high
    assert nice_range([], log=True) == Scale(1, 10, log=True)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.18723, 3, "0.187"),
        (12.34, 2, "12"),
        (1.0, 2, "1.0"),
        (0.000731, 2, "0.00073"),
        (0.0000231, 2, "2.3·10⁻⁵"),
        (12345.6, 3, "12,346"),
        (0.0, 3, "0"),
        (math.nan, 3, "–"),
    ],
)
def test_numbers_read_as_a_person_would_write_them(value: float, digits: int, text: str):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.14008, 0.0124, "0.140 ± 0.012"),
        (0.14008, 0.0088, "0.140 ± 0.009"),
        (12.754, 1.026, "12.8 ± 1.0"),
        (1234.5, 56.0, "1234 ± 56"),
        (0.5, math.nan, "0.500"),
    ],
)
def test_errors_decide_on_the_digits(value: float, error: float, text: str):
    assert plus_minus(value, error) == text


def test_tick_labels_are_short():
    labels = [tick_label(v) for v in (0, 0.05, 0.3, 2000, 25_000, 1e-5, 3e-5, -0.5)]
    assert labels == ["0", "0.05", "0.3", "2000", "25k", "10⁻⁵", "3·10⁻⁵", "-0.5"]
    assert superscript(-12) == "⁻¹²"


def test_a_chart_is_well_formed_and_puts_marks_where_the_data_are():
    chart = Chart(Scale(0, 10), Scale(0, 1), width=400, height=200)
    chart.axes("time <s>", "value & more")
    chart.line([0, 5, math.nan, 10], [0, 1, 0.5, 1], "ema")
    chart.whisker(5, 0.4, 0.6, "ema")
    chart.link(5, 0.5, "#sigma=0.1", 'say "hi"', "best")
    chart.area([0, 10], [0, 1], "ema")
    chart.band(0.2, 0.3, "raw")
    chart.stem(2, 0.5, "track0", shift=2)
    chart.diamond(1, 0.1, "predicted")
    chart.triangle(1, 0.1, "paper")
    text = chart.svg("a chart")
    ElementTree.fromstring(text)  # raises if a tag or an attribute is broken
    assert f'cx="{chart.at_x(5):g}" cy="{chart.at_y(0.5):g}"' in text
    assert (chart.at_x(0), chart.at_x(10)) == (chart.left, chart.right)
    assert (chart.at_y(0), chart.at_y(1)) == (chart.bottom, chart.top)
    path = re.search(r'line ema" d="([^"]*)"', text)
    assert path is not None
    assert path[1].count("M") == 2, "a missing value breaks the line"


@pytest.mark.parametrize(
    ("curve", "left", "above"),
    [
        ([(0, 0.9, 1), (10, 0.9, 1)], True, True),  # far away
        ([(0, 0.4, 0.6), (4, 0.4, 0.6), (6, 0, 0.1), (10, 0, 0.1)], False, True),
        ([(0, 0.5, 0.6), (10, 0.5, 0.6)], True, False),
        ([(0, 0.4, 0.6), (4, 0.4, 0.6), (6, 0.5, 0.6), (10, 0.5, 0.6)], False, False),
    ],
)
def test_the_name_of_a_level_keeps_clear_of_the_curve(
    curve: list[tuple[float, float, float]], left: bool, above: bool
) -> None:
    chart = Chart(Scale(0, 10), Scale(0, 1), width=400, height=260)
    chart.name_level(0.5, "raw weights", "note", curve)
    place = re.search(r'x="([^"]*)" y="([^"]*)"', chart.svg(""))
    assert place is not None
    assert (float(place[1]) < chart.width / 2) == left
    assert (float(place[2]) < chart.at_y(0.5)) == above
