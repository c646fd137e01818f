"""``posthoc-ema plan``: which tracks to follow, and when to keep snapshots."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from posthoc_ema.cli.options import (
    Numbers,
    budget_type,
    folder_type,
    json_option,
    sigma_rel_option,
    time_type,
    tracks_type,
)
from posthoc_ema.cli.output import command, echo_json, format_error, table
from posthoc_ema.encoding import ENCODINGS
from posthoc_ema.plan import Plan
from posthoc_ema.plan import plan as make_plan
from posthoc_ema.planning import RATES
from posthoc_ema.snapshots import SnapshotStore
from posthoc_ema.thinning import Thinning


@command("plan")
@click.option(
    "--budget",
    required=True,
    type=budget_type,
    help="Snapshots to keep, one file for each time and track: a number, or a size such as 20GB, "
    "which needs --parameters or --like.",
)
@sigma_rel_option("0.01,0.25")
@click.option(
    "--tracks",
    type=tracks_type,
    help="EMA lengths to track, or how many to choose. Default: two, chosen. Each costs one copy "
    "of the model in memory while training.",
)
@click.option(
    "--t-end",
    type=time_type,
    help="When training ends, in units of t. Without it the end is open: snapshots are deleted "
    "while training, such that what is kept serves at every moment.",
)
@click.option(
    "--every",
    type=time_type,
    help="With --t-end, times are multiples of it; with an open end, the shortest interval.",
)
@click.option(
    "--movement",
    type=click.Choice(RATES),
    default=RATES[0],
    show_default=True,
    help="Shape of the learning rate, which says how fast the weights move; unknown: be prepared "
    "for a constant and for a decaying one.",
)
@click.option(
    "--like",
    type=folder_type,
    help="An earlier run of the same kind: measure there how fast the weights move.",
)
@click.option(
    "--encoding",
    type=click.Choice(list(ENCODINGS)),
    default="float32",
    show_default=True,
    help="How the snapshots will be stored.",
)
@click.option("--parameters", type=float, help="Averaged weights of the model, as in 280e6.")
@json_option
def plan(
    budget: tuple[float, bool],
    sigma_rel: Numbers,
    tracks: Numbers | int | None,
    t_end: float | None,
    every: float | None,
    movement: str,
    like: SnapshotStore | None,
    encoding: str,
    parameters: float | None,
    as_json: bool,
) -> None:
    """Plan which tracks to follow and when to keep snapshots.

    Chooses, for a budget, what keeps the worst error low over the whole range of EMA lengths
    from the shortest to the longest --sigma-rel, and predicts that error. Nothing is written:
    the last line is what to put into the training code.

    Example:
      posthoc-ema plan --budget 32 --t-end 100000
      posthoc-ema plan --budget 20GB --parameters 280e6 --encoding float16 --t-end 100000
      posthoc-ema plan --budget 32 --sigma-rel 0.02,0.15 --every 1000
    """
    amount, in_bytes = budget
    if in_bytes and parameters is None and like is None:
        raise click.UsageError("a budget in bytes needs --parameters or --like")
    size = None
    if in_bytes and parameters is None and like is not None:
        size = float(np.mean([snapshot.nbytes for snapshot in like.list()]))
    made = make_plan(
        amount,
        (min(sigma_rel), max(sigma_rel)),
        tracks,
        t_end=t_end,
        every=every,
        movement=movement,
        like=like,
        encoding=encoding,
        snapshot_bytes=size,
        parameters=parameters if in_bytes else None,
    )
    if as_json:
        echo_json({**_described(made), "code": _code(made, every)})
        return
    tracked = ", ".join(f"{s:.10g}" for s in made.sigma_rel)
    click.echo(f"tracks {tracked}; {len(made.times)} times, {made.snapshots} snapshots")
    if made.t_end is None:
        click.echo("kept at every moment, roughly, as fractions of the time reached:")
        click.echo(", ".join(f"{t:.3g}" for t in made.times) + "\n")
    else:
        click.echo("times " + ", ".join(f"{t:.10g}" for t in made.times) + "\n")
    header, columns = ["sigma_rel", "predicted error"], [made.errors]
    if made.even_errors:
        header, columns = [*header, "evenly spaced"], [*columns, made.even_errors]
    shown = np.linspace(0, len(made.targets) - 1, min(len(made.targets), 9)).round().astype(int)
    rows = [[f"{made.targets[k]:.3g}", *(format_error(c[k]) for c in columns)] for k in shown]
    click.echo(table(header, [*rows, ["worst", *(format_error(max(c)) for c in columns)]]))
    scale = "the RMS of the weights" if like else "the RMS distance that the weights travel"
    click.echo(f"\nErrors are relative to {scale}.\n\n{_code(made, every)}")


def _described(made: Plan) -> dict[str, Any]:
    schedule = made.schedule
    thinning = (
        {"number": schedule.number, "ratio": schedule.ratio, "every": schedule.every}
        if isinstance(schedule, Thinning)
        else None
    )
    even = made.even_errors or (None,) * len(made.errors)
    rows = zip(made.targets, made.errors, even, strict=True)
    return {
        "sigma_rel": made.sigma_rel,
        "times": made.times,
        "t_end": made.t_end,
        "snapshots": made.snapshots,
        "worst_error": made.worst_error,
        "errors": [{"sigma_rel": s, "predicted_error": e, "even": v} for s, e, v in rows],
        "thinning": thinning,
    }


def _code(made: Plan, every: float | None) -> str:
    """What to put into the training code."""
    if isinstance(made.schedule, Thinning):
        low, high = made.targets[0], made.targets[-1]
        schedule = (
            f"plan({made.snapshots}, ({low!r}, {high!r}), {made.sigma_rel!r}, every={every!r})"
            ".schedule"
        )
    else:
        listed = ", ".join(f"{t:.12g}" for t in made.times)
        schedule = f"AtTimes([{listed}])"
    return f"EMA({made.sigma_rel!r}, snapshots=..., schedule={schedule})"
