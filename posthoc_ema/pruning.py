"""``prune``: keep fewer snapshots of a run, those that matter, and know what that costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_ema.forecast import Forecast, forecast
from posthoc_ema.movement import Movement
from posthoc_ema.profiles import Profile
from posthoc_ema.selection import Pool, growing
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.snapshots import SnapshotStore, as_store


@dataclass(frozen=True, eq=False)
class Pruning:
    """What to keep, what to delete, and what that costs.

    Attributes:
        kept: Snapshots that stay, in order of time.
        doomed: Those that go, or went.
        before: Predicted errors with all snapshots.
        after: Predicted errors with those that stay.
        bytes_freed: Size of what goes or went, less what others grew that had been stored as
            differences from it.
        deleted: Whether they are gone.
    """

    kept: Sequence[Snapshot]
    doomed: Sequence[Snapshot]
    before: Forecast
    after: Forecast
    bytes_freed: int
    deleted: bool

    @property
    def worst_error(self) -> float:
        """Largest predicted error after pruning; NaN where it cannot be told."""
        return float(self.after.predicted_error.max())


def prune(
    snapshots: str | os.PathLike[str] | SnapshotStore,
    sigma_rel: Sequence[float | Profile],
    *,
    keep: int | None = None,
    max_bytes: float | None = None,
    max_error: float | None = None,
    delete: bool = False,
) -> Pruning:
    """Choose the snapshots that matter for averages at the end of a run; delete the others.

    How fast the weights moved is estimated from all snapshots. Times are chosen one by one, all
    tracks of a time together, such that the largest predicted error falls fastest. The last
    snapshot of each track always stays.

    Args:
        snapshots: A folder or store.
        sigma_rel: EMA lengths (or other profiles) that shall remain possible.
        keep: Number of times to keep; or
        max_bytes: size of all that stays, as it is now: snapshots stored as differences from
            deleted ones grow when they are written once more; or
        max_error: largest predicted error, for which as few times as possible are kept. Exactly
            one of the three. If all together have a larger error, all are kept.
        delete: Delete; otherwise only say what would be.

    Returns:
        A :class:`Pruning`.

    Raises:
        TypeError: If not exactly one limit is given.
        ValueError: If a limit leaves less than the last snapshot of each track.
        SnapshotError: If the folder holds anything but intact snapshots of one run.
        SnapshotWriteError: If a file cannot be deleted.
    """
    if sum(limit is not None for limit in (keep, max_bytes, max_error)) != 1:
        raise TypeError("prune takes exactly one of keep, max_bytes and max_error")
    store = as_store(snapshots)
    full = forecast(store, sigma_rel)
    times = np.unique([s.t for s in full.snapshots])
    size = {float(t): 0 for t in times}
    for s in full.snapshots:
        size[float(s.t)] += s.nbytes
    latest = {s.profile: float(s.t) for s in full.snapshots}  # in order of time
    required = sorted(int(np.searchsorted(times, t)) for t in set(latest.values()))

    chosen: set[float] = set()
    for choice in growing(_pool(full), required):
        trial = {float(times[place]) for place in choice.places}
        if keep is not None and len(trial) > keep:
            break
        if max_bytes is not None and sum(size[t] for t in trial) > max_bytes:
            break
        chosen = trial
        if max_error is not None and choice.worst.max() <= _square(full, max_error):
            break
    if not chosen:
        least = sum(size[t] for t in latest.values())
        raise ValueError(
            f"the last snapshot of each track always stays: that takes {len(required)} times and "
            f"{least} bytes; give keep, or max_bytes, at least as much"
        )
    kept = [s for s in full.snapshots if float(s.t) in chosen]
    doomed = [s for s in full.snapshots if float(s.t) not in chosen]
    after, freed = full.using(kept), sum(s.nbytes for s in doomed)
    if delete and doomed:
        freed = store.delete(doomed)
        names = {(s.t, s.profile) for s in kept}
        kept = [s for s in store.scan()[0] if (s.t, s.profile) in names]  # some were rewritten
    return Pruning(kept, doomed, full, after, freed, delete)


def _pool(full: Forecast) -> Pool:
    movement = full.evidence.movement
    if not (np.diff(movement.edges) @ movement.rate) > 0:
        # Nothing is known, or nothing moved: any choice is as good; make one that usually is.
        movement = Movement.constant(float(full.snapshots[-1].t))
    averages = [(float(s.t), s.profile) for s in full.snapshots]
    return Pool.of(averages, full.profiles, [movement], full.evidence.noise)


def _square(full: Forecast, error: float) -> float:
    """Squared error per weight of a relative error."""
    unit = float(full.evidence.relative_error(1.0))
    return np.inf if unit == 0 else (error / unit) ** 2
