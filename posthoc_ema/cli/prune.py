"""``posthoc-ema prune``: keep fewer snapshots, and know what that costs."""

from __future__ import annotations

import click

from posthoc_ema.cli.options import (
    Numbers,
    bytes_type,
    folder_argument,
    json_option,
    sigma_rel_option,
)
from posthoc_ema.cli.output import (
    DataSaysNo,
    command,
    echo_json,
    format_bytes,
    format_error,
    note,
    table,
)
from posthoc_ema.pruning import prune as prune_store
from posthoc_ema.snapshots import SnapshotStore


@command("prune")
@folder_argument
@click.option("--keep", type=click.IntRange(min=1), help="How many times to keep; or")
@click.option("--bytes", "max_bytes", type=bytes_type, help="size of all that stays (20GB); or")
@click.option(
    "--max-error",
    type=click.FloatRange(min=0, min_open=True),
    help="largest predicted error over --sigma-rel, for which as little as possible is kept. "
    "Status 1 if all snapshots together have a larger one.",
)
@sigma_rel_option("0.01,0.02,0.03,0.05,0.075,0.1,0.15,0.2,0.25")
@click.option("--yes", is_flag=True, help="Delete. Without it, only say what would be deleted.")
@json_option
def prune(
    store: SnapshotStore,
    keep: int | None,
    max_bytes: float | None,
    max_error: float | None,
    sigma_rel: Numbers,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete snapshots, keeping those that matter.

    Keeps the times that make the largest predicted error over --sigma-rel small, for averages at
    the end of the run: say which lengths you care for. How fast the weights moved is estimated
    from FOLDER. All tracks of a time stay or go together, and the last time always stays.

    Without --yes nothing is deleted: the command shows which files would go, the bytes that
    frees, and what it costs, as predicted error before and after.

    Example:
      posthoc-ema prune run/ema --keep 16
      posthoc-ema prune run/ema --bytes 20GB --sigma-rel 0.05,0.06,...,0.15
      posthoc-ema prune run/ema --max-error 0.003 --yes
    """
    if sum(limit is not None for limit in (keep, max_bytes, max_error)) != 1:
        raise click.UsageError("give exactly one of --keep, --bytes and --max-error")
    found = prune_store(
        store, sigma_rel, keep=keep, max_bytes=max_bytes, max_error=max_error, delete=yes
    )
    kept, doomed = found.kept, found.doomed
    before, after = found.before.predicted_error, found.after.predicted_error
    errors = list(zip(sigma_rel, before, after, strict=True))
    if as_json:
        echo_json(
            {
                "deleted": yes,
                "delete": [path.name for s in doomed for path in s.files],
                "keep": [path.name for s in kept for path in s.files],
                "bytes_freed": found.bytes_freed,
                "bytes_kept": sum(s.nbytes for s in kept),
                "errors": [{"sigma_rel": s, "before": b, "after": a} for s, b, a in errors],
                "worst": {"before": before.max(), "after": after.max()},
            }
        )
    else:
        for snapshot in doomed:
            click.echo(f"{'deleted' if yes else 'would delete'}  {snapshot.path.name}")
        times, all_times = {s.t for s in kept}, {s.t for s in (*kept, *doomed)}
        click.echo(
            f"\n{len(doomed)} of {len(kept) + len(doomed)} snapshots, "
            f"{format_bytes(found.bytes_freed)}; {len(times)} of {len(all_times)} times stay\n"
        )
        rows = [(f"{s:.10g}", format_error(b), format_error(a)) for s, b, a in errors]
        worst = ("worst", format_error(before.max()), format_error(after.max()))
        click.echo(table(("sigma_rel", "predicted error before", "after"), [*rows, worst]))
    if doomed and not yes:
        note("Nothing was deleted; add --yes to delete.")
    if max_error is not None and not found.worst_error <= max_error:
        raise DataSaysNo(
            f"all snapshots together have a predicted error of {format_error(before.max())}, "
            f"above {max_error:g}: nothing can go"
        )
