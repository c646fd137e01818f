"""What does each step of the paper's ladder bring, and each ingredient of config G?

Trains all configs with the same seeds and number of images, on the embedded digits (`ladder`) and
on Fashion-MNIST (`fashion`), and G without one ingredient each (`ingredients`, on the digits);
measures every run at several EMA lengths; draws the figures of docs/ladder.md.

    python -m benchmarks.ladder --out FOLDER [--part ladder fashion ...] [--seeds 2] [--quick]

With two seeds up to an hour on two cores for each part. Interrupt at will: the same command goes
on, and runs that two parts need are made once. Fashion-MNIST is read from where Debian's package
dataset-fashion-mnist puts it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Before torch loads, as `python -m reference_model` does: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks import harness
from benchmarks.fashion_figures import IMAGES, distance_axis, length_axis
from reference_model.ablate import AblationPlan, Variant, ablate, leave_one_out
from reference_model.ablate_report import write_ablation
from reference_model.charts import plus_minus
from reference_model.ladder import HABITS, LADDER
from reference_model.protocol import Protocol

PARTS = {
    "ladder": tuple(Variant(config) for config in HABITS),
    "ingredients": leave_one_out("G"),
    "fashion": tuple(Variant(config) for config in LADDER),
}
FILES = {
    "ladder": "ladder",
    "ingredients": "ladder_ingredients",
    "fashion": "ladder_fashion",
}
"""Raw numbers of each part, in results/."""
COLORS = plt.get_cmap("tab10").colors
LENGTHS = (0.02, 0.03, 0.05, 0.07, 0.10, 0.13, 0.16, 0.20, 0.25)
PROTOCOL = Protocol(images=1000, repeats=2, num_steps=8)
# Its images are dearer; that many runs are measured with fewer.
FASHION_LENGTHS = (0.02, 0.05, 0.10, 0.15, 0.20, 0.25)
FASHION_PROTOCOL = Protocol(images=500, repeats=1, num_steps=6)
QUICK = Protocol(images=40, repeats=2, num_steps=1, batch_size=40)


def plan(part: str, seeds: int, quick: bool) -> AblationPlan:
    """What one part trains and measures."""
    if quick:
        variants = tuple(v for v in PARTS[part] if v.name in ("D", "G", "G-pixel_norm"))
        return AblationPlan(
            "digits-tiny", variants, (0, 1), 128, sigma_rels=(0.05, 0.2), protocol=QUICK
        )
    name, lengths, protocol = (
        ("fashion-small", FASHION_LENGTHS, FASHION_PROTOCOL)
        if part == "fashion"
        else ("digits", LENGTHS, PROTOCOL)
    )
    return AblationPlan(
        name, PARTS[part], tuple(range(seeds)), sigma_rels=lengths, protocol=protocol
    )


def report(results: Mapping[str, Any]) -> str:
    """One row for each variant."""
    fixed = results["plan"]["fixed_sigma_rel"]
    cells = [
        [
            v["name"],
            f"{v['parameters']:,}",
            f"{v['best']['sigma_rel']:g}" + "*" * v["best"]["at_edge"],
            plus_minus(v["best"]["mean"], v["best"]["error"] or 0.0),
            plus_minus(v["fixed"]["mean"], v["fixed"]["error"] or 0.0),
            f"{v['worst']['cost']:.2f} × at {v['worst']['sigma_rel']:g}",
        ]
        for v in results["variants"]
    ]
    head = ["", "parameters", "best σ_rel", "distance", f"at {fixed:g}", "worst length"]
    return harness.table(head, cells)


def curves(
    variants: Sequence[Mapping[str, Any]],
    title: str = "Each config has a best EMA length of its own",
) -> Any:
    """Distance against EMA length, a line for each config."""
    figure, axes = plt.subplots(figsize=(8, 5.4), layout="constrained")
    for place, (v, color) in enumerate(zip(variants, COLORS, strict=False)):
        rows, aside = v["curve"], 1.008 ** (place - len(variants) / 2)  # bars beside each other
        axes.errorbar(
            [r["sigma_rel"] * aside for r in rows],
            [r["mean"] for r in rows],
            [r["error"] or 0.0 for r in rows],
            fmt="-", lw=1.4, elinewidth=0.9, color=color, capsize=2,
            label=f"{v['name']}: {v['about']}",
        )  # fmt: skip
        axes.plot(v["best"]["sigma_rel"] * aside, v["best"]["mean"], "o", ms=6, color=color)
    length_axis(axes)
    distance_axis(axes)
    axes.set_title(title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def magnitudes(variants: Sequence[Mapping[str, Any]]) -> Any:
    """Activations, and stored weights relative to their start, over training; the law dotted."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axes, field in zip(both, ("activation", "weight"), strict=True):
        for v, color in zip(variants, COLORS, strict=False):
            of = v["magnitudes"]
            unit = of["weight"][0] if field == "weight" else 1.0
            axes.plot(
                of["nimg"], [y / unit for y in of[field]], lw=1.6, color=color, label=v["name"]
            )
            if field == "weight" and of["law"]:
                label = f"√(1 + Σα²) of {v['name']}"
                axes.plot(of["nimg"], of["law"], ":", lw=1.6, color=color, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
        axes.grid(alpha=0.25)
        axes.set_xlabel("training images seen")
    both[0].set_title("Activations", fontsize=11)
    both[1].set_title("Stored weights, relative to the start", fontsize=11)
    both[1].legend(frameon=False, fontsize=8)
    return figure


def ingredients(variants: Sequence[Mapping[str, Any]]) -> Any:
    """Best distance without each ingredient, beside the whole."""
    whole, *others = variants
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.32 * len(others)), layout="constrained")
    mean, error = whole["best"]["mean"], whole["best"]["error"] or 0.0
    axes.axvspan(mean - error, mean + error, color="#0065a3", alpha=0.16, lw=0)
    axes.axvline(mean, color="#0065a3", lw=1.4)
    names = ["without " + ", ".join(v["leave_out"]) for v in others]
    axes.errorbar(
        [v["best"]["mean"] for v in others],
        range(len(others)),
        xerr=[v["best"]["error"] or 0.0 for v in others],
        fmt="o", ms=5, capsize=3, color="#c04a00",
    )  # fmt: skip
    axes.set_yticks(range(len(others)), names, fontsize=9)
    axes.invert_yaxis()
    axes.grid(alpha=0.25, axis="x")
    axes.set_xlabel(f"Fréchet distance at its own best EMA length; {whole['name']} whole: line")
    return figure


def draw(part: str, results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the figures of one part."""
    variants = results["variants"]
    figures = {
        "ladder": {"curves": curves, "magnitudes": magnitudes},
        "ingredients": {"ingredients": ingredients},
        "fashion": {"fashion": partial(curves, title="Early in training, on Fashion-MNIST")},
    }[part]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, drawn in figures.items():
        paths.append(folder / f"ladder-{name}.png")
        figure = drawn(variants)
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each variant")
    parser.add_argument("--jobs", type=int, help="runs at a time; one for each core otherwise")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    arguments = parser.parse_args()
    for part in arguments.part:
        started = harness.machine()
        wanted = plan(part, arguments.seeds, arguments.quick)
        # Another data set has another judge.
        out = arguments.out / part if part == "fashion" else arguments.out
        failures = ablate(wanted, out, jobs=arguments.jobs)
        if failures:
            raise SystemExit("\n".join(map(str, failures)))
        results = write_ablation(wanted, out)
        (out / "ablate.html").replace(out / f"{part}.html")
        print(f"\n{part}\n\n{report(results)}\n")
        for check in results["checks"]:
            sign = "as expected" if check["holds"] else "NOT as expected"
            print(f"{sign}: {check['statement']}: {check['seen']} (expected {check['expected']})")
        for path in draw(part, results, arguments.out if arguments.quick else IMAGES):
            print(path)
        if not arguments.quick:
            kept = {name: results[name] for name in ("variants", "checks")}
            print(f"Wrote {harness.save(FILES[part], results['plan'], started, kept)}")


if __name__ == "__main__":
    main()
