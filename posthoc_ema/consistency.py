"""Whether the snapshots of a folder belong together."""

from __future__ import annotations

from collections.abc import Sequence

from posthoc_ema.errors import ForeignSnapshotError, StructureError
from posthoc_ema.profiles import Profile
from posthoc_ema.snapshot_file import Snapshot


def check_one_run(snapshots: Sequence[Snapshot]) -> None:
    """Make sure that snapshots are of one run and one structure, each time and profile once.

    Raises:
        ForeignSnapshotError: If not of one run, or if there are two of one.
        StructureError: If names or shapes differ.
    """
    first = snapshots[0]
    seen: dict[tuple[float, Profile], Snapshot] = {}
    for snapshot in snapshots:
        if snapshot.run.run_id != first.run.run_id:
            raise ForeignSnapshotError(
                f"{first.path} and {snapshot.path} belong to different runs "
                f"({first.run.run_id}, {snapshot.run.run_id}); move one run to another folder"
            )
        twin = seen.setdefault((snapshot.t, snapshot.profile), snapshot)
        if twin is not snapshot:
            raise ForeignSnapshotError(
                f"{twin.path} and {snapshot.path} both hold t={snapshot.t}, {snapshot.profile}; "
                "delete or move one of them"
            )
        _check_structure(first, snapshot)


def _check_structure(first: Snapshot, other: Snapshot) -> None:
    for name in dict.fromkeys((*first.averages, *other.averages)):
        if name not in first.averages or name not in other.averages:
            missing = (other if name in first.averages else first).path
            raise StructureError(f"{missing} lacks {name!r}, which other snapshots of its run hold")
        a, b = first.entries[name].shape, other.entries[name].shape
        if a != b:
            raise StructureError(
                f"{name} has shape {a} in {first.path} but {b} in {other.path}; "
                "snapshots of one run must agree"
            )
