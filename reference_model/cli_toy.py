"""The command that shows guidance on points in the plane: toy."""

from __future__ import annotations

from pathlib import Path

import click

from reference_model.cli_support import (
    errors_as_messages,
    quiet_option,
    set_threads,
    threads_option,
)


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for toy2d.png and the networks; these are not trained again.",
)
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Training steps of the main network; the guides take an eighth.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Points of one step.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="Points that each method generates.",
)
@click.option("--seed", default=0, show_default=True, help="Of training and sampling.")
@threads_option
@quiet_option
def toy(
    out: Path,
    iterations: int,
    batch_size: int,
    samples: int,
    seed: int,
    threads: int | None,
    quiet: bool,
) -> None:
    """Compare ways of guidance on points in the plane, where the truth is known.

    Two classes are trees of thin branches. A network learns the score of one of them; its samples
    are drawn without guidance, with classifier-free guidance, with autoguidance by a smaller and
    less trained network, and with a score that is merely made longer. toy2d.png shows what each
    does: outliers are samples where data are rare, coverage is how much of the samples' mass lies
    on the right branches. Training takes minutes; with --iterations 512 one, for a rough picture.
    """
    from reference_model.toy2d_figure import run_toy

    set_threads(threads)
    with errors_as_messages():
        path, methods = run_toy(
            out,
            iterations=iterations,
            batch_size=batch_size,
            samples=samples,
            seed=seed,
            progress=not quiet,
        )
    for method in methods:
        outliers, coverage = 100 * method.outliers, 100 * method.coverage
        click.echo(f"{method.name:<36} outliers {outliers:5.2f} %   coverage {coverage:5.1f} %")
    click.echo(f"Wrote {path}")
