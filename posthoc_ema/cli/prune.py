"""``posthoc-ema prune``: keep fewer snapshots, and know what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import numpy as np

from posthoc_ema.cli.options import Numbers, folder_argument, json_option, sigma_rel_option
from posthoc_ema.cli.output import command, echo_json, format_bytes, format_error, note, table
from posthoc_ema.forecast import forecast
from posthoc_ema.snapshots import SnapshotStore

if TYPE_CHECKING:
    from numpy.typing import NDArray


@command("prune")
@folder_argument
@click.option(
    "--keep",
    required=True,
    type=click.IntRange(min=1),
    help="How many times to keep, evenly spaced, the last one always.",
)
@sigma_rel_option("0.01,0.02,0.03,0.05,0.075,0.1,0.15,0.2,0.25")
@click.option("--yes", is_flag=True, help="Delete. Without it, only say what would be deleted.")
@json_option
def prune(store: SnapshotStore, keep: int, sigma_rel: Numbers, yes: bool, as_json: bool) -> None:
    """Delete snapshots, keeping some times evenly spaced.

    Without --yes nothing is deleted: the command shows which files of FOLDER would go, the
    bytes that frees, and what it costs in exactness, as predicted error before and after for
    some EMA lengths. All tracks of a time are kept or deleted together.

    Example:
      posthoc-ema prune run/ema --keep 16
      posthoc-ema prune run/ema --keep 16 --yes
    """
    snapshots = store.list()
    times = np.unique([s.t for s in snapshots])
    chosen = evenly_spaced(times, keep)
    kept = [s for s in snapshots if s.t in chosen]
    doomed = [s for s in snapshots if s.t not in chosen]
    full = forecast(store, sigma_rel)
    pruned = full.using(kept)
    errors = list(zip(sigma_rel, full.predicted_error, pruned.predicted_error, strict=True))
    freed = sum(s.nbytes for s in doomed)
    if yes and doomed:
        freed = store.delete(doomed)
    if as_json:
        echo_json(
            {
                "deleted": yes,
                "delete": [s.path.name for s in doomed],
                "keep": [s.path.name for s in kept],
                "bytes_freed": freed,
                "errors": [{"sigma_rel": s, "before": b, "after": a} for s, b, a in errors],
            }
        )
        return
    for snapshot in doomed:
        click.echo(f"{'deleted' if yes else 'would delete'}  {snapshot.path.name}")
    click.echo(
        f"\n{len(doomed)} of {len(snapshots)} snapshots, {format_bytes(freed)}; "
        f"{len(chosen)} of {len(times)} times stay\n"
    )
    rows = [(f"{s:.10g}", format_error(b), format_error(a)) for s, b, a in errors]
    click.echo(table(("sigma_rel", "predicted error before", "after"), rows))
    if doomed and not yes:
        note("Nothing was deleted; add --yes to delete.")


def evenly_spaced(times: NDArray[Any], keep: int) -> set[float]:
    """The times nearest, in least squares, to the fractions 1/keep, 2/keep, ..., 1 of the last.

    Args:
        times: ``[n]`` rising.
        keep: How many; all, if there are fewer.

    Returns:
        A subset that holds the last time.
    """
    keep = min(keep, len(times))
    # Dynamic programming: cost[i] is that of the best choice so far that ends with time i.
    cost = np.zeros(len(times))
    steps = []
    for k in range(1, keep + 1):
        before = np.arange(len(times))
        if k > 1:
            best = np.minimum.accumulate(cost)
            before = np.maximum.accumulate(np.where(cost == best, before, 0))
            cost, before = np.append(np.inf, best[:-1]), np.append(0, before[:-1])
        cost = cost + (times - times[-1] * k / keep) ** 2
        steps.append(before)
    last, chosen = len(times) - 1, set()
    for before in reversed(steps):
        chosen.add(times[last].item())
        last = before[last]
    return chosen
