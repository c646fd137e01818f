"""What a snapshot folder holds, complete or not: its files, as they are found."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from posthoc_ema.chain import connected
from posthoc_ema.errors import ForeignSnapshotError, SnapshotError
from posthoc_ema.journal import JOURNAL
from posthoc_ema.locking import writing
from posthoc_ema.parts import FOLDER as PARTS
from posthoc_ema.places import Place, RemotePath, looked_at
from posthoc_ema.profiles import PowerFunction, Profile
from posthoc_ema.reading import for_each
from posthoc_ema.removal import current
from posthoc_ema.snapshot_file import RunIdentity, Snapshot
from posthoc_ema.tensorfile import SUFFIX


class Folder:
    """The files of a snapshot folder; each header is read once.

    Args:
        path: The folder.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self._headers: dict[Place, tuple[tuple[int | str, int], Snapshot]] = {}

    def everything(self) -> tuple[list[Snapshot], Sequence[SnapshotError]]:
        """All files that can be read, in order, and an error for each that is not a snapshot."""
        if not isinstance(self.path, RemotePath) and (self.path / JOURNAL).exists():
            with writing(self.path):  # a deletion was killed half-way
                pass
        snapshots: list[Snapshot] = []
        problems: list[SnapshotError] = []
        for opened in for_each(self._try_to_open, list(self.files()), self.path):
            if isinstance(opened, SnapshotError):
                problems.append(opened)
            elif opened is not None:
                snapshots.append(opened)
        found, broken = connected(snapshots)
        found.sort(key=lambda s: (s.t, -getattr(s.profile, "gamma", 0.0), s.path.name))
        return found, [*problems, *broken]

    def own(self, run: RunIdentity) -> Sequence[Snapshot]:
        """All snapshots, provided that they belong to this run."""
        snapshots, problems = self.everything()
        if problems:
            raise problems[0]
        for snapshot in snapshots:
            if snapshot.run.run_id != run.run_id:
                raise foreign(snapshot, run)
        return snapshots

    def nbytes(self) -> int:
        """Size of all files."""
        folder = looked_at(self.path)
        parts = (folder / PARTS).glob(f"*{SUFFIX}")
        return sum(path.stat().st_size for path in (*self.files(folder), *parts))

    def named(
        self, folder: Place, names: Collection[str], others: Sequence[Snapshot]
    ) -> list[Snapshot]:
        """Snapshots of some names in a folder, predicted from each other and from others."""
        own = [self.open(folder / name) for name in sorted(names)]
        return [s for s in connected([*others, *own])[0] if s.path in {o.path for o in own}]

    def files(self, folder: Place | None = None) -> Iterator[Place]:
        """All that are meant to be snapshots, parts apart."""
        folder = looked_at(self.path) if folder is None else folder
        if folder.is_dir():
            found: Iterator[Place] = folder.glob(f"*{SUFFIX}")
            for path in sorted(found, key=lambda path: path.name):
                if not path.name.startswith(".") and path.is_file():
                    yield path

    def _try_to_open(self, path: Place) -> Snapshot | SnapshotError | None:
        try:
            return self.open(path)
        except FileNotFoundError:
            return None  # pruned, or set aside, since the folder was listed
        except SnapshotError as error:
            return error

    def open(self, path: Place) -> Snapshot:
        """The header of one file.

        Raises:
            FileNotFoundError: If there is none.
            SnapshotError: If it is no snapshot.
        """
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        known = self._headers.get(path)
        if known is None or known[0] != stamp:
            known = self._headers[path] = (stamp, Snapshot.open(path))
        return known[1]


def seen(found: Sequence[Snapshot]) -> list[Snapshot]:
    """Of all files, those that stand for a snapshot: what was written last, and finest."""
    snapshots = current(found)
    refined = {s.base.path for s in snapshots if s.base is not None}
    return [s for s in snapshots if s.path not in refined]


def taken(path: Place) -> ForeignSnapshotError:
    """The place of a snapshot is not free."""
    return ForeignSnapshotError(
        f"{path} already exists, from the same run and time; two processes seem to "
        "write the same run. Give snapshots= to one of them only"
    )


def foreign(snapshot: Snapshot, run: RunIdentity) -> ForeignSnapshotError:
    """There is a snapshot of another run."""
    return ForeignSnapshotError(
        f"{snapshot.path} belongs to another run ({snapshot.run.run_id}, this one is "
        f"{run.run_id}). To continue that run, give its tracker state to "
        "EMA.load_state_dict before the first update; for a new run, give another "
        "folder; if several processes train one model, give snapshots= to one of them"
    )


def stem(t: float, profile: Profile) -> str:
    """File name for people; programs read the metadata. Different snapshots, different names."""
    time = f"{t:012d}" if isinstance(t, int) else repr(t)
    if isinstance(profile, PowerFunction):
        return f"t={time}_sigma_rel={profile.sigma_rel!r}"
    return f"t={time}_" + "_".join(f"{key}={value}" for key, value in profile.to_dict().items())
