"""The figures of docs/sweep.md and the README, from a run that `fashion_mnist` has measured.

python -m benchmarks.fashion_figures --run-dir runs/fashion [--out docs/images]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from reference_model.held_out_loss import LOSS
from reference_model.metrics import mean_and_error
from reference_model.report_charts import FAR
from reference_model.sheets import SAMPLES, SHEET_COLUMNS, read_sheet
from reference_model.sweep_record import (
    Measurement,
    SweepRecord,
    clearly_worse,
    load_record,
    paired_difference,
)

IMAGES = Path(__file__).parents[1] / "docs" / "images"
BLUE, ORANGE, GREEN, GREY = "#0065a3", "#c04a00", "#00785a", "#6b7077"
TICKS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.28)
VALUES = [m * 10.0**k for k in range(-3, 4) for m in (1, 1.5, 2, 3, 4, 5, 7)]
ROWS = 2
"""Rows of samples for each set of weights."""


def length_axis(axes: Any) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [t for t in TICKS if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("EMA length σ_rel, as a fraction of training")
    axes.grid(alpha=0.25)


def distance_axis(axes: Any) -> None:
    """Logarithmic, with few labels, and air for notes."""
    axes.set_yscale("log")
    axes.margins(y=0.14)
    low, high = axes.get_ylim()
    ticks = [v for v in VALUES if low <= v <= high]
    axes.set_yticks(ticks, [f"{v:g}" for v in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("Fréchet distance to held-out images")


def curve(record: SweepRecord) -> Any:
    """Distance against length, with the cost of wrong lengths."""
    averages, raw, best = record.averages, record.raw, record.best
    assert best is not None  # asked for only where averages were measured
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    xs = [m.sigma_rel or 0.0 for m in averages]
    for repeat in range(len(best.distances)):
        axes.plot(xs, [m.distances[repeat] for m in averages], color=BLUE, lw=0.8, alpha=0.35)
    axes.errorbar(
        xs,
        [m.distance for m in averages],
        [m.error for m in averages],
        fmt="o-",
        color=BLUE,
        capsize=3,
        ms=5,
        label="average of that length",
    )
    levels = [("raw weights", raw.distances if raw else (), ORANGE, "--"),
              ("real training images", record.real, GREEN, ":")]  # fmt: skip
    for name, values, color, style in levels:
        if values:
            mean, error = mean_and_error(values)
            if mean < best.distance / FAR:  # it would press the curve flat
                axes.plot([], [], " ", label=f"{name}: {mean:.2f}, below")
                continue
            axes.axhline(mean, color=color, ls=style, lw=1.6, label=f"{name}: {mean:.2f}")
            axes.axhspan(mean - error, mean + error, color=color, alpha=0.12, lw=0)
    axes.plot([best.sigma_rel or 0.0], [best.distance], "o", color=BLUE, ms=10)
    below = {"textcoords": "offset points", "ha": "center", "color": BLUE, "fontsize": 10}
    axes.annotate(
        f"best: {best.sigma_rel:g}", (best.sigma_rel or 0.0, best.distance), (0, -20), **below
    )
    for end in (averages[0], averages[-1]):
        if clearly_worse(end, best):
            cost = 100 * (end.distance / best.distance - 1)
            place = (18 if end is averages[0] else -14, 10)
            axes.annotate(f"+{cost:.0f} %", (end.sigma_rel or 0.0, end.distance), place, **below)
    distance_axis(axes)
    length_axis(axes)
    repeats, images = (record.settings["protocol"][k] for k in ("repeats", "images"))
    axes.set_title(f"One training run, {len(averages)} EMA lengths made afterwards\n"
                   f"mean of {repeats} × {images:,} images ± standard error",
                   fontsize=11)  # fmt: skip
    axes.legend(frameon=False, fontsize=9)
    return figure


def times(record: SweepRecord) -> Any:
    """The curve at several times in training."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    curves = [(t, record.curve(t)) for t in record.times if len(record.curve(t)) > 1]
    for k, (t, measured) in enumerate(curves):
        color = plt.get_cmap("viridis_r")(0.15 + 0.75 * k / max(len(curves) - 1, 1))
        best = min(measured, key=lambda m: m.distance)
        xs, ys = [m.sigma_rel or 0.0 for m in measured], [m.distance for m in measured]
        label = f"{t / 1024:,.0f} Ki images: best {best.sigma_rel:g}"
        axes.errorbar(xs, ys, [m.error for m in measured], fmt="o-", color=color, ms=4, capsize=2,
                      label=label)  # fmt: skip
        axes.plot([best.sigma_rel or 0.0], [best.distance], "D", color=color, ms=9)
    distance_axis(axes)
    length_axis(axes)
    axes.set_title("The same run at earlier times (diamonds: best length)", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    return figure


def guidance(record: SweepRecord) -> Any:
    """Distance against length for each strength of guidance."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    lengths = sorted({m.sigma_rel or 0.0 for m in record.guided})
    alone = {m.sigma_rel: m for m in record.averages}
    by_strength: dict[float, list[Measurement]] = {1.0: [alone[s] for s in lengths if s in alone]}
    for m in record.guided:
        assert m.point.guide is not None  # of guided ones
        by_strength.setdefault(m.point.guide.guidance, []).append(m)
    guide = record.guided[0].point.guide
    assert guide is not None  # likewise
    for k, (w, measured) in enumerate(sorted(by_strength.items())):
        color = plt.get_cmap("viridis_r")(0.15 + 0.75 * k / max(len(by_strength) - 1, 1))
        xs, ys = [m.sigma_rel or 0.0 for m in measured], [m.distance for m in measured]
        label = "no guidance" if w == 1 else f"w = {w:g}"
        axes.errorbar(xs, ys, [m.error for m in measured], fmt="o-", color=color, ms=5, capsize=3,
                      label=label)  # fmt: skip
    distance_axis(axes)
    length_axis(axes)
    axes.set_title(f"Guidance by the average of length {guide.sigma_rel:g} of the same run",
                   fontsize=11)  # fmt: skip
    axes.legend(frameon=False, fontsize=9)
    return figure


def tensors(record: SweepRecord) -> Any:
    """Change of the held-out loss where one group of tensors has another length."""
    changed = [m for m in record.measurements if len(m.point.changed) == 1 and LOSS in m.scores]
    base = next(m for m in record.measurements
                if m.point.plain and LOSS in m.scores
                and m.sigma_rel == changed[0].sigma_rel)  # fmt: skip
    names = list(dict.fromkeys(m.point.changed[0][0] for m in changed))
    lengths = sorted({m.point.changed[0][1] for m in changed})
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.27 * len(names)), layout="constrained")
    for k, (length, color) in enumerate(zip(lengths, (BLUE, ORANGE, GREEN, GREY), strict=False)):
        at = [m for m in changed if m.point.changed[0][1] == length]
        scale = 100 / base.mean(LOSS)[0]
        pairs = [paired_difference(m, base, LOSS) for m in at]
        ys = [names.index(m.point.changed[0][0]) + 0.2 * (k - (len(lengths) - 1) / 2) for m in at]
        axes.errorbar([scale * d for d, _ in pairs], ys, xerr=[scale * e for _, e in pairs],
                      fmt="o", ms=4, capsize=2, color=color, label=f"at {length:g}")  # fmt: skip
    axes.axvline(0, color="0.4", lw=1)
    axes.set_yticks(
        range(len(names)), [n.removeprefix("unet.").removesuffix(".*") for n in names], fontsize=8
    )
    axes.invert_yaxis()
    axes.grid(alpha=0.25, axis="x")
    axes.set_xlabel(f"change of the {LOSS}, % ± standard error of the difference")
    axes.set_title(f"One group of tensors of another length, all others at {base.sigma_rel:g}",
                   fontsize=11)  # fmt: skip
    axes.legend(frameon=False, fontsize=9)
    return figure


def samples(record: SweepRecord, run_dir: Path) -> Any:
    """The same noise through raw weights, a short, the best and a long average."""
    best, averages = record.best, record.averages
    assert best is not None  # as above
    shown = [("raw weights", record.raw), ("short", averages[0]), ("best", best),
             ("long", averages[-1])]  # fmt: skip
    figure, all_axes = plt.subplots(2, 2, figsize=(9, 2.5), layout="constrained")
    for axes, (name, m) in zip(all_axes.flat, shown, strict=True):
        axes.axis("off")
        if m is None:
            continue
        path = run_dir / SAMPLES / f"{m.point.label}.png"
        images = read_sheet(path, len(record.shown), SHEET_COLUMNS)
        if images is None:
            continue
        rows = images[: ROWS * SHEET_COLUMNS].reshape(ROWS, SHEET_COLUMNS, *images.shape[1:])
        picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
        axes.imshow(picture.squeeze(), cmap="gray")
        length = "" if m.sigma_rel is None else f" ({m.sigma_rel:g})"
        title = f"{name}{length}: {m.distance:.2f}"
        axes.set_title(title, fontsize=11, color=BLUE if m is best else "black")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="a run that was measured")
    parser.add_argument("--out", type=Path, default=IMAGES, help="where to write the figures")
    arguments = parser.parse_args()
    record = load_record(arguments.run_dir)
    if record is None or record.best is None:
        parser.error(f"{arguments.run_dir} was not measured: run benchmarks.fashion_mnist first")
    figures = {"curve": curve(record), "samples": samples(record, arguments.run_dir)}
    if len(record.times) > 1:
        figures["times"] = times(record)
    if record.guided:
        figures["guidance"] = guidance(record)
    if any(m.point.changed for m in record.measurements):
        figures["tensors"] = tensors(record)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = arguments.out / f"fashion-{name}.png"
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main()
