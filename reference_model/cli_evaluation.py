"""Commands about a measured run: evaluate, report, demo."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import click

from reference_model.cli_support import (
    errors_as_messages,
    json_option,
    quiet_option,
    run_dir_option,
)
from reference_model.protocol import Protocol


def protocol_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a measuring protocol."""
    for spec in reversed(fields(Protocol)):
        option = click.option(
            f"--{spec.name.replace('_', '-')}",
            spec.name,
            type=int,
            help=f"{spec.metadata['help']}  [default: {spec.default}]",
        )
        command = option(command)
    return command


def chosen_protocol(run_dir: Path, options: dict[str, int | None]) -> Protocol:
    """The protocol of the run's sweep, if there was one, with the options given."""
    from reference_model.sweep_record import load_record

    record = load_record(run_dir)
    before = Protocol() if record is None else Protocol(**record.settings["protocol"])
    return replace(before, **{name: n for name, n in options.items() if n is not None})


@click.command()
@run_dir_option
@click.option("--sigma-rel", type=float, help="EMA length, as a fraction of training time.")
@click.option("--raw", is_flag=True, help="Measure the raw training weights.")
@protocol_options
@json_option
@quiet_option
def evaluate(
    run_dir: Path,
    sigma_rel: float | None,
    raw: bool,
    as_json: bool,
    quiet: bool,
    **options: int | None,
) -> None:
    """Measure images of one EMA length, or of the raw weights.

    Prints the Fréchet distance between generated and held-out images, in the features of a
    classifier that is trained on the run's data set once and kept in the run directory. Lower is
    better; compare only distances of equally many images. Options not given are those of the run's
    sweep, if there was one.
    """
    if (sigma_rel is None) == (not raw):
        raise click.UsageError("give either --sigma-rel, such as --sigma-rel 0.1, or --raw")
    with errors_as_messages():
        from reference_model.sweep import evaluate as run_evaluation

        score = run_evaluation(
            run_dir, sigma_rel, chosen_protocol(run_dir, options), progress=not quiet
        )
    if as_json:
        numbers = {"distance": score.distance, "standard_error": _number(score.error)}
        click.echo(json.dumps({"sigma_rel": sigma_rel, **numbers, **asdict(score)}))
    else:
        agreement = 100 * sum(score.agreement) / len(score.agreement)
        click.echo(f"Fréchet distance  {score.distance:.4f} ± {score.error:.4f}")
        click.echo(f"Read as intended  {agreement:.1f} %")


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
