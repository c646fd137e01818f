"""The figures of the report, each from a sweep record or a run's statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posthoc_ema import PowerFunction
from reference_model.charts import (
    Chart,
    Scale,
    nice_range,
    number,
    plus_minus,
    responsive,
    tick_label,
)
from reference_model.metrics import mean_and_error
from reference_model.sweep_record import Measurement, SweepRecord, clearly_worse

EXACT = 1e-7
"""Errors below this are none: the length is one that snapshots hold."""

FAR = 4
"""A level lower than the best by more than this factor is told in words, not drawn."""


def state_link(measurement: Measurement) -> str:
    """Address of the page with this EMA length selected."""
    return f"#sigma={measurement.sigma_rel:g}"


def length_scale(record: SweepRecord) -> Scale:
    """Logarithmic scale over the EMA lengths measured."""
    return nice_range([m.sigma_rel or 0.0 for m in record.averages], log=True, margin=0.04)


def length_ticks(chart: Chart) -> list[float]:
    """Ticks of a length axis, fewer where it is short."""
    wanted = [0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.28]
    if chart.width < 500:
        wanted = [0.005, 0.01, 0.02, 0.05, 0.1, 0.25]
    return [v for v in wanted if chart.x.low <= v <= chart.x.high]


def quality_chart(record: SweepRecord) -> str:
    """Distance against EMA length, with repeats, error bars and the levels to compare with."""
    averages, raw, best = record.averages, record.raw, record.best
    assert best is not None  # the report draws this only where there are averages
    equal = [m for m in averages if not clearly_worse(m, best)]
    real = record.real if record.real and min(record.real) > best.distance / FAR else ()
    levels = [*real, *(raw.distances if raw else ())]
    y_scale = nice_range([*levels, *(d for m in averages for d in m.distances)], log=True)
    marks = [(m.sigma_rel or 0.0, min(m.distances), max(m.distances)) for m in averages]

    def draw(width: int, height: int) -> str:
        wide = width > 500
        chart = Chart(
            length_scale(record), y_scale, width=width, height=height, right=150 if wide else 12
        )
        chart.axes(
            "EMA length σ_rel (fraction of training, logarithmic)" if wide else "EMA length σ_rel",
            "Fréchet distance to held-out images · lower is better"
            if wide
            else "Fréchet distance · lower is better",
            x_ticks=length_ticks(chart),
        )
        for name, values, style in (
            ("raw weights", raw.distances if raw else (), "raw"),
            ("real images", real, "real"),
        ):
            if values:
                mean, error = mean_and_error(values)
                if math.isfinite(error):
                    chart.band(max(mean - error, mean * 0.5), mean + error, style)
                chart.level(mean, f"{style} dashed")
                y, note = chart.at_y(mean), f"note {style}"
                if wide:
                    chart.text(chart.right + 8, y - 2, name, note)
                    chart.text(chart.right + 8, y + 14, number(mean), note)
                else:
                    chart.name_level(mean, f"{name} {number(mean)}", note, marks)

        xs = [m.sigma_rel or 0.0 for m in averages]
        for repeat in range(len(best.distances)):
            chart.line(xs, [m.distances[repeat] for m in averages], "ema repeat")
        chart.line(xs, [m.distance for m in averages], "ema")
        for i, m in enumerate(averages):
            x = m.sigma_rel or 0.0
            if math.isfinite(m.error):
                chart.whisker(x, m.distance - m.error, m.distance + m.error, "ema")
            chart.group(i)
            chart.dot(x, m.distance, "selected", radius=9)
            chart.end_group()
            hint = f"σ_rel {x:g}: distance {plus_minus(m.distance, m.error)}"
            chart.link(x, m.distance, state_link(m), hint, "best" if m is best else "ema")
        x, y = chart.at_x(best.sigma_rel or 0.0), chart.at_y(min(best.distances))
        chart.text(x, y + 26, f"best: {best.sigma_rel:.4g}", "note ema strong", anchor="middle")
        first, last = equal[0].sigma_rel or 0.0, equal[-1].sigma_rel or 0.0
        place = f"M{chart.at_x(first):g} {chart.bottom}H{chart.at_x(last):g}"
        chart.add(f'<path class="equal" d="{place}"/>')
        return chart.svg(
            f"Fréchet distance against EMA length: lowest, {number(best.distance)}, at "
            f"{best.sigma_rel:.4g}" + (f"; raw weights {number(raw.distance)}" if raw else "")
        )

    return responsive(draw, wide=(960, 420), narrow=(380, 330))


def profile_chart(record: SweepRecord) -> str:
    """What each EMA length weights over training, and where snapshots lie."""
    averages = record.averages
    # Powers of τ are steep near either end: sample there more densely.
    tau = (1 - np.cos(np.linspace(0, np.pi, 161))) / 2

    def draw(width: int, height: int) -> str:
        chart = Chart(Scale(0, 1), Scale(0, 1.08), width=width, height=height, right=18)
        chart.axes(
            "training progress",
            "weight in the average, relative to the newest weights",
            x_ticks=[0, 0.2, 0.4, 0.6, 0.8, 1],
            y_ticks=[0, 0.5, 1],
            format_x=lambda v: f"{100 * v:.0f} %",
        )
        curves = []
        for m in averages:
            density = PowerFunction(sigma_rel=m.sigma_rel).density(tau, 1.0)
            curves.append((density / density[-1]).tolist())
        for curve in curves:
            chart.line(tau.tolist(), curve, "other")
        for i, (m, curve) in enumerate(zip(averages, curves, strict=True)):
            profile = PowerFunction(sigma_rel=m.sigma_rel)
            low, middle, high = (
                chart.at_x(min(max(profile.mean_rel + k * profile.sigma_rel, 0), 1))
                for k in (-1, 0, 1)
            )
            y = chart.at_y(0.42)
            chart.group(i)
            chart.area(tau.tolist(), curve, "ema")
            chart.line(tau.tolist(), curve, "ema")
            chart.add(f'<path class="line bar" d="M{low:g} {y:g}H{high:g}"/>')
            chart.add(f'<circle class="dot bar" cx="{middle:g}" cy="{y:g}" r="4"/>')
            chart.text(
                low - 8,
                y + 4,
                f"mean {profile.mean_rel:.2f} ± {m.sigma_rel:g}",
                "note",
                anchor="end",
            ) if low > chart.left + 120 else chart.text(
                middle,
                y - 12,
                f"mean {profile.mean_rel:.2f} ± {m.sigma_rel:g}",
                "note",
                anchor="middle",
            )
            chart.end_group()
        for t in sorted({t for t, _ in record.inputs_at(record.end)}):
            chart.tick_mark(t / record.end, "snapshot")
        return chart.svg("Averaging profiles over training, one for each EMA length")

    return responsive(draw, wide=(960, 300), narrow=(380, 260))


def coefficient_chart(record: SweepRecord) -> str:
    """The multipliers of the snapshots, one set for each EMA length."""
    inputs = record.inputs_at(record.end)
    tracks, end = sorted({sigma_rel for _, sigma_rel in inputs}), record.end

    def draw(width: int, height: int) -> str:
        parts = []
        for i, m in enumerate(record.averages):
            # Square roots: the last snapshots' multipliers would hide all the others.
            high = signed_root(max(0.25, *m.coefficients)) * 1.1
            low = signed_root(min(-0.25, *m.coefficients)) * 1.1
            chart = Chart(Scale(0, 1), Scale(low, high), width=width, height=height, right=18)
            ticks = [0, 1, -1, 0.25, -0.25, 10, -10, 3, -3, 30, -30, 100, -100]
            chart.axes(
                "training progress",
                "coefficient of each snapshot (root scale)",
                x_ticks=[0, 0.2, 0.4, 0.6, 0.8, 1],
                y_ticks=chart.spaced([signed_root(v) for v in ticks]),
                format_y=lambda v: tick_label(math.copysign(v * v, v)),
                format_x=lambda v: f"{100 * v:.0f} %",
            )
            chart.level(0.0, "axis")
            for (t, sigma_rel), c in zip(inputs, m.coefficients, strict=True):
                k = tracks.index(sigma_rel)
                # Tracks of the same time stand side by side.
                shift = (k - (len(tracks) - 1) / 2) * 4.0
                chart.stem(t / end, signed_root(c), f"track{k % 4}", shift)
            picture = chart.svg(f"Coefficients for EMA length {m.sigma_rel:g}")
            parts.append(f'<div class="state" data-state="{i}">{picture}</div>')
        return "".join(parts)

    return responsive(draw, wide=(960, 240), narrow=(380, 220))


def signed_root(value: float) -> float:
    """Square root of the size, with the sign."""
    return math.copysign(math.sqrt(abs(value)), value)


def error_chart(record: SweepRecord) -> str:
    """Predicted and true error of reconstruction against EMA length."""
    averages = record.averages
    checked = [m for m in averages if m.direct is not None]
    series: dict[str, list[tuple[float, float]]] = {
        "predicted": [(m.sigma_rel or 0.0, m.predicted_error or math.nan) for m in averages],
        "true": [(m.sigma_rel or 0.0, m.direct.error) for m in checked if m.direct],
        "paper": [(m.sigma_rel or 0.0, m.direct.paper_error) for m in checked if m.direct],
        "raw": [(m.sigma_rel or 0.0, m.from_raw or math.nan) for m in averages],
    }
    stored = sorted({sigma_rel for _, sigma_rel in record.inputs})
    shown = {
        name: [(x, y) for x, y in points if y > EXACT and math.isfinite(y)]
        for name, points in series.items()
    }
    y_scale = nice_range([y for points in shown.values() for _, y in points], log=True)

    def draw(width: int, height: int) -> str:
        chart = Chart(length_scale(record), y_scale, width=width, height=height, right=18)
        chart.axes(
            "EMA length σ_rel",
            "RMS error of the weights, relative to their RMS",
            x_ticks=length_ticks(chart),
            format_y=lambda v: f"{tick_label(100 * v)} %",
        )
        for sigma_rel in stored:
            if chart.x.low <= sigma_rel <= chart.x.high:
                x = chart.at_x(sigma_rel)
                chart.add(
                    f'<line class="stored" x1="{x:g}" y1="{chart.top}" x2="{x:g}" '
                    f'y2="{chart.bottom}"/>'
                )
                if width > 500:
                    chart.text(x + 5, chart.top + 10, f"stored {sigma_rel:g}", "note small")
        chart.line(*_xy(shown["raw"]), "raw dotted")
        chart.line(*_xy(shown["predicted"]), "predicted dashed")
        chart.line(*_xy(shown["paper"]), "paper thin")
        for x, y in shown["paper"]:
            chart.triangle(x, y, "paper")
        for x, y in shown["predicted"]:
            chart.diamond(x, y, "predicted")
        for i, m in enumerate(averages):
            error = m.direct.error if m.direct else math.nan
            if error > EXACT:
                chart.group(i)
                chart.dot(m.sigma_rel or 0.0, error, "selected", radius=9)
                chart.end_group()
                hint = f"σ_rel {m.sigma_rel:g}: true error {percent(error)}"
                chart.link(m.sigma_rel or 0.0, error, state_link(m), hint, "ema")
        return chart.svg("Predicted and true error of reconstruction against EMA length")

    return responsive(draw, wide=(960, 330), narrow=(380, 300))


def loss_chart(stats: Sequence[Mapping[str, Any]]) -> str:
    """Training loss against images seen."""
    xs = [float(line["nimg"]) for line in stats]
    ys = [float(line["loss"]) for line in stats]
    # The first lines tower over the rest: start the axis where the bulk lies.
    top = float(np.quantile(ys, 0.95)) if len(ys) > 20 else max(ys)
    y_scale = nice_range([y for y in ys if y <= top])

    def draw(width: int, height: int) -> str:
        chart = Chart(Scale(0, max(xs)), y_scale, width=width, height=height, right=24)
        chart.axes("training images seen", "training loss")
        kept = [(x, y) for x, y in zip(xs, ys, strict=True) if y <= top]
        chart.line(*_xy(kept), "ema thin")
        return chart.svg("Training loss against images seen")

    return responsive(draw, wide=(960, 240), narrow=(380, 220))


def percent(value: float) -> str:
    """A fraction as a percentage, two significant digits."""
    return f"{number(100 * value, 2)} %"


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
