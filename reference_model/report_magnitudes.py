"""The report's section on magnitudes: whether activations, weights and updates drift."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reference_model.charts import Chart, Scale, nice_range, number, responsive
from reference_model.magnitude_log import MAGNITUDES_FILE, by_level, read_magnitudes
from reference_model.magnitudes import LayerMagnitudes

Line = tuple[int, float, list[LayerMagnitudes]]

STYLES = ("ema", "raw", "real", "predicted")
"""Colours of resolutions, finest first; the decoder has the same, dashed."""


def magnitudes(run_dir: Path) -> str:
    """Charts of activations, weights and relative updates by level; empty without a record.

    Args:
        run_dir: Directory of the run.

    Returns:
        HTML of the section.

    Raises:
        ValueError: If the record cannot be understood.
    """
    lines = read_magnitudes(run_dir / MAGNITUDES_FILE)
    if len(lines) < 2:
        return ""
    charts = "".join(
        f"<h3>{title}</h3>{chart}"
        for title, chart in (
            ("Activations", magnitude_chart(lines, "activation", "mean magnitude of activations")),
            ("Weights", magnitude_chart(lines, "weight", "mean magnitude of stored weights")),
            (
                "Relative update of a step",
                # The first step has learning rate zero.
                magnitude_chart(lines[1:], "relative_update", "‖change‖ / ‖weights‖", log=True),
            ),
        )
    )
    return f"""<section id="magnitudes"><h2>Do magnitudes drift?</h2>
<p>{conclusion(lines)}</p>{charts}
<p class="caption">Each line is one level: encoder solid, decoder dashed, resolutions by colour. A
magnitude is the root mean square of one feature (or of the weights that lead to it); lines are
means over the layers of the level, of the network in training. The relative update is the
effective learning rate: how far one step turns the weights.</p></section>"""


def conclusion(lines: Sequence[Line]) -> str:
    """What happened to activations and weights between the first record and the last."""
    sentences = []
    for field, what in (("activation", "Activations"), ("weight", "Stored weights")):
        first, last = (by_level(layers, field) for _, _, layers in (lines[0], lines[-1]))
        ratios = [last[level] / first[level] for level in last if first.get(level)]
        if not ratios:
            continue
        low, high = min(ratios), max(ratios)
        if high - low < 0.01 and abs(high - 1) < 0.01:
            sentences.append(f"{what} stood still.")
        else:
            sentences.append(
                f"{what} changed by factors of {number(low)} to {number(high)}, level by level."
            )
    return " ".join(sentences)


def magnitude_chart(lines: Sequence[Line], field: str, label: str, *, log: bool = False) -> str:
    """One field by level against images seen."""
    xs = [float(nimg) for nimg, _, _ in lines]
    rows = [by_level(layers, field) for _, _, layers in lines]
    levels = list(rows[0])
    resolutions = sorted({int(level.split()[1]) for level in levels}, reverse=True)
    values = [v for row in rows for v in row.values() if v > 0]
    y_scale = nice_range(values, log=True) if log else nice_range([0.0, *values])

    def draw(width: int, height: int) -> str:
        wide = width > 500
        chart = Chart(
            Scale(0, max(xs)), y_scale, width=width, height=height, right=90 if wide else 16
        )
        chart.axes("training images seen", label)
        for level in levels:
            side, resolution = level.split()
            style = STYLES[resolutions.index(int(resolution)) % len(STYLES)]
            dashes = " dashed" if side == "dec" else ""
            chart.line(xs, [row.get(level, float("nan")) for row in rows], f"{style} thin{dashes}")
        if wide:
            for place, resolution_ in enumerate(resolutions):
                style = STYLES[place % len(STYLES)]
                at_y = chart.top + 16 + 18 * place
                chart.text(chart.right + 10, at_y, f"{resolution_}×{resolution_}", f"note {style}")
        return chart.svg(f"{label} against images seen, by level")

    return responsive(draw, wide=(960, 260), narrow=(380, 230))
