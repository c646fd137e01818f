"""Other people's snapshots into a store: one file after the other, resumable."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.digests import Digest
from posthoc_ema.draft import write_text_atomically
from posthoc_ema.encoding import (
    all_finite,
    as_numpy,
    check_encoding,
    decode_into,
)
from posthoc_ema.errors import (
    CorruptSnapshotError,
    ForeignSnapshotError,
    NonFiniteError,
    SnapshotError,
)
from posthoc_ema.importing.foreign import (
    ForeignRun,
    ForeignSnapshot,
    ForeignTensor,
    Options,
)
from posthoc_ema.importing.recognise import read_run
from posthoc_ema.importing.region import Region
from posthoc_ema.places import Place
from posthoc_ema.profiles import Profile
from posthoc_ema.snapshot_file import AverageSource, CopySource, RunIdentity, Snapshot
from posthoc_ema.snapshots import SnapshotStore, as_store

if TYPE_CHECKING:
    from numpy.typing import NDArray

RECORD = ".imported.json"
"""In the store: which files its snapshots were made from."""

_MOST_VIEWED = 16  # times the bytes of a file, by tensors that overlap
_CHUNK = 1 << 20  # elements converted at once
_PIECE = 1 << 24  # bytes digested at once


@dataclass(frozen=True, eq=False)
class Import:
    """What was recognised, and what was made of it.

    Attributes:
        kind: ``"edm2"``, ``"ema-pytorch"``, ``"list"`` or ``"checkpoints"``.
        unit: Name of the unit of time.
        files: (file or folder, t, profile) of each snapshot, in order of time.
        remarks: What was left out or taken for granted, for people.
        snapshots: Those of the store; none after a dry run.
        skipped: How many were there already.
    """

    kind: str
    unit: str
    files: Sequence[tuple[Path, float, Profile]]
    remarks: tuple[str, ...]
    snapshots: Sequence[Snapshot] = field(default=(), repr=False)
    skipped: int = 0


def import_snapshots(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | Place | SnapshotStore,
    *,
    kind: str | None = None,
    sigma_rel: float | Sequence[float] | None = None,
    profile: Profile | None = None,
    csv: str | os.PathLike[str] | None = None,
    update_every: int = 1,
    unit: str | None = None,
    key: str | None = None,
    subfolder: str | None = None,
    encoding: str = "float32",
    allow: Sequence[str] = (),
    dry_run: bool = False,
    progress: bool | None = None,
) -> Import:
    """Read snapshots or checkpoints that another program wrote, into a store of ours.

    Nothing in the files is executed: pickles are read as data, and names of code in them refused.
    One tensor at a time is in memory, of delta encodings one snapshot. Called again, it goes on:
    files that were imported, as their digests say, are left out.

    Args:
        source: A folder of official EDM2 pickles, of ema-pytorch or pytorch-posthoc-ema
            checkpoints, or of plain checkpoints with their time in their names; or several
            files; or a CSV with the columns ``file``, ``t``, ``profile``.
        out: Folder of the store, or its URL, or a store.
        kind: ``"edm2"``, ``"ema-pytorch"``, ``"list"`` or ``"checkpoints"``, where it is not
            recognised.
        sigma_rel: EMA lengths of the tracks of ema-pytorch, in their order.
        profile: How plain checkpoints average: ``Exponential.from_beta(0.9999)`` for a classical
            EMA, ``Uniform(window=1, relative=False)`` for raw weights.
        csv: Table of plain checkpoints, relative to ``source``.
        update_every: Steps between updates of ema-pytorch's averages.
        unit: Name of the unit of time, where the files do not imply it.
        key: Where in each file the weights are, as ``"state_dict"``, if there are several sets.
        subfolder: Which folder or file in each checkpoint, as ``"unet_ema"``, if there are several.
        encoding: As in :class:`posthoc_ema.EMA`.
        allow: Names of code that pickles may hold all the same; not executed either.
        dry_run: Only say what was recognised.
        progress: Show a progress bar; by default if standard error is a terminal.

    Returns:
        An :class:`Import`.

    Raises:
        UnsafePickleError: If a file refers to code; the message names both.
        SnapshotError: If a file is damaged, foreign, or does not say what it is. Nothing is
            written before all files were looked into.
        SnapshotWriteError: If a snapshot cannot be written; those before stay.
        ValueError: If an argument is outside its domain.

    Example:
        >>> import_snapshots("raw-snapshots", "run/ema")  # doctest: +SKIP
        >>> reconstruct("run/ema", sigma_rel=0.13)  # doctest: +SKIP
    """
    from tqdm import tqdm

    check_encoding(encoding)
    if update_every < 1:
        raise ValueError(f"update_every must be at least 1 (got {update_every})")
    place = _paths(source)
    options = Options(
        sigma_rel=tuple(np.atleast_1d(sigma_rel).tolist()) if sigma_rel is not None else (),
        profile=profile,
        update_every=update_every,
        unit=unit,
        key=key,
        subfolder=subfolder,
        allow=tuple(allow),
    )
    run = read_run(place, kind, None if csv is None else Path(csv), options)
    files = [(s.path, s.t, s.profile) for s in run.snapshots]
    if dry_run:
        _check(run.snapshots)
        return Import(run.kind, run.unit, files, run.remarks)
    store = as_store(out)
    here = store.path.resolve()
    if any(path.resolve().parent == here for s in run.snapshots for path in s.files):
        raise ValueError(f"out must be another folder than that of the files ({out})")
    record = _Record.of(store, run)
    _check([snapshot for snapshot in run.snapshots if not record.has(snapshot)])
    total = sum(path.stat().st_size for s in run.snapshots for path in s.files)
    disable = None if progress is None else not progress  # None: only on a terminal
    skipped = 0
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="import", disable=disable, delay=1
    ) as bar:
        for snapshot in run.snapshots:
            skipped += not record.take(snapshot, encoding)
            bar.update(sum(path.stat().st_size for path in snapshot.files))
    return Import(run.kind, run.unit, files, run.remarks, record.store.list(), skipped)


def _paths(source: Any) -> Path | list[Path]:
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    return [Path(path) for path in source]


class _Record:
    """A store that is being filled, and which files went into it."""

    def __init__(self, store: SnapshotStore, run: RunIdentity, known: dict[str, Any]) -> None:
        self.store, self.run, self.known = store, run, known
        self.present = {(s.t, s.profile) for s in store.scan()[0]}

    @classmethod
    def of(cls, store: SnapshotStore, run: ForeignRun) -> _Record:
        """Begin, or go on."""
        folder, path = store.path, store.path / RECORD
        if path.exists():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
                described = {key: known[key] for key in ("kind", "unit", "run_id", "files")}
            except (ValueError, KeyError, TypeError) as error:
                raise SnapshotError(
                    f"{path} is damaged ({error}); import into another folder"
                ) from error
            if (known["kind"], known["unit"]) != (run.kind, run.unit):
                raise ForeignSnapshotError(
                    f"{folder} holds {known['kind']} snapshots in {known['unit']}, these are "
                    f"{run.kind} in {run.unit}; import them into another folder"
                )
        else:
            if store.scan()[0]:
                raise ForeignSnapshotError(
                    f"{folder} holds snapshots that were not imported; import into another folder"
                )
            described = {
                "kind": run.kind, "unit": run.unit, "run_id": secrets.token_hex(8), "files": {},
            }  # fmt: skip
        identity = RunIdentity(described["run_id"], run.unit, "torch", 0)
        return cls(store, identity, described)

    def has(self, snapshot: ForeignSnapshot) -> bool:
        """Whether one of this time and profile is there."""
        return (snapshot.t, snapshot.profile) in self.present

    def take(self, snapshot: ForeignSnapshot, encoding: str) -> bool:
        """Write one snapshot, unless it is there; whether it was written."""
        name = json.dumps([snapshot.t, snapshot.profile.to_dict()], sort_keys=True)
        digest = _digest(snapshot.files)
        before = self.known["files"].get(name, {}).get("digest")
        if self.has(snapshot):
            if before != digest:
                raise ForeignSnapshotError(
                    f"{snapshot.path} is not what was imported as t={snapshot.t}, "
                    f"{snapshot.profile} before; import it into another folder"
                )
            return False
        contents = snapshot.open()
        # Noted beforehand: what is in the store after a kill is then known to be this.
        self.known["files"][name] = {"file": str(snapshot.path), "digest": digest}
        self.store.path.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.store.path / RECORD, json.dumps(self.known, indent=1))
        averaged = [tensor for tensor in contents.tensors if tensor.averaged]
        self.store.write(
            self.run,
            snapshot.t,
            snapshot.profile,
            [_average(tensor, snapshot) for tensor in averaged],
            [
                CopySource(tensor.name, tensor.shape, tensor.dtype, tensor.read())
                for tensor in contents.tensors
                if not tensor.averaged
            ],
            contents.aliases,
            encoding,
            rounded_before=_rounding(averaged),
        )
        return True


def _check(snapshots: Sequence[ForeignSnapshot]) -> None:
    """Look into all files before anything is written: one that is refused leaves no half run.

    Raises:
        UnsafePickleError: If one names code.
        SnapshotError: If one is damaged, holds no weights, or those of another model.
    """
    first: dict[str, tuple[int, ...]] | None = None
    for snapshot in snapshots:
        shapes = _shapes(snapshot)
        first = shapes if first is None else first
        if shapes != first:
            name = next(n for n in {**first, **shapes} if first.get(n) != shapes.get(n))
            raise SnapshotError(
                f"{snapshot.path} holds the weights of another model than {snapshots[0].path}: "
                f"{name!r} has shape {shapes.get(name, 'none')} here and "
                f"{first.get(name, 'none')} there. Leave it out; or, if there are several sets of "
                "weights, say which with subfolder= or key="
            )


def _shapes(snapshot: ForeignSnapshot) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of one file, which is not kept in memory.

    Raises:
        SnapshotError: As :func:`_check`.
    """
    contents = snapshot.open()
    shapes = {tensor.name: tensor.shape for tensor in contents.tensors if tensor.averaged}
    if not shapes:
        raise SnapshotError(f"{snapshot.path} holds no weights of a floating-point type")
    for name in (*(tensor.name for tensor in contents.tensors), *contents.aliases):
        if name in ("", "__metadata__") or not _is_text(name):
            raise CorruptSnapshotError(
                f"{snapshot.path} has a tensor called {name!r:.80}, which files cannot hold; "
                "rename it, or leave the file out"
            )
    held = sum(path.stat().st_size for path in snapshot.files)
    if sum(tensor.nbytes for tensor in contents.tensors) > _MOST_VIEWED * held:
        raise CorruptSnapshotError(
            f"{snapshot.path} has tensors of many times the bytes that it holds, all of the "
            "same numbers: no weights are like that. Leave it out"
        )
    return shapes


def _is_text(name: str) -> bool:
    """Whether it has no halves of characters."""
    return name.encode("utf-8", "ignore").decode() == name


def _digest(files: Sequence[Path]) -> str:
    """Of all bytes of some files."""
    digests = []
    for path in files:
        whole = Region.of_file(path)
        digest = Digest(whole.size)
        for start in range(0, whole.size, _PIECE):
            digest.add(start, whole.part(start, min(_PIECE, whole.size - start)).read())
        digests.append(digest.hexdigest())
    return " ".join(digests)


def _average(tensor: ForeignTensor, snapshot: ForeignSnapshot) -> AverageSource:
    """One tensor on its way into the store; float32, float64 where it is that."""
    double = tensor.dtype in ("F64", "C128")
    shape = (*tensor.shape, 2) if tensor.dtype.startswith("C") else tensor.shape
    return AverageSource(
        tensor.name,
        shape,
        "F64" if double else "F32",
        tensor.dtype,
        partial(_chunks, tensor, snapshot.path, np.float64 if double else np.float32),
    )


def _chunks(tensor: ForeignTensor, path: Path, kind: Any) -> Iterator[NDArray[Any]]:
    raw = tensor.read()
    dtype = {"C64": "F32", "C128": "F64"}.get(tensor.dtype, tensor.dtype)
    if dtype in ("F64", "F32", "F16", "BF16"):
        if not all_finite(raw, dtype):
            raise NonFiniteError(
                f"{tensor.name!r} holds NaN or infinity in {path}; leave that file out"
            )
        item = {"F64": 8, "F32": 4}.get(dtype, 2)
        for start in range(0, len(raw), _CHUNK * item):
            piece = raw[start : start + _CHUNK * item]
            out = np.empty(len(piece) // item, kind)
            decode_into(piece, dtype, out)
            yield out
    else:
        yield as_numpy(raw, dtype, (-1,)).astype(kind)


def _rounding(tensors: Sequence[ForeignTensor]) -> float:
    """Mean squared error, over all weights, that half precision left them with."""
    square, count = 0.0, 0
    for tensor in tensors:
        raw = tensor.read()
        if tensor.dtype in _HALF:
            square += _HALF[tensor.dtype](raw.view(np.uint16))
        count += int(np.prod(tensor.shape))
    return square / max(count, 1)


def _spacing(bits: int, bias: int, numbers: NDArray[np.uint16]) -> float:
    """Σ spacing²/12 of floating-point numbers with so many bits of mantissa."""
    exponents = (numbers & 0x7FFF) >> bits
    counts = np.bincount(exponents, minlength=1)
    least = np.maximum(np.arange(len(counts)), 1) - bias - bits
    return float(counts @ 4.0**least) / 12


_HALF: Mapping[str, Callable[[NDArray[np.uint16]], float]] = {
    "F16": partial(_spacing, 10, 15),
    "BF16": partial(_spacing, 7, 127),
}
