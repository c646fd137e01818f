"""Commands that show what a run gave: report, demo."""

from __future__ import annotations

from pathlib import Path

import click

from reference_model.cli_support import errors_as_messages, run_dir_option


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
