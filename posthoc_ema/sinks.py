"""Where reconstructed weights go: memory, or safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.draft import write_text_atomically
from posthoc_ema.encoding import ITEM_SIZE
from posthoc_ema.memory import fresh
from posthoc_ema.places import Place
from posthoc_ema.snapshot_file import CopySource
from posthoc_ema.tensorfile import TensorEntry, TensorFileWriter

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MemorySink:
    """Keeps the results, one dictionary of arrays for each target."""

    def __init__(self, targets: int) -> None:
        self.arrays: list[dict[str, NDArray[Any]]] = [{} for _ in range(targets)]
        self._flat: list[NDArray[Any]] = []

    def begin(self, outputs: Sequence[TensorEntry]) -> frozenset[str]:
        """Any run will do."""
        return frozenset()

    def start(self, outputs: Sequence[TensorEntry]) -> None:
        """Allocate a run as one array for each target; tensors are views of it."""
        dtype = np.float64 if outputs[0].dtype == "F64" else np.float32
        total = sum(entry.count for entry in outputs)
        self._flat = [fresh((total,), dtype) for _ in self.arrays]
        for flat, arrays in zip(self._flat, self.arrays, strict=True):
            done = 0
            for entry in outputs:
                arrays[entry.name] = flat[done : done + entry.count].reshape(entry.shape)
                done += entry.count

    def write(self, start: int, block: NDArray[Any]) -> None:
        """Put one block in its place."""
        for flat, values in zip(self._flat, block, strict=True):
            flat[start : start + len(values)] = values


class FileSink:
    """Writes one safetensors file, or shards with an index, for each target.

    Nothing is visible before everything is complete.

    Args:
        paths: One for each target, ending in ``.safetensors``.
        copies: Buffers to store beside the averages.
        metadata: For each target, what its files say of themselves.
        max_shard_bytes: Above this size a file is split.
    """

    def __init__(
        self,
        paths: Sequence[Place],
        copies: Sequence[CopySource],
        metadata: Sequence[Mapping[str, Any]],
        max_shard_bytes: float,
    ) -> None:
        self._paths, self._metadata, self._max = paths, metadata, max_shard_bytes
        self._copies = {copy.name: copy for copy in copies}
        self._shards: list[list[TensorEntry]] = []
        self._shard_of: dict[str, int] = {}
        self._writers: list[list[TensorFileWriter]] = []
        self._stack = ExitStack()
        self._run = ""

    def __enter__(self) -> FileSink:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def begin(self, outputs: Sequence[TensorEntry]) -> frozenset[str]:
        """Lay out the shards and open them all; runs end at shards and around buffers."""
        entries = [
            *outputs,
            *(TensorEntry(c.name, c.dtype, c.shape) for c in self._copies.values()),
        ]
        entries.sort(key=lambda entry: -ITEM_SIZE[entry.dtype])  # aligned, as in snapshots
        size = 0
        for entry in entries:
            if not self._shards or size + entry.nbytes > self._max:
                self._shards.append([])
                size = 0
            self._shards[-1].append(entry)
            size += entry.nbytes
        self._shard_of = {e.name: k for k, shard in enumerate(self._shards) for e in shard}
        for path, metadata in zip(self._paths, self._metadata, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writers.append(
                [
                    self._stack.enter_context(TensorFileWriter(shard_path, shard, dict(metadata)))
                    for shard_path, shard in zip(self._names(path), self._shards, strict=True)
                ]
            )
        order = [entry for shard in self._shards for entry in shard]
        return frozenset(
            b.name
            for a, b in pairwise(order)
            if self._shard_of[a.name] != self._shard_of[b.name] or a.name in self._copies
        )

    def start(self, outputs: Sequence[TensorEntry]) -> None:
        """Find the place of the run in its shard."""
        self._run = outputs[0].name

    def write(self, start: int, block: NDArray[Any]) -> None:
        """Write one block to each target's file."""
        for writers, values in zip(self._writers, block, strict=True):
            writers[self._shard_of[self._run]].write_into(self._run, start, values)

    def commit(self) -> None:
        """Make all files visible, the index last."""
        for copy in self._copies.values():
            for writers in self._writers:
                writers[self._shard_of[copy.name]].write_into(copy.name, 0, copy.data)
        for path, metadata, writers in zip(self._paths, self._metadata, self._writers, strict=True):
            for writer in writers:
                writer.commit(dict(metadata))
            # What an earlier call left under the other name would be taken for this result.
            if len(writers) > 1:
                write_text_atomically(index_path(path), self._index(path))
                path.unlink(missing_ok=True)
            else:
                index_path(path).unlink(missing_ok=True)

    def files(self, target: int) -> list[Place]:
        """The files of one target, without the index."""
        return self._names(self._paths[target])

    def _names(self, path: Place) -> list[Place]:
        number = len(self._shards)
        if number == 1:
            return [path]
        return [shard_path(path, k, number) for k in range(1, number + 1)]

    def _index(self, path: Place) -> str:
        return index_text(dict(zip(self._names(path), self._shards, strict=True)))


def index_path(path: Place) -> Place:
    """The index of a sharded file, as Hugging Face names it."""
    return path.with_name(path.name + ".index.json")


def shard_path(path: Place, number: int, of: int) -> Place:
    """One of several files, as Hugging Face names it."""
    stem = path.name.removesuffix(".safetensors")
    return path.with_name(f"{stem}-{number:05d}-of-{of:05d}.safetensors")


def index_text(shards: Mapping[Place, Sequence[TensorEntry]]) -> str:
    """What the index of a sharded file says."""
    total = sum(entry.nbytes for shard in shards.values() for entry in shard)
    weight_map = {entry.name: path.name for path, shard in shards.items() for entry in shard}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
