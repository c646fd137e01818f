"""What a reconstruction gives: tensors of the framework asked for, from memory or from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.arrays import average_to_framework, copy_to_framework
from posthoc_ema.errors import SnapshotError
from posthoc_ema.places import Place
from posthoc_ema.reading import open_file
from posthoc_ema.snapshot_file import CopySource, Snapshot
from posthoc_ema.tensorfile import read_header

if TYPE_CHECKING:
    from numpy.typing import NDArray


def loaded(
    arrays: Mapping[str, NDArray[Any]],
    copies: Sequence[CopySource],
    snapshot: Snapshot,
    framework: str,
) -> Callable[[], tuple[dict[str, Any], dict[str, Any]]]:
    """Averages and buffers in memory, as arrays of a framework."""
    # In the model's own order, not that of the file.
    params = {
        name: average_to_framework(arrays[name], dtype, framework)
        for name, dtype in snapshot.averages.items()
        if name in arrays
    }
    # Each result owns its buffers: writing into one must not change another.
    buffers = {
        c.name: copy_to_framework(c.data.copy(), c.dtype, c.shape, framework) for c in copies
    }
    return lambda: (params, buffers)


def stamps_of(paths: Sequence[Place]) -> dict[Place, tuple[int | str, int]]:
    """What changes when a file is replaced."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def load_files(
    stamps: Mapping[Place, tuple[int | str, int]], snapshot: Snapshot, framework: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a reconstruction back from the files that it was written to."""
    if stamps_of(list(stamps)) != stamps:
        raise SnapshotError(
            f"{next(iter(stamps))} was replaced since this result was written to it; read the "
            "file itself, or reconstruct once more to another place"
        )
    arrays, copies = {}, []
    for path in stamps:
        with open_file(path) as file:
            entries = list(read_header(path).entries.values())
            file.expect((entry.offset, entry.nbytes) for entry in entries)
            for entry in entries:
                raw = np.empty(entry.nbytes, np.uint8)
                file.read(entry.offset, raw)
                if entry.name in snapshot.averages:
                    kind = "<f8" if entry.dtype == "F64" else "<f4"
                    arrays[entry.name] = raw.view(kind).reshape(entry.shape)
                else:
                    copies.append(CopySource(entry.name, entry.shape, entry.dtype, raw))
    return loaded(arrays, copies, snapshot, framework)()
