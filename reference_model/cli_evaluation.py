"""Commands that measure many EMA lengths, and report: sweep, report, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from reference_model.cli_protocol import chosen_protocol, protocol_options
from reference_model.cli_support import (
    SigmaRels,
    errors_as_messages,
    json_option,
    quiet_option,
    run_dir_option,
)


@click.command()
@run_dir_option
@click.option(
    "--sigma-rel",
    "sigma_rels",
    type=SigmaRels(),
    default="0.01,0.02,0.03,0.05,0.07,0.1,0.13,0.16,0.2,0.25",
    show_default=True,
    help="EMA lengths; three dots continue a progression, as in 0.01,0.02,...,0.25.",
)
@protocol_options
@json_option
@quiet_option
def sweep(
    run_dir: Path, sigma_rels: tuple[float, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Measure many EMA lengths and the raw weights, and write the report.

    All lengths are reconstructed in one pass over the snapshots, and all start from the same
    noise, so that differences between them are real. What was measured before is kept: interrupt
    at will, and add lengths later. Other options than before start the measurements anew.
    """
    with errors_as_messages():
        from reference_model.report import write_report
        from reference_model.sweep import sweep as run_sweep

        record = run_sweep(
            run_dir, sigma_rels, chosen_protocol(run_dir, options), progress=not quiet
        )
        path = write_report(run_dir)
    if as_json:
        rows = [
            {
                "sigma_rel": m.sigma_rel,
                "distance": m.distance,
                "standard_error": _number(m.error),
                "distances": m.distances,
                "agreement": m.agreement,
                "predicted_error": m.predicted_error,
            }
            for m in record.measurements
        ]
        best = None if record.best is None else record.best.sigma_rel
        click.echo(json.dumps({"best": best, "measurements": rows, "report": str(path)}))
        return
    click.echo(f"{'sigma_rel':>9}  {'distance':>8}  {'std error':>9}  {'as intended':>11}")
    for m in record.measurements:
        name = "raw" if m.sigma_rel is None else f"{m.sigma_rel:g}"
        agreement = 100 * sum(m.agreement) / len(m.agreement)
        mark = "  best" if m is record.best else ""
        click.echo(f"{name:>9}  {m.distance:8.4f}  {m.error:9.4f}  {agreement:9.1f} %{mark}")
    click.echo(f"Wrote {path}")


@click.command()
@run_dir_option
def report(run_dir: Path) -> None:
    """Write report.html from what the run directory holds.

    One self-contained page, with the curve of a sweep if there was one.
    """
    with errors_as_messages():
        from reference_model.report import write_report

        path = write_report(run_dir)
    click.echo(f"Wrote {path}")


@click.command()
@run_dir_option
@click.option("--fresh", is_flag=True, help="Remove what an earlier demo left, and start over.")
@click.option("--quick", is_flag=True, help="A tiny version in seconds; its images are noise.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def demo(run_dir: Path, fresh: bool, quick: bool, quiet: bool) -> None:
    """Train on handwritten digits, choose the EMA length afterwards, write a report.

    Takes about five minutes on two CPU cores. Interrupt at will: the same command goes on where
    it stopped.
    """
    with errors_as_messages():
        from reference_model.demo import demo as run_demo

        run_demo(run_dir, quick=quick, fresh=fresh, progress=not quiet)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if value == value else None
