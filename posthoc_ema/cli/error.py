"""``posthoc-ema error``: how exactly can each length be reconstructed."""

from __future__ import annotations

from pathlib import Path

import click

from posthoc_ema.cli.options import (
    Numbers,
    folder_argument,
    json_option,
    method_option,
    picture_type,
    sigma_rel_option,
    time_option,
)
from posthoc_ema.cli.output import (
    DataSaysNo,
    command,
    echo_json,
    format_error,
    note,
    save_figure,
    table,
)
from posthoc_ema.forecast import forecast
from posthoc_ema.snapshots import SnapshotStore


@command("error")
@folder_argument
@sigma_rel_option("0.01,0.02,...,0.25")
@time_option
@method_option
@click.option(
    "--max-error",
    type=click.FloatRange(min=0, min_open=True),
    help="Exit with status 1 if a predicted error is above this, or cannot be told.",
)
@click.option(
    "--plot",
    "picture",
    type=picture_type,
    help='Draw the curve to this file (png, svg, pdf). Needs "posthoc-ema[plots]".',
)
@json_option
def error(
    store: SnapshotStore,
    sigma_rel: Numbers,
    t: float | None,
    method: str,
    max_error: float | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Predict how exactly each length can be reconstructed.

    The predicted error is the expected RMS difference between the reconstruction and the true
    average, relative to the RMS of the weights. It follows from how far the snapshots in FOLDER
    lie apart; about a megabyte of each is read.

    Example:
      posthoc-ema error run/ema
      posthoc-ema error run/ema --sigma-rel 0.02,0.04,...,0.2 --max-error 0.01
      posthoc-ema error run/ema --plot error.png
    """
    result = forecast(store, sigma_rel, t=t, method=method)
    predicted, profile_error = result.predicted_error, result.solution.profile_error
    # Written so that NaN exceeds every limit: what cannot be told is no yes.
    exceeds = [max_error is not None and not value <= max_error for value in predicted]
    rows = list(zip(sigma_rel, predicted, profile_error, exceeds, strict=True))
    unit = result.snapshots[0].run.unit
    if picture is not None:
        from posthoc_ema.plots import plot_error

        axes = plot_error(store, sigma_rel, t=t, method=method, max_error=max_error)
        save_figure(axes, picture)
    if as_json:
        keys = ("sigma_rel", "predicted_error", "profile_error", "exceeds")
        echo_json(
            {
                "t": result.t,
                "unit": unit,
                "method": method,
                "max_error": max_error,
                "errors": [dict(zip(keys, row, strict=True)) for row in rows],
                "remarks": result.evidence.remarks,
            }
        )
    else:
        header = ["sigma_rel", "predicted error", "profile error"]
        cells = [[f"{s:.10g}", format_error(p), format_error(q)] for s, p, q, _ in rows]
        if max_error is not None:
            header.append(f"at most {max_error:g}")
            for row, bad in zip(cells, exceeds, strict=True):
                row.append("NO" if bad else "yes")
        click.echo(f"average at t={result.t} {unit}, from {len(result.snapshots)} snapshots\n")
        click.echo(table(header, cells))
    for remark in result.evidence.remarks:
        note(f"Note: {remark}")
    if any(exceeds):
        raise DataSaysNo(
            f"the predicted error of {sum(exceeds)} of {len(exceeds)} lengths is above "
            f"{max_error:g}; more snapshots, or tracks nearer to those lengths, lower it"
        )
