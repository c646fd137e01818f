"""The command of the paper's central experiment: sweep."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reference_model.cli_generate import GUIDE_KEYS, INTERVAL, Numbers
from reference_model.cli_protocol import chosen_protocol, protocol_options
from reference_model.cli_support import (
    SigmaRels,
    errors_as_messages,
    json_option,
    quiet_option,
    run_dir_option,
    set_threads,
    threads_option,
)
from reference_model.protocol import LENGTHS

if TYPE_CHECKING:
    from reference_model.points import Point
    from reference_model.sweep import Sweep
    from reference_model.sweep_grids import Guides
    from reference_model.sweep_record import Measurement, SweepRecord

SUFFIXES = {"ki": 2**10, "mi": 2**20, "k": 10**3, "m": 10**6}


class Times(click.ParamType):  # type: ignore[type-arg]
    """Times such as `64ki,0.5,1`: images, with a suffix or not, or fractions of training."""

    name = "T,T,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the numbers, or fail saying what was expected."""
        times = []
        for part in value.lower().split(","):
            word = part.strip()
            suffix = next((s for s in SUFFIXES if word.endswith(s)), "")
            try:
                time = float(word.removesuffix(suffix)) * SUFFIXES.get(suffix, 1)
            except ValueError:
                time = 0.0
            if not 0 < time < float("inf"):
                self.fail(
                    f"{part!r} is no time; give images, as in 64ki, 128k or 500000, or a fraction "
                    "of training, as in 0.5",
                    param,
                    ctx,
                )
            times.append(time)
        return tuple(times)


class Strengths(click.ParamType):  # type: ignore[type-arg]
    """Strengths of guidance such as `1,1.5,2`."""

    name = "W,W,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the numbers, or fail saying what was expected."""
        try:
            return tuple(dict.fromkeys(float(part) for part in value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not of the form 1,1.5,2", param, ctx)


@click.command()
@run_dir_option
@click.option(
    "--sigma-rel",
    "sigma_rels",
    type=SigmaRels(),
    help="EMA lengths; three dots continue a progression, as in 0.01,0.02,...,0.25.  "
    f"[default: {','.join(f'{s:g}' for s in LENGTHS)}; with --sensitivity: the best]",
)
@click.option("--find-best", is_flag=True, help="Search the best length, with few measurements.")
@click.option(
    "--bounds",
    type=Numbers(float, ",", "LO,HI"),
    default="0.01,0.28",
    show_default=True,
    help="Of the search.",
)
@click.option("--budget", default=10, show_default=True, help="Most lengths that it measures.")
@click.option(
    "--at", type=Times(), help="Times in training: images (64ki, 128k) or fractions (0.25,0.5,1)."
)
@click.option("--times", type=click.IntRange(1), help="So many times, evenly over training.")
@click.option(
    "--guidance", "strengths", type=Strengths(), help="Strengths w, as in 1,1.5,2; 1: none."
)
@click.option(
    "--guidance-sigma-rel",
    "--guide-sigma-rel",
    "guide_sigma_rels",
    type=SigmaRels(),
    help="EMA lengths of the guide.  [default: that of what it guides]",
)
@click.option(
    "--guidance-run-dir",
    "--guide-run",
    "guide_run_dir",
    type=GUIDE_KEYS["run-dir"][0],
    help=GUIDE_KEYS["run-dir"][1],
)
@click.option(
    "--guidance-t",
    "--guide-t",
    "guide_times",
    type=Times(),
    help="Times of the guide's average: a less trained guide.  [default: that of what it guides]",
)
@click.option("--guidance-interval", type=INTERVAL, help=GUIDE_KEYS["interval"][1])
@click.option(
    "--sensitivity", is_flag=True, help="Give one group of tensors at a time another length."
)
@click.option("--layers", multiple=True, help="Only tensors whose names match; repeatable.")
@click.option(
    "--by",
    type=click.Choice(["block", "layer"]),
    default="block",
    show_default=True,
    help="What a group of tensors is.",
)
@click.option(
    "--other-sigma-rel",
    "others",
    type=SigmaRels(),
    help="Lengths to give one group.  [default: half and double]",
)
@click.option(
    "--measure",
    type=click.Choice(["distance", "loss"]),
    help="Fréchet distance of images, or denoising loss on held-out images, which takes no "
    "sampling.  [default: distance; with --sensitivity: loss]",
)
@protocol_options
@threads_option
@json_option
@quiet_option
def sweep(
    run_dir: Path,
    sigma_rels: tuple[float, ...] | None,
    find_best: bool,
    bounds: tuple[float, float],
    budget: int,
    measure: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure EMA lengths of a finished or running run, and write the report.

    All lengths are reconstructed in one pass over the snapshots, and all start from the same
    noise, so that differences between them are real. What was measured before is kept, whichever
    command measured it: interrupt at will, and add lengths, times or guides later. Other options
    of measuring (--images ...) than before start anew and set the earlier record aside.

    \b
    The curve of quality against EMA length, and the raw weights:
      sweep --run-dir runs/fashion --sigma-rel 0.01,0.02,...,0.25
    The best length in at most eight measurements:
      sweep --run-dir runs/fashion --find-best --budget 8
    How the best length moves as training goes on, from the same snapshots:
      sweep --run-dir runs/fashion --times 4
    Guidance by another length of the same run; no second training:
      sweep --run-dir runs/fashion --sigma-rel 0.05,0.1,0.15 \\
        --guidance 1,1.5,2 --guidance-sigma-rel 0.25
    Do all tensors want the same length?
      sweep --run-dir runs/fashion --sensitivity
    """  # noqa: D301 (click takes \\b for the character)
    asked = {name: options.pop(name) for name in _GRID_OPTIONS}
    _refuse_mixtures(find_best, sigma_rels, asked)
    if measure == "loss" and (find_best or asked["strengths"]):
        raise click.UsageError("--measure loss takes no samples: it goes with neither --find-best "
                               "nor --guidance")  # fmt: skip
    set_threads(threads)
    with errors_as_messages():
        from reference_model.held_out_loss import LOSS
        from reference_model.report import write_report
        from reference_model.sweep import Sweep
        from reference_model.sweep_record import DISTANCE

        by = measure or ("loss" if asked["sensitivity"] else "distance")
        by = LOSS if by == "loss" else DISTANCE
        protocol = chosen_protocol(run_dir, options)
        run = Sweep(run_dir, protocol, progress=not quiet, images=by == DISTANCE)
        if find_best:
            points = _search(run, bounds, budget, asked)
        else:
            points = _points(run, sigma_rels, asked)
            run.measure(points, by=by)
        path = write_report(run_dir)
    if as_json:
        click.echo(json.dumps(_as_data(run.record, path)))
        return
    for line in _table(run.record, points, by):
        click.echo(line)
    click.echo(f"Wrote {path}")


_GUIDES = ("guide_sigma_rels", "guide_run_dir", "guide_times", "guidance_interval")
_SENSITIVITY = ("layers", "others")
_GRID_OPTIONS = ("at", "times", "strengths", "sensitivity", "by", *_GUIDES, *_SENSITIVITY)


def _refuse_mixtures(find_best: bool, sigma_rels: Any, asked: dict[str, Any]) -> None:
    if asked["at"] and asked["times"]:
        raise click.UsageError("give either --at or --times")
    if find_best and sigma_rels:
        raise click.UsageError("--find-best chooses lengths itself: give --bounds, no --sigma-rel")
    if any(asked[name] for name in _GUIDES) and not asked["strengths"]:
        raise click.UsageError("a guide without strength: add --guidance, such as --guidance 1,1.5")
    if find_best and asked["strengths"] and not asked["guide_sigma_rels"]:
        raise click.UsageError("--find-best with --guidance needs --guidance-sigma-rel")
    if asked["strengths"] and not any(asked[name] for name in _GUIDES[:3]):
        raise click.UsageError(
            "--guidance needs a guide: --guidance-sigma-rel 0.25 for another EMA length of this "
            "run, --guidance-run-dir for another run, or --guidance-t for an earlier time"
        )
    if asked["sensitivity"]:
        if find_best or asked["strengths"] or asked["at"] or asked["times"]:
            raise click.UsageError("--sensitivity goes with neither searches, guides nor times")
        if sigma_rels and len(sigma_rels) > 1:
            raise click.UsageError("--sensitivity takes one --sigma-rel, of all other tensors")
    elif any(asked[name] for name in _SENSITIVITY):
        raise click.UsageError("--layers and --other-sigma-rel belong to --sensitivity")


def _times(run: Sweep, asked: dict[str, Any]) -> Sequence[float]:
    from reference_model.sweep_grids import even_times, given_times

    if asked["times"]:
        return even_times(run, asked["times"])
    return given_times(run, asked["at"]) if asked["at"] else [run.end]


def _points(
    run: Sweep, sigma_rels: tuple[float, ...] | None, asked: dict[str, Any]
) -> Sequence[Point]:
    from reference_model.points import grid
    from reference_model.sweep_grids import guided_grid, sensitivity_grid

    if asked["sensitivity"]:
        base = sigma_rels[0] if sigma_rels else None
        return sensitivity_grid(
            run, base, asked["others"] or (), by=asked["by"], patterns=asked["layers"]
        )
    lengths, times = sigma_rels or LENGTHS, _times(run, asked)
    if asked["strengths"]:
        return guided_grid(run, lengths, times, _guides(asked))
    return [run.raw, *grid(lengths, times)]


def _guides(asked: dict[str, Any]) -> Guides:
    from reference_model.sweep_grids import Guides

    return Guides(
        asked["strengths"],
        asked["guide_sigma_rels"] or (),
        asked["guide_run_dir"],
        asked["guide_times"] or (),
        asked["guidance_interval"],
    )


def _search(
    run: Sweep, bounds: tuple[float, float], budget: int, asked: dict[str, Any]
) -> Sequence[Point]:
    """Search at each time, for each guide; return what was measured on the way."""
    from reference_model.points import Point, PointGuide
    from reference_model.sweep_search import find_best

    found = []
    for t in _times(run, asked):
        # A guide with a length of its own is the same for all lengths that it guides.
        guides: Sequence[PointGuide | None] = [None]
        if asked["strengths"]:
            guides = _guides(asked).of(run, t, bounds[0])
        for guide in guides:
            lengths = find_best(run, bounds, budget, t=t, guide=guide)
            found += [Point(s, t, guide) for s in lengths]
    return found


def _as_data(record: SweepRecord, report: Path) -> dict[str, Any]:
    """Everything measured, for programs."""
    from reference_model.sweep_record import AGREEMENT

    rows = [
        {
            "sigma_rel": m.sigma_rel,
            "t": m.point.t,
            "guide": None if m.point.guide is None else asdict(m.point.guide),
            "changed": dict(m.point.changed),
            "distance": _number(m.distance),
            "standard_error": _number(m.error),
            "distances": m.distances,
            "agreement": m.scores.get(AGREEMENT, ()),
            "scores": m.scores,
            "predicted_error": m.predicted_error,
        }
        for m in record.measurements
    ]
    best = None if record.best is None else record.best.sigma_rel
    return {"best": best, "measurements": rows, "report": str(report)}


def _table(record: SweepRecord, points: Sequence[Point], by: str) -> Iterator[str]:
    """What this command asked for, one point a line; columns that say nothing are left out."""
    from reference_model.points import describe_guide
    from reference_model.sweep_record import AGREEMENT, DISTANCE

    asked = set(points)
    if by == DISTANCE and all(p.plain for p in points):  # the whole curve, of earlier calls too
        asked |= {m.point for m in [record.raw, *record.averages] if m is not None}
    shown = [m for m in record.measurements if m.point in asked]
    best = min(
        (m for m in shown if m.sigma_rel is not None), key=lambda m: m.mean(by)[0], default=None
    )
    base = next((m for m in shown if m.point.plain and m.sigma_rel is not None), None)
    columns: dict[str, Callable[[Measurement], str]] = {
        "sigma_rel": lambda m: "raw" if m.sigma_rel is None else f"{m.sigma_rel:.4g}",
        "images seen": lambda m: f"{m.point.t:,.0f}",
        "w": lambda m: "1" if m.point.guide is None else f"{m.point.guide.guidance:g}",
        "guide": lambda m: describe_guide(m.point.guide, m.point.t) if m.point.guide else "",
        "changed": lambda m: ", ".join(f"{name} at {s:g}" for name, s in m.point.changed),
        by: lambda m: f"{m.mean(by)[0]:.4f}",
        "std error": lambda m: _or_dash(m.mean(by)[1]),
        "change": lambda m: _change(m, base, by),
        "as intended": lambda m: f"{100 * m.mean(AGREEMENT)[0]:.1f} %",
    }
    optional = {
        "images seen": len({m.point.t for m in shown}) > 1,
        "w": any(m.point.guide for m in shown),
        "guide": any(m.point.guide for m in shown),
        "changed": any(m.point.changed for m in shown),
        "change": any(m.point.changed for m in shown),
        "as intended": by == DISTANCE and any(AGREEMENT in m.scores for m in shown),
    }
    kept = {name: text for name, text in columns.items() if optional.get(name, True)}
    rows = [list(kept), *([text(m) for text in kept.values()] for m in shown)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(kept))]
    marks = ["", *("  best" if m is best else "" for m in shown)]
    for row, mark in zip(rows, marks, strict=True):
        yield "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + mark


def _or_dash(error: float) -> str:
    """An error, or that there is none: a single repeat has no spread."""
    return f"{error:.4f}" if error == error else "-"


def _change(m: Measurement, base: Measurement | None, by: str) -> str:
    """Paired difference from the base, where there is one."""
    from reference_model.sweep_record import paired_difference

    if base is None or not m.point.changed:
        return ""
    change, error = paired_difference(m, base, by)
    return f"{change:+.4f}" + (f" ± {error:.4f}" if error == error else "")


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if value == value else None
