"""The figures of an ablation's report: one line for each variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reference_model.ablate_results import Outcome
from reference_model.charts import (
    LETTER_WIDTH,
    Chart,
    Scale,
    nice_range,
    number,
    plus_minus,
    responsive,
)

COLOURS = 8
LABEL_HEIGHT = 15.0


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: Written at its right end.
        xs: Horizontal values.
        ys: Vertical values.
        style: Classes of the style sheet.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str


def style(place: int) -> str:
    """Colour of the variant at this place; beyond eight the lines are dashed as well."""
    return f"s{place % COLOURS}" + (" dashed" if place >= COLOURS else "")


def quality_chart(outcomes: Sequence[Outcome], fixed_sigma_rel: float) -> str:
    """Distance against EMA length; a dot with an error bar is the best of a variant.

    Error bars of all lengths would hide each other where there are many variants.
    """
    curves = [[score.mean for score in o.curve] for o in outcomes]
    bars = [(max(o.best.mean - o.best.error, o.best.mean / 2), o.best.mean + o.best.error)
            for o in outcomes]  # fmt: skip
    y_scale = nice_range([v for values in (*curves, *bars) for v in values], log=True)
    names = [o.name for o in outcomes]
    x_scale = nice_range([s for o in outcomes for s in o.lengths], log=True, margin=0.04)

    def draw(width: int, height: int) -> str:
        chart = _chart(x_scale, y_scale, width, height, names)
        chart.axes(
            "EMA length σ_rel (fraction of training, logarithmic)"
            if width > 500
            else "EMA length σ_rel",
            "Fréchet distance to held-out images · lower is better",
        )
        x = chart.at_x(fixed_sigma_rel)
        chart.add(
            f'<line class="stored" x1="{x:g}" y1="{chart.top}" x2="{x:g}" y2="{chart.bottom}"/>'
        )
        for place, o in enumerate(outcomes):
            colour = style(place)
            chart.line(o.lengths, curves[place], colour)
            if math.isfinite(o.best.error):
                chart.whisker(o.best_sigma_rel, *bars[place], f"{colour.split()[0]} thin")
            chart.dot(o.best_sigma_rel, o.best.mean, colour, radius=5)
        ends = [Series(o.name, o.lengths, c, style(i))
                for i, (o, c) in enumerate(zip(outcomes, curves, strict=True))]  # fmt: skip
        _labels(chart, ends)
        told = "; ".join(
            f"{o.name} {plus_minus(o.best.mean, o.best.error)} at {o.best_sigma_rel:g}"
            for o in outcomes
        )
        return chart.svg(f"Fréchet distance against EMA length. Best of each: {told}")

    return responsive(draw, wide=(960, _height(460, names)), narrow=(380, _height(360, names)))


def activation_chart(outcomes: Sequence[Outcome]) -> str:
    """Magnitude of activations against images seen."""
    return _drift_chart(_over_training(outcomes, "activation"), "mean magnitude of activations")


def weight_chart(outcomes: Sequence[Outcome]) -> str:
    """Magnitude of stored weights, relative to the start; laws of theory are dotted."""
    lines = [replace(s, ys=[y / s.ys[0] for y in s.ys]) for s in _over_training(outcomes, "weight")]
    laws = [Series("", o.drift.nimg, o.drift.law, "raw dotted") for o in outcomes if o.drift.law]
    return _drift_chart(lines, "magnitude of stored weights, relative to the start", laws)


def _over_training(outcomes: Sequence[Outcome], field: str) -> list[Series]:
    return [
        Series(o.name, o.drift.nimg, getattr(o.drift, field), style(place))
        for place, o in enumerate(outcomes)
        if o.drift.nimg
    ]


def _drift_chart(lines: Sequence[Series], label: str, laws: Sequence[Series] = ()) -> str:
    """Lines against images seen, named at their ends."""
    y_scale = nice_range([y for s in (*lines, *laws) for y in s.ys], log=True)
    end = max(x for s in lines for x in s.xs)
    names = [s.name for s in lines]

    def draw(width: int, height: int) -> str:
        chart = _chart(Scale(0, end), y_scale, width, height, names)
        chart.axes("training images seen", label)
        for series in lines:
            chart.line(series.xs, series.ys, f"{series.style} thin")
        for law in laws:
            chart.line(law.xs, law.ys, law.style)
        _labels(chart, lines)
        last = "; ".join(f"{s.name} {number(s.ys[-1])}" for s in lines)
        return chart.svg(f"{label} against images seen. At the end: {last}")

    return responsive(draw, wide=(960, _height(320, names)), narrow=(380, _height(270, names)))


def _chart(x: Scale, y: Scale, width: int, height: int, names: Sequence[str]) -> Chart:
    """Axes with room for names at the ends of lines."""
    right = round(16 + LETTER_WIDTH * max(map(len, names)))
    return Chart(x, y, width=width, height=height, right=right)


def _height(least: int, names: Sequence[str]) -> int:
    """Height of a chart that has room for all names, one below the other."""
    return max(least, round(90 + LABEL_HEIGHT * len(names)))


def _labels(chart: Chart, lines: Sequence[Series]) -> None:
    """Names at the right ends of lines, moved apart where they would overlap."""
    wanted = sorted(((chart.at_y(s.ys[-1]), s) for s in lines), key=lambda pair: pair[0])
    room = (chart.bottom - chart.top) / max(len(wanted), 1)
    step = min(LABEL_HEIGHT, room)
    at, floor = [], -math.inf
    for y, _ in wanted:
        floor = max(y, floor + step)
        at.append(floor)
    excess = max((at[-1] if at else 0.0) - chart.bottom, 0.0)
    ceiling = math.inf
    # What went below the axes goes up again, pushing those above.
    for place in reversed(range(len(at))):
        ceiling = min(at[place] - (excess if place == len(at) - 1 else 0.0), ceiling)
        at[place] = ceiling
        ceiling -= step
    for y, (_, series) in zip(at, wanted, strict=True):
        chart.text(chart.right + 8, y + 4, series.name, f"note {series.style.split()[0]}")
