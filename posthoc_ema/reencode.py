"""Snapshots that are on disk already, written once more: in another encoding, or without some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.chain import with_inputs
from posthoc_ema.places import Place
from posthoc_ema.prediction import Memory, write_predicted
from posthoc_ema.sinks import MemorySink
from posthoc_ema.snapshot_file import AverageSource, Snapshot
from posthoc_ema.streaming import Group, stream

if TYPE_CHECKING:
    from numpy.typing import NDArray


def write_again(
    snapshot: Snapshot,
    path: Place,
    encoding: str,
    earlier: Sequence[Snapshot],
    memory: Memory,
    newest: bool,
    rewrites: int = 0,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write a snapshot to another file; what it lost by rounding before stays on record.

    Args:
        snapshot: What to write; read, checked and decoded as a whole in memory.
        path: Where.
        encoding: In which encoding.
        earlier: Snapshots that it may be predicted from.
        memory: Of some of them; receives this one.
        newest: Whether it is the newest of its track.
        rewrites: How often it was written before, in the same folder.
        progress: Called with the number of bytes read.

    Raises:
        CorruptSnapshotError: If a file was damaged since it was written.
        OSError: If it cannot be written.
    """
    sources = decoded_sources(snapshot, progress)
    write_predicted(
        path,
        snapshot.run,
        snapshot.t,
        snapshot.profile,
        sources,
        snapshot.copy_sources(),
        snapshot.aliases,
        encoding,
        earlier,
        memory,
        newest,
        rounded_before=snapshot.statistics["rounding_square"],
        rewrites=rewrites,
    )


def decoded_sources(
    snapshot: Snapshot, progress: Callable[[int], object] = lambda nbytes: None
) -> list[AverageSource]:
    """The averages of a stored snapshot on their way to another file."""
    sink = MemorySink(1)
    names = list(snapshot.averages)
    stream([snapshot], [Group(names, np.ones((1, 1)))], sink, check=True, progress=progress)
    arrays = sink.arrays[0]
    return [
        AverageSource(
            name,
            arrays[name].shape,
            "F64" if arrays[name].dtype == np.float64 else "F32",
            dtype,
            partial(_whole, arrays[name]),
        )
        for name, dtype in snapshot.averages.items()
    ]


def _whole(values: NDArray[Any]) -> list[NDArray[Any]]:
    return [values.reshape(-1)]


def dependants(kept: Sequence[Snapshot], going: Sequence[Snapshot]) -> list[Snapshot]:
    """Those kept that cannot be decoded without those going, in order of time."""
    gone = {snapshot.digests["header"] for snapshot in going}
    return [
        snapshot
        for snapshot in kept
        if any(needed.digests["header"] in gone for needed in with_inputs([snapshot]))
    ]
