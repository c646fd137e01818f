"""What kind of foreign snapshots lie at a place, by names and content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posthoc_ema.errors import SnapshotError
from posthoc_ema.importing import checkpoints, edm2, ema_pytorch
from posthoc_ema.importing.foreign import ForeignRun, ForeignSnapshot, Options
from posthoc_ema.importing.layout import is_checkpoint, why_no_weights
from posthoc_ema.profiles import Profile
from posthoc_ema.snapshots import SnapshotStore

KINDS = (edm2.KIND, ema_pytorch.KIND, checkpoints.LISTED, checkpoints.NUMBERED)


def read_run(
    source: Path | Sequence[Path], kind: str | None, csv: Path | None, options: Options
) -> ForeignRun:
    """The snapshots at a place; file names and tables are read, no weights.

    Args:
        source: A folder, a CSV, or several files.
        kind: One of :data:`KINDS`; None: what they look like.
        csv: A table of their times and profiles.
        options: What they do not say themselves.

    Raises:
        SnapshotError: If nothing there is understood.
        ValueError: If there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)} (got {kind!r})")
    if isinstance(source, Path) and source.suffix == ".csv" and csv is None:
        source, csv = source.parent, source
    if csv is not None:
        if kind not in (None, checkpoints.LISTED) or not isinstance(source, Path):
            raise ValueError("csv= goes with the folder that its file names are relative to")
        return _sorted(checkpoints.read_list(csv, source, options), source)
    files = _files(source)
    by_kind = {edm2.KIND: ".pkl", ema_pytorch.KIND: ".pt"}
    chosen = [f for f in files if kind not in by_kind or f.suffix == by_kind[kind]]
    if not chosen:
        raise SnapshotError(f"{_named(source)} holds no snapshots of kind {kind or 'known'}")
    if kind in (None, edm2.KIND):
        pickles = [file for file in chosen if file.suffix == ".pkl" and file.is_file()]
        if kind or edm2.recognise(pickles):
            return _sorted(edm2.read_run(pickles, options), source)
    tracks = [file for file in chosen if file.suffix == ".pt" and file.is_file()]
    if kind == ema_pytorch.KIND or (kind is None and ema_pytorch.recognise(tracks)):
        return _sorted(ema_pytorch.read_run(tracks, options), source)
    if kind == checkpoints.LISTED:
        raise ValueError("kind='list' needs csv=, the table of times and profiles")
    if isinstance(source, Path) and source.is_dir() and SnapshotStore(source).scan()[0]:
        raise SnapshotError(
            f"{source} holds snapshots of this library already; there is nothing to import. To "
            "write them once more, use convert"
        )
    # Folders without a number, such as one of images, are looked into only if there is no other.
    likely = [path for path in chosen if any(map(str.isdigit, path.name)) or not path.is_dir()]
    found = list(filter(is_checkpoint, likely)) or list(filter(is_checkpoint, chosen))
    if not found:
        raise SnapshotError(
            f"{_named(source)} holds nothing that is understood; expected network-snapshot-*.pkl, "
            "{track}.{step}.pt, checkpoints (.safetensors, .pt, folders) with a number in their "
            f"names, or a CSV. What is there: {', '.join(f.name for f in chosen[:5])}"
            + next(filter(None, map(why_no_weights, filter(Path.is_dir, chosen))), "")
        )
    listed = not isinstance(source, Path)
    return _sorted(checkpoints.read_numbered(found, options, from_parents=listed), source)


def _files(source: Path | Sequence[Path]) -> list[Path]:
    if not isinstance(source, Path):
        files = list(source)
    elif source.is_dir():
        # No pipes, which would be waited for, nor links to what is gone.
        there = [path for path in source.iterdir() if path.is_file() or path.is_dir()]
        files = sorted(path for path in there if not path.name.startswith("."))
    else:
        files = [source]
    missing = [path for path in files if not (path.is_file() or path.is_dir())]
    if missing or not files:
        what = f"{missing[0]} is no file or folder that exists" if missing else f"{source} is empty"
        raise SnapshotError(what)
    return files


def _named(source: Path | Sequence[Path]) -> str:
    return str(source if isinstance(source, Path) else source[0].parent)


def _sorted(run: ForeignRun, source: Path | Sequence[Path]) -> ForeignRun:
    """In order of time, each average once."""
    snapshots = sorted(run.snapshots, key=lambda s: (s.t, -getattr(s.profile, "gamma", 0.0)))
    if not snapshots:
        raise SnapshotError(f"{_named(source)} holds no snapshots of a time > 0")
    seen: dict[tuple[float, Profile], ForeignSnapshot] = {}
    for snapshot in snapshots:
        twin = seen.setdefault((snapshot.t, snapshot.profile), snapshot)
        if twin is not snapshot:
            raise SnapshotError(
                f"{twin.path} and {snapshot.path} both hold t={snapshot.t}, "
                f"{snapshot.profile}; leave one of them out: name the files that you mean as "
                "SOURCE, or list them in a CSV"
            )
    return ForeignRun(run.kind, run.unit, snapshots, run.remarks)
