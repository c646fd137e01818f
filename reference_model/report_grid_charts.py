"""Figures of what a sweep measured beyond one curve: times, guidance, single tensors, measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from reference_model.charts import (
    Chart,
    Scale,
    nice_range,
    number,
    plus_minus,
    responsive,
    tick_label,
)
from reference_model.report_charts import length_ticks
from reference_model.sweep_record import Measurement, paired_difference

AGES = 6
"""Shades that the style sheet has for curves in order, the last the strongest."""


def age(k: int, count: int) -> str:
    """Class of the k-th of `count` curves."""
    return f"age{AGES - 1 - round((count - 1 - k) * (AGES - 1) / max(count - 1, 1))}"


def curves_chart(curves: Mapping[str, Sequence[Measurement]], description: str) -> str:
    """Distance against EMA length, a line for each name, its lowest point marked.

    Args:
        curves: By name, the most important last; each in order of length.
        description: For those who cannot see it.
    """
    measured = [m for curve in curves.values() for m in curve]
    x_scale = nice_range([m.sigma_rel or 0.0 for m in measured], log=True, margin=0.04)
    y_scale = nice_range([d for m in measured for d in m.distances], log=True)

    def draw(width: int, height: int) -> str:
        wide = width > 500
        chart = Chart(x_scale, y_scale, width=width, height=height, right=150 if wide else 60)
        chart.axes(
            "EMA length σ_rel (fraction of training, logarithmic)" if wide else "EMA length σ_rel",
            "Fréchet distance · lower is better",
            x_ticks=length_ticks(chart),
        )
        taken: list[float] = []
        for k, (name, curve) in reversed(list(enumerate(curves.items()))):
            style = age(k, len(curves))
            best = min(curve, key=lambda m: m.distance)
            xs = [m.sigma_rel or 0.0 for m in curve]
            chart.line(xs, [m.distance for m in curve], f"ema {style}")
            for x, m in zip(xs, curve, strict=True):
                if math.isfinite(m.error):
                    low, high = m.distance - m.error, m.distance + m.error
                    chart.whisker(x, low, high, f"ema thin {style}")
                chart.dot(x, m.distance, style, radius=2.5)
            chart.diamond(best.sigma_rel or 0.0, best.distance, f"optimum {style}")
            # Names at the ends of lines, moved apart where lines end close together.
            y = chart.at_y(curve[-1].distance) + 4
            while any(abs(y - other) < 15 for other in taken):
                y += 1
            taken.append(y)
            text = f"{name}: {best.sigma_rel:.3g}" if wide else name
            chart.text(chart.at_x(xs[-1]) + 9, y, text, "note ema")
        return chart.svg(description)

    return responsive(draw, wide=(960, 400), narrow=(380, 330))


def measure_chart(
    averages: Sequence[Measurement], raw_weights: Measurement | None, measure: str
) -> str:
    """A measure against EMA length, with error bars and the raw weights' level.

    Args:
        averages: In order of length; those that have the measure are drawn.
        raw_weights: Of the same time, if they were measured.
        measure: Name of the measure.
    """
    averages = [m for m in averages if measure in m.scores]
    points = [(m.sigma_rel or 0.0, *m.mean(measure)) for m in averages]
    raw = raw_weights.mean(measure)[0] if raw_weights is not None else math.nan
    x_scale = nice_range([x for x, _, _ in points], log=True, margin=0.04)
    y_scale = nice_range([raw, *(v for m in averages for v in m.scores[measure])])
    chart = Chart(x_scale, y_scale, width=460, height=260)
    chart.axes("EMA length σ_rel", measure, x_ticks=length_ticks(chart))
    if math.isfinite(raw):
        chart.level(raw, "raw dashed")
        bars = [(x, e if math.isfinite(e) else 0.0, y) for x, y, e in points]
        marks = [(x, y - error, y + error) for x, error, y in bars]
        chart.name_level(raw, "raw weights", "note raw", marks)
    chart.line([x for x, _, _ in points], [y for _, y, _ in points], "ema")
    for x, y, error in points:
        if math.isfinite(error):
            chart.whisker(x, y - error, y + error, "ema")
        chart.dot(x, y, "ema", radius=3)
    return f'<div class="chart">{chart.svg(f"{measure} against EMA length")}</div>'


def sensitivity_chart(
    base: Measurement, changes: Mapping[str, Sequence[Measurement]], measure: str
) -> str:
    """How a measure changes where one group of tensors has another length, a row for each group.

    Args:
        base: The same length for all tensors.
        changes: Measurements by group of tensors, each of one other length.
        measure: Name of the measure.
    """
    scale = 100 / abs(base.mean(measure)[0])
    lengths = sorted({length for group in changes.values() for m in group
                      for _, length in m.point.changed})  # fmt: skip
    rows = [
        [(m.point.changed[0][1], *paired_difference(m, base, measure)) for m in group]
        for group in changes.values()
    ]
    ends = [
        scale * (change + sign * (error if math.isfinite(error) else 0.0))
        for row in rows
        for _, change, error in row
        for sign in (-1, 1)
    ]
    names = [name.removeprefix("unet.").removesuffix(".*") for name in changes]
    count = len(names)

    def draw(width: int, height: int) -> str:
        chart = Chart(
            nice_range([0.0, *ends]),
            Scale(-0.6, count - 0.4),
            width=width,
            height=height,
            left=190 if width > 500 else 132,
            right=24,
        )
        chart.axes(
            f"change of {measure}, % (left of zero: better)",
            "tensors",
            y_ticks=[count - 1 - k for k in range(count)],
            format_y=lambda v: _shortened(names[count - 1 - round(v)], 26 if width > 500 else 17),
        )
        x = chart.at_x(0.0)
        chart.add(
            f'<line class="axis" x1="{x:g}" y1="{chart.top}" x2="{x:g}" y2="{chart.bottom}"/>'
        )
        for k, row in enumerate(rows):
            for length, change, error in row:
                kind = lengths.index(length)
                # Lengths side by side within a row.
                y = (
                    count
                    - 1
                    - k
                    + 0.22 * ((len(lengths) - 1) / 2 - kind) * 2 / max(len(lengths), 1)
                )
                if math.isfinite(error):
                    low, high = (chart.at_x(scale * (change + s * error)) for s in (-1, 1))
                    at = chart.at_y(y)
                    chart.add(f'<path class="line track{kind % 4}" d="M{low:g} {at:g}H{high:g}"/>')
                mark = chart.dot if length < (base.sigma_rel or 0.0) else chart.diamond
                mark(scale * change, y, f"track{kind % 4}")
        return chart.svg(f"Change of {measure} with the length of single groups of tensors")

    return responsive(draw, wide=(960, 90 + 26 * count), narrow=(380, 90 + 26 * count))


def guidance_table(
    rows: Mapping[float, Mapping[float, Measurement]], strengths: Sequence[float], best: Measurement
) -> str:
    """Strength × EMA length as a table whose cells are shaded, the lower the distance the more.

    Args:
        rows: Measurements by EMA length, then by strength.
        strengths: Of the columns; 1 is no guidance.
        best: Lowest of all tables, outlined.
    """
    values = [math.log(m.distance) for row in rows.values() for m in row.values()]
    low, span = min(values), (max(values) - min(values)) or 1.0
    head = "".join(f'<th scope="col">w = {w:g}</th>' for w in strengths)
    lines = []
    for sigma_rel, row in rows.items():
        cells = []
        for w in strengths:
            m = row.get(w)
            if m is None:
                cells.append("<td></td>")
                continue
            shade = 1 - (math.log(m.distance) - low) / span
            kind = ' class="lowest"' if m is best else ""
            hint = plus_minus(m.distance, m.error)
            cells.append(
                f'<td{kind} style="--q:{shade:.2f}" title="{hint}">{number(m.distance)}'
                f"<small>± {number(m.error, 2)}</small></td>"
            )
        lines.append(f'<tr><th scope="row">{tick_label(sigma_rel)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="heat"><tr><th scope="col">σ<sub>rel</sub></th>{head}'
        f"</tr>{''.join(lines)}</table></div>"
    )


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"
