"""A run's snapshots in another encoding."""

from __future__ import annotations

import os

from posthoc_ema.encoding import check_encoding
from posthoc_ema.places import Place
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.snapshots import SnapshotStore, as_store


def convert(
    snapshots: str | os.PathLike[str] | SnapshotStore,
    out: str | os.PathLike[str] | Place | SnapshotStore,
    encoding: str,
    *,
    progress: bool | None = None,
) -> list[Snapshot]:
    """Write all snapshots of a run once more, in another encoding, to another folder.

    One snapshot at a time is in memory. What rounding took before stays on record, so that
    predicted errors remain true. Called again after an interruption, it goes on; the old folder
    is left as it is.

    Args:
        snapshots: The folder that ``EMA(snapshots=...)`` wrote, or a store.
        out: The new folder, or its URL, or a store.
        encoding: As in :class:`posthoc_ema.EMA`.
        progress: Show a progress bar; by default if standard error is a terminal.

    Returns:
        The snapshots of the new folder.

    Raises:
        SnapshotError: If a file is damaged, or ``out`` holds anything else.
        SnapshotWriteError: If one cannot be written.
        ValueError: If there is no such encoding, or both folders are the same.

    Example:
        >>> convert("run/ema", "run/ema-small", "delta8")  # doctest: +SKIP
    """
    from tqdm import tqdm

    check_encoding(encoding)
    source = as_store(snapshots)
    target = as_store(out)
    found = source.list()
    if target.path.resolve() == source.path.resolve():
        raise ValueError(f"out must be another folder than {source.path}")
    present = {(s.t, s.profile) for s in target.scan()[0]}
    waiting = [s for s in found if (s.t, s.profile) not in present]
    newest = {s.profile: s for s in found}  # in order of time
    disable = None if progress is None else not progress  # None: only on a terminal
    with tqdm(total=len(waiting), desc="convert", unit="file", disable=disable) as bar:
        for snapshot in waiting:
            target.take(snapshot, encoding, newest[snapshot.profile] is snapshot)
            bar.update()
    return target.list()
