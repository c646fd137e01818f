"""In which order files go, so that what is left can be read whenever a kill comes.

Where files can be exchanged together (see :mod:`posthoc_ema.journal`) that is enough. On other
file systems nothing can be moved or exchanged at once: new files are written under names of their
own, and while there are two of one snapshot, one of them counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from posthoc_ema.chain import with_inputs
from posthoc_ema.places import Place, RemotePath
from posthoc_ema.reading import for_each
from posthoc_ema.snapshot_file import Snapshot


def removal_order(snapshots: Sequence[Snapshot]) -> list[Place]:
    """All files of snapshots: each before those without which it could not be read."""
    own = {snapshot.path for snapshot in snapshots}
    going = [s for s in reversed(with_inputs(snapshots)) if s.path in own]
    files = [path for s in going for path in (s.path, *(s.parts.paths if s.parts else ()))]
    return list(dict.fromkeys(files))


def current(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Snapshots without those that others stand for.

    A snapshot that is written once more is a file of another name beside the old one, for a
    while. The last one written counts; but one that is refined before one that is not yet.
    """
    writings: dict[object, dict[int, bool]] = {}
    for s in snapshots:
        found = writings.setdefault((s.run.run_id, s.t, s.profile), {})
        found[s.rewrites] = found.get(s.rewrites, False) or s.refines
    best = {key: max((refined, n) for n, refined in w.items())[1] for key, w in writings.items()}
    return [s for s in snapshots if s.rewrites == best[s.run.run_id, s.t, s.profile]]


def set_aside(snapshots: Sequence[Snapshot], folder: RemotePath, target: RemotePath) -> None:
    """Move snapshots of a remote folder to another: all copies are there before a file goes.

    Args:
        snapshots: Which; nothing that stays needs them.
        folder: Where they are.
        target: Where they shall be.
    """
    files = [path for path in removal_order(snapshots) if isinstance(path, RemotePath)]
    for _ in for_each(lambda path: path.copy_to(target / path.relative_to(folder)), files, folder):
        pass
    for path in files:
        path.unlink(missing_ok=True)
