"""The snapshot store: the only code that knows which files make up a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from posthoc_ema.chain import with_inputs
from posthoc_ema.consistency import check_one_run
from posthoc_ema.deletion import delete
from posthoc_ema.draft import sync_directory
from posthoc_ema.errors import ForeignSnapshotError, SnapshotError
from posthoc_ema.folder import Folder, foreign, seen, stem, taken
from posthoc_ema.journal import exchange
from posthoc_ema.locking import translated, writing
from posthoc_ema.parts import FOLDER as PARTS
from posthoc_ema.parts_writing import WrittenPart, part_name, write_index, write_part
from posthoc_ema.places import Place, RemotePath, as_place, looked_at
from posthoc_ema.prediction import Memory, refinement_path, write_predicted
from posthoc_ema.profiles import Profile
from posthoc_ema.reencode import write_again
from posthoc_ema.removal import current, removal_order, set_aside
from posthoc_ema.snapshot_file import (
    AverageSource,
    CopySource,
    RunIdentity,
    Snapshot,
)
from posthoc_ema.snapshot_writing import Magnitude
from posthoc_ema.tensorfile import SUFFIX

ABANDONED = "abandoned"

Snapshots = list[Snapshot]  # inside the class, ``list`` is its method


class SnapshotStore:
    """A folder of snapshots of one run.

    Args:
        path: The folder; made by the first write. A local path, the URL of a folder on any file
            system that fsspec knows, or a path of universal_pathlib.
        storage_options: Credentials, endpoint and whatever else the file system of a URL takes.
            Functions that take a folder or URL take a store too.

    Raises:
        ModuleNotFoundError: If a package that the URL needs is not installed.

    Example:
        >>> store = SnapshotStore("run/ema")  # doctest: +SKIP
        >>> [(s.t, s.profile.sigma_rel) for s in store.list()]  # doctest: +SKIP
        [(1000, 0.05), (1000, 0.1)]
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Place,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = as_place(path, storage_options)
        self._folder = Folder(self.path)
        self._memory = Memory()

    def __repr__(self) -> str:
        return f"SnapshotStore({str(self.path)!r})"

    def list(self) -> Snapshots:
        """All snapshots by time, then by profile; headers alone are read.

        Raises:
            SnapshotError: If the folder is missing, empty, or holds anything but intact
                snapshots of one run with one structure; the message names the file.
        """
        snapshots, problems = self.scan()
        if problems:
            raise problems[0]
        if not snapshots:
            state = "holds no snapshots" if self.path.is_dir() else "does not exist"
            raise SnapshotError(
                f"{self.path} {state}; give the folder that EMA(snapshots=...) wrote"
            )
        check_one_run(snapshots)
        return snapshots

    def scan(self) -> tuple[Snapshots, Sequence[SnapshotError]]:
        """All readable snapshots in order, and an error for each file that is not one.

        Where there are a snapshot and its refinement, the refinement stands for both.

        Raises:
            SnapshotError: If a folder elsewhere cannot be listed.
        """
        try:
            found, problems = self._folder.everything()
        except OSError as error:
            if not isinstance(self.path, RemotePath):
                raise
            raise SnapshotError(
                f"cannot list {self.path}: {error.strerror}; is the URL right, do the credentials "
                "allow it, and can it be reached?"
            ) from error
        return seen(found), problems

    def verify(self, progress: Callable[[int], object] = lambda nbytes: None) -> Snapshots:
        """Read every byte of every snapshot; return them if all are intact.

        Raises:
            SnapshotError: The first problem found.
        """
        snapshots = self.list()
        for snapshot in snapshots:
            snapshot.verify(progress)
        return snapshots

    def claim(self, run: RunIdentity, t: float) -> None:
        """Make the folder ready for a run that is at time ``t``.

        Snapshots of the same run later than ``t`` belong to a future that was abandoned by
        resuming from an older checkpoint: they are moved to a subfolder, never deleted.

        Raises:
            ForeignSnapshotError: If the folder holds anything else.
            SnapshotWriteError: If it cannot be written to.
        """
        with writing(self.path):
            own = self._folder.own(run)
            parts = {path for s in own for path in s.files}
            for leftover in (
                *self.path.glob(f".*{SUFFIX}.*.tmp"),
                *(self.path / PARTS).glob(f".*{SUFFIX}.*.tmp"),
                *(path for path in (self.path / PARTS).glob(f"*{SUFFIX}") if path not in parts),
            ):
                leftover.unlink(missing_ok=True)
            future = [s for s in own if s.t > t]
            if future:
                self._set_aside(future, t)
            if isinstance(self.path, RemotePath):
                self._delete_superseded([s for s in own if s.t <= t])

    def _set_aside(self, future: Snapshots, t: float) -> None:
        attic = self.path / ABANDONED
        attic.mkdir(exist_ok=True)
        taken = [int(p.name[:3]) for p in attic.iterdir() if p.name[:3].isdigit()]
        moved = f"{ABANDONED}/{max(taken, default=0) + 1:03d}-after-t={t}"
        if isinstance(self.path, RemotePath):
            set_aside(future, self.path, self.path / moved)
            return
        target = self.path / moved
        target.mkdir()
        if any(s.parts for s in future):
            (target / PARTS).mkdir()
        files = dict.fromkeys(str(p.relative_to(self.path)) for s in future for p in s.files)
        exchange(self.path, [], [], {name: f"{moved}/{name}" for name in files})

    def _delete_superseded(self, snapshots: Snapshots) -> None:
        """Finish deletions that were killed half-way where files cannot be exchanged at once."""
        needed = {s.path for s in with_inputs(current(snapshots))}
        for path in removal_order([s for s in snapshots if s.path not in needed]):
            path.unlink(missing_ok=True)

    def write(
        self,
        run: RunIdentity,
        t: float,
        profile: Profile,
        averages: Sequence[AverageSource],
        copies: Sequence[CopySource] = (),
        aliases: Mapping[str, str] | None = None,
        encoding: str = "float32",
        rounded_before: float = 0.0,
    ) -> Snapshot:
        """Write one snapshot, durable and complete when this returns.

        Args and errors: as :func:`posthoc_ema.snapshot_writing.write_snapshot`, and

        Raises:
            ForeignSnapshotError: If the folder holds snapshots of another run, or this one.
            SnapshotWriteError: If the file cannot be written; earlier ones are unharmed.
        """
        with writing(self.path):
            path, earlier = self._new_place(run, t, profile)
            with _alone(path):
                write_predicted(
                    path,
                    run,
                    t,
                    profile,
                    averages,
                    copies,
                    aliases,
                    encoding,
                    earlier,
                    self._memory,
                    rounded_before=rounded_before,
                )
            self._drop_refinements(s for s in earlier if s.profile == profile)
            return self._written(path, run)

    def check_new(self, run: RunIdentity, t: float, profile: Profile) -> None:
        """Make sure that a snapshot can be written.

        Raises:
            ForeignSnapshotError: If the folder holds snapshots of another run, or this one.
            SnapshotWriteError: If it cannot be written to.
        """
        with writing(self.path):
            self._new_place(run, t, profile)

    def write_part(
        self,
        run: RunIdentity,
        t: float,
        profile: Profile,
        averages: Sequence[AverageSource],
        copies: Sequence[CopySource],
        encoding: str,
        sizes: Mapping[str, Magnitude],
        number: int,
        of: int,
    ) -> WrittenPart | None:
        """Write what process ``number`` of several holds; invisible until :meth:`join`.

        Args and errors: as :func:`posthoc_ema.parts_writing.write_part`.
        """
        path = self.path / PARTS / part_name(stem(t, profile), number, of)
        with translated(self.path):
            return write_part(path, run, t, profile, averages, copies, encoding, sizes)

    def join(
        self,
        run: RunIdentity,
        t: float,
        profile: Profile,
        averages: Sequence[tuple[str, str]],
        copies: Sequence[CopySource],
        aliases: Mapping[str, str],
        encoding: str,
        written: Sequence[WrittenPart],
        sizes: Mapping[str, Magnitude],
    ) -> Snapshot:
        """Make parts on disk a snapshot, at once; of one process, when all have written theirs.

        Args and errors: as :func:`posthoc_ema.parts_writing.write_index` and :meth:`write`.
        """
        with writing(self.path):
            path, earlier = self._new_place(run, t, profile)
            with _alone(path):
                write_index(
                    path, run, t, profile, averages, copies, aliases, encoding, written, sizes
                )
            self._drop_refinements(s for s in earlier if s.profile == profile)
            return self._written(path, run)

    def _new_place(self, run: RunIdentity, t: float, profile: Profile) -> tuple[Place, Snapshots]:
        """Where a snapshot goes, and those that are there."""
        path = self.path / f"{stem(t, profile)}{SUFFIX}"
        earlier = current(self._folder.own(run))
        for s in earlier:
            if s.path == path or (s.t, s.profile) == (t, profile):
                raise taken(s.path)
        return path, earlier

    def take(self, snapshot: Snapshot, encoding: str, newest: bool) -> Snapshot:
        """Write a snapshot of another store here, in an encoding of one's own.

        Args:
            snapshot: Which.
            encoding: As in :meth:`write`.
            newest: Whether it is the newest of its track.

        Raises:
            ForeignSnapshotError: If the folder holds snapshots of another run, or this one.
            CorruptSnapshotError: If it was damaged since it was written.
            SnapshotWriteError: If the file cannot be written.
        """
        path = self.path / (snapshot.base or snapshot).path.name
        with writing(self.path):
            earlier = [s for s in current(self._folder.own(snapshot.run)) if s.t <= snapshot.t]
            if path in [s.path for s in earlier]:
                raise ForeignSnapshotError(f"{path} already exists")
            with _alone(path):
                write_again(snapshot, path, encoding, earlier, self._memory, newest)
            return self._written(path, snapshot.run)

    def check_unchanged(self, written: Iterable[Snapshot]) -> None:
        """Make sure that nobody replaced these snapshots; that they were pruned is fine.

        Raises:
            ForeignSnapshotError: If a file of that name now holds something else: two processes
                continue one run, say one that was taken for dead.
        """
        folder = looked_at(self.path)
        for snapshot in (s.base or s for s in written):
            try:
                found = self._folder.open(folder / snapshot.path.name)
            except FileNotFoundError:
                continue
            # Pruning by another process may write a snapshot of a delta encoding once more.
            if found.digests != snapshot.digests and found.rewrites <= snapshot.rewrites:
                raise ForeignSnapshotError(
                    f"{snapshot.path} was replaced since this process wrote it; two processes seem "
                    "to write the same run. Stop one of them"
                )

    def delete(
        self,
        snapshots: Iterable[Snapshot],
        progress: Callable[[int], object] = lambda nbytes: None,
    ) -> int:
        """Delete snapshots of this store; return the bytes freed.

        Others that were predicted from them are written once more, from what stays; a kill at
        any instant leaves either the old files or the new ones.

        Args:
            snapshots: Which.
            progress: Called with the number of bytes read for those written once more.

        Raises:
            SnapshotError: If one is not of this store, or another is damaged.
            SnapshotWriteError: If files cannot be written or deleted.
        """
        self._memory.clear()
        return delete(self._folder, snapshots, progress)

    def _drop_refinements(self, snapshots: Iterable[Snapshot]) -> None:
        """Newer snapshots are on disk: of these the coarser files will do."""
        dropped = [s for s in snapshots if s.refines]
        for snapshot in dropped:
            snapshot.path.unlink(missing_ok=True)
        if dropped:
            sync_directory(self.path)

    def _written(self, path: Place, run: RunIdentity) -> Snapshot:
        """What was just written; taken back if somebody else wrote at the same time.

        Where nothing can be locked, that shows only now.
        """
        found, problems = self._folder.everything()
        either = (path, refinement_path(path))
        problem = next(
            (foreign(s, run) for s in found if s.run.run_id != run.run_id),
            None if any(s.path == path for s in found) else next(iter(problems), None),
        )
        if problem is not None:
            for place in reversed(either):
                place.unlink(missing_ok=True)
            raise problem
        return next(s for s in seen(found) if s.path in either)


@contextmanager
def _alone(path: Place) -> Iterator[None]:
    """What another process wrote to the same place at the same time is no trouble of the disk."""
    try:
        yield
    except FileExistsError as error:
        raise taken(path) from error


def as_store(snapshots: str | os.PathLike[str] | Place | SnapshotStore) -> SnapshotStore:
    """A store as it is, or that of a folder."""
    return snapshots if isinstance(snapshots, SnapshotStore) else SnapshotStore(snapshots)
