"""``posthoc-ema plot``: pictures of a folder of snapshots."""

from __future__ import annotations

from pathlib import Path

import click

from posthoc_ema.cli.options import (
    Numbers,
    folder_argument,
    method_option,
    out_option,
    picture_type,
    profile_option,
    sigma_rel_option,
    time_option,
    wanted_profiles,
)
from posthoc_ema.cli.output import command, save_figure
from posthoc_ema.profiles import Profile
from posthoc_ema.snapshots import SnapshotStore

KINDS = ("profiles", "coefficients", "error")


@command("plot")
@click.argument("kind", type=click.Choice(KINDS))
@folder_argument
@sigma_rel_option()
@profile_option
@out_option("Where to draw to; its ending says how: png, svg, pdf.", picture_type)
@time_option
@method_option
def plot(
    kind: str,
    store: SnapshotStore,
    sigma_rel: Numbers | None,
    profiles: tuple[Profile, ...],
    out: Path,
    t: float | None,
    method: str,
) -> None:
    """Draw profiles, coefficients or error to a picture.

    Kinds:
      profiles      how each average weights the training history, wanted and reconstructed
      coefficients  what each snapshot in FOLDER contributes to each average
      error         predicted error against EMA length, with the range that can be trusted

    Needs matplotlib: pip install "posthoc-ema[plots]".

    Example:
      posthoc-ema plot profiles run/ema --sigma-rel 0.03,0.15 --out profiles.png
      posthoc-ema plot coefficients run/ema --sigma-rel 0.07 --out coefficients.svg
      posthoc-ema plot error run/ema --out error.pdf
    """
    from posthoc_ema import plots

    if kind == "error":
        if profiles:
            raise click.UsageError("plot error draws over --sigma-rel and takes no --profile")
        axes = plots.plot_error(store, sigma_rel, t=t, method=method)
    else:
        draw = plots.plot_profiles if kind == "profiles" else plots.plot_coefficients
        targets = wanted_profiles(sigma_rel, profiles) or None
        axes = draw(store, targets, t=t, method=method)
    save_figure(axes, out)
    click.echo(str(out))
