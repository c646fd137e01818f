"""Deleting snapshots, and writing once more those that were predicted from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from posthoc_ema.chain import with_inputs
from posthoc_ema.errors import SnapshotError
from posthoc_ema.folder import Folder, stem
from posthoc_ema.journal import REWRITTEN, exchange
from posthoc_ema.locking import writing
from posthoc_ema.places import RemotePath, looked_at
from posthoc_ema.prediction import Memory, refinement_path
from posthoc_ema.reencode import dependants, write_again
from posthoc_ema.removal import current, removal_order
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.tensorfile import SUFFIX


def delete(folder: Folder, snapshots: Iterable[Snapshot], progress: Callable[[int], object]) -> int:
    """Delete snapshots of a folder; return the bytes freed.

    Arguments and errors are those of :meth:`posthoc_ema.SnapshotStore.delete`.
    """
    going = {snapshot.path for snapshot in snapshots}
    for path in going:
        if path.parent != folder.path:
            raise SnapshotError(f"{path} is not in {folder.path}")
    before = folder.nbytes()
    with writing(folder.path):
        present = folder.everything()[0]
        for snapshot in present:
            pair = {snapshot.path, (snapshot.base or snapshot).path}
            going |= pair if pair & going else set()
        # Else one that was written once more would come back as it was before.
        names = {(s.run.run_id, s.t, s.profile): s.rewrites for s in present if s.path in going}
        going |= {
            s.path
            for s in present
            if names.get((s.run.run_id, s.t, s.profile), s.rewrites) != s.rewrites
        }
        kept = current([s for s in present if s.path not in going])
        again = dependants(kept, [s for s in present if s.path in going])
        rewritten = {s.path for s in again}
        others = [s for s in kept if s.path not in rewritten]
        new = _write_again(folder, again, others, present, progress) if again else set()
        stay = {s.path for s in with_inputs(others)}
        gone = [
            path
            for path in removal_order([s for s in present if s.path not in stay])
            if path.name not in new
        ]
        if isinstance(folder.path, RemotePath):
            for path in gone:
                path.unlink(missing_ok=True)
        else:
            exchange(folder.path, [str(p.relative_to(folder.path)) for p in gone], sorted(new))
    return before - folder.nbytes()


def _write_again(
    folder: Folder,
    again: Sequence[Snapshot],
    others: Sequence[Snapshot],
    present: Sequence[Snapshot],
    progress: Callable[[int], object],
) -> set[str]:
    """New files, in a hidden folder or under names of their own; these names."""
    remote = isinstance(folder.path, RemotePath)
    place = folder.path if remote else folder.path / REWRITTEN
    place.mkdir(exist_ok=True)
    memory, written = Memory(), set[str]()
    refined = {s.base.path for s in again if s.base is not None}  # their averages are coarser
    for snapshot in (s for s in again if s.path not in refined):
        new = folder.named(looked_at(place), written, others)
        earlier = sorted([*others, *new], key=lambda s: s.t)
        t, profile = snapshot.t, snapshot.profile
        number = 1 + max(s.rewrites for s in present if (s.t, s.profile) == (t, profile))
        path = place / (snapshot.base or snapshot).path.name
        if remote:
            path = place / f"{stem(t, profile)}.rewritten-{number}{SUFFIX}"
        write_again(
            snapshot,
            path,
            snapshot.encoding,
            [s for s in earlier if s.t <= snapshot.t],
            memory,
            snapshot.refines,
            number,
            progress,
        )
        written |= {p.name for p in (path, refinement_path(path)) if p.exists()}
    return written
