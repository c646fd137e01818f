"""The figures of docs/numerics.md, from the recorded results of ``reconstruct_accuracy``.

python -m benchmarks.accuracy_figures
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import harness
from benchmarks.reconstruct_accuracy import BAR_TIMES, REFERENCE, UNSTORED, geometric_mean
from benchmarks.trajectories import TARGETS

IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLUMNS = [TARGETS.index(sigma_rel) for sigma_rel in UNSTORED]
SHOWN = "vit-adamw-wsd"
SHOWN_TIMES = 16
COLORS = {
    "float32": "#222222", "delta16": "#4477aa", "float16": "#ee6677", "delta8": "#228833",
    "delta6": "#ccbb44", "delta4": "#aa3377",
}  # fmt: skip


def of_end(results: dict[str, Any]) -> dict[tuple[str, int, str, str], dict[str, Any]]:
    """Curves at the end of training, by run, times, encoding and method."""
    curves = {}
    for key, curve in results["errors"].items():
        run, when, times, encoding, method = key.split()
        if when == "end":
            curves[run, int(times), encoding, method] = curve
    return curves


def errors_of_one_run(axes: Any, curves: dict[Any, Any]) -> None:
    paper = curves[SHOWN, SHOWN_TIMES, REFERENCE, "paper"]["error"]
    axes.loglog(UNSTORED, np.take(paper, COLUMNS), "k--", label=f"paper, {REFERENCE}")
    for encoding, color in COLORS.items():
        error = curves[SHOWN, SHOWN_TIMES, encoding, "kriging"]["error"]
        style = ":" if encoding == "float32" else "-"
        axes.loglog(UNSTORED, np.take(error, COLUMNS), style, color=color, label=encoding)
    axes.set(
        xlabel="EMA length σ_rel",
        ylabel="relative RMS error",
        title=f"One run ({SHOWN}, {SHOWN_TIMES} times)",
    )
    axes.legend(fontsize=8)


def gains_by_bytes(axes: Any, curves: dict[Any, Any]) -> None:
    runs = sorted({run for run, *_ in curves})
    for encoding, color in COLORS.items():
        points = []
        for times in BAR_TIMES:
            gains, size = [], []
            for run in runs:
                curve = curves[run, times, encoding, "kriging"]
                paper = curves[run, times, REFERENCE, "paper"]["error"]
                gains += list(np.divide(np.take(paper, COLUMNS), np.take(curve["error"], COLUMNS)))
                size.append(curve["bytes"])
            points.append((float(np.mean(size)), geometric_mean(gains)))
        axes.loglog(*zip(*points, strict=True), "o-", color=color, label=encoding)
        axes.annotate(str(BAR_TIMES[-1]), points[-1], xytext=(4, 2), textcoords="offset points",
                      fontsize=7)  # fmt: skip
    axes.axhline(1, color="0.7", lw=1)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.minorticks_off()
    axes.set(
        xlabel="bytes for each weight and time (two tracks)",
        ylabel=f"times more exact than paper, {REFERENCE}",
        title="All runs: 8, 16 and 32 times",
    )
    axes.legend(fontsize=8)


def predictions(axes: Any, curves: dict[Any, Any]) -> None:
    for encoding, color in COLORS.items():
        chosen = [
            curve
            for (_, times, stored, method), curve in curves.items()
            if stored == encoding and method == "kriging" and times in BAR_TIMES
        ]
        true = np.concatenate([np.take(c["error"], COLUMNS) for c in chosen])
        predicted = np.concatenate([np.take(c["predicted"], COLUMNS) for c in chosen])
        axes.loglog(true, predicted, ".", ms=3, color=color, label=encoding)
    ends = np.array(axes.get_xlim())
    axes.plot(ends, ends, color="0.4", lw=1)
    axes.fill_between(ends, ends / 1.5, ends * 1.5, color="0.5", alpha=0.2, lw=0)
    axes.set(
        xlabel="true error", ylabel="predicted error", title="Predictions (shaded: within 1.5 ×)"
    )
    axes.legend(fontsize=8, markerscale=3)


def main() -> None:
    path = harness.RESULTS / "reconstruct_accuracy.json"
    curves = of_end(json.loads(path.read_text(encoding="utf-8"))["results"])
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for draw, one in zip((errors_of_one_run, gains_by_bytes, predictions), axes, strict=True):
        draw(one, curves)
        one.grid(alpha=0.3)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "accuracy.png", dpi=110)
    print(IMAGES / "accuracy.png")


if __name__ == "__main__":
    main()
