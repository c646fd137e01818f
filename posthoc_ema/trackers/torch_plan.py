"""How an update of PyTorch averages moves: planned once, until a tensor lies elsewhere.

An update reads every weight and reads and writes every average, and can do no less. What it
need not do is walk the module, call a kernel for each tensor and track, or bring a weight into
the cache once for each track. So the averages of one type and device are one matrix, a row for
each track. On the CPU all tensors move in one call of a compiled loop, in the threads that
PyTorch's own kernels run in: those are awake after a training step, and a thread of ours would
wait until they sleep. Where there is no such loop (on a GPU, without a compiler, of types it
does not know), a chunk of a large tensor moves all rows in one call, and small tensors are
gathered into a block first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posthoc_ema import native
from posthoc_ema.trackers.torch_model import Binding

_NATIVE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SMALL = 1 << 14  # below this many elements a call costs more than a copy into a block
_BLOCK = 1 << 17  # elements gathered at most
_CAT = (1 << 15) - 1  # torch.cat copies more elements than this tensor by tensor
_CPU_CHUNK = 1 << 19  # source and averages of one chunk stay in the cache


@dataclass
class Pool:
    """Averages of one type on one device: a row for each track."""

    dtype: torch.dtype
    device: torch.device
    names: list[str] = field(default_factory=list)
    size: int = 0
    flats: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Place:
    """Where the average of one tensor lies in its pool, and in which order of its elements."""

    pool: Pool
    start: int
    stop: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    complex: bool

    def of(self, track: int) -> torch.Tensor:
        """The average, in its own shape (a view)."""
        row = self.pool.flats[track]
        return row.as_strided(self.shape, self.stride, row.storage_offset() + self.start)


@dataclass(frozen=True)
class _Piece:
    """One step of an update: the averages of each track move towards the same source."""

    source: torch.Tensor  # a parameter's own memory, or scratch
    averages: torch.Tensor  # [tracks, elements]
    # How scratch is filled first: tensors joined end to end, or converted, in each of its parts.
    gather: Sequence[tuple[list[torch.Tensor], torch.Tensor]] = ()

    def fill(self) -> None:
        """Make the source hold the current values."""
        for tensors, part in self.gather:
            if len(tensors) > 1:
                torch.cat(tensors, out=part)
            else:
                part.copy_(tensors[0])


class Plan:
    """The work of every update, cut into pieces; holds while all tensors stay where they are.

    Args:
        pools: The averages.
        places: Of each tensor in them.
        binding: The tensors themselves.
    """

    def __init__(
        self, pools: Sequence[Pool], places: Mapping[str, Place], binding: Binding
    ) -> None:
        self._places, self._binding = places, binding
        self._tracks = max((len(pool.flats) for pool in pools), default=0)
        self._kept = {pool.dtype for pool in pools}
        self._pieces: list[_Piece] = []
        self._gathered: list[str] = []  # views that do not lie densely in memory
        self._compiled: list[native.Tensors] = []
        for pool in pools:
            self._add(pool)

    @torch.no_grad()
    def move(self, weights: Sequence[float] | None) -> None:
        """Move the averages of each track by its weight; with None they become the tensors.

        Never waits for the device.
        """
        whole = [1.0] * self._tracks
        for tensors in self._compiled:
            tensors.lerp(np.array(whole if weights is None else weights, np.float32))
        columns = {}
        if self._pieces and weights is not None:
            columns = {dtype: torch.tensor(weights, dtype=dtype)[:, None] for dtype in self._kept}
        for piece in self._pieces:
            piece.fill()
            if weights is None:
                piece.averages.copy_(piece.source)
            elif piece.averages.is_cpu:
                piece.averages.lerp_(piece.source, columns[piece.averages.dtype])
            else:  # a launch for each track costs nothing, a column would have to be sent there
                for average, weight in zip(piece.averages, weights, strict=True):
                    average.lerp_(piece.source, weight)
        for name in self._gathered:
            source = self._binding.real(name)
            for track in range(self._tracks):
                average = self._places[name].of(track)
                moved = source.to(average.device, average.dtype)
                if weights is None:
                    average.copy_(moved)
                else:
                    average.lerp_(moved, weights[track])

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all tensors are finite; waits for the device once."""
        if not all(tensors.is_finite() for tensors in self._compiled):
            return False
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for source in self._sources():
            # Finite only if every element is.
            by_device.setdefault(source.device, []).append(source.sum().isfinite())
        if all(bool(torch.stack(flags).all()) for flags in by_device.values()):
            return True
        # Or a sum of finite values overflowed.
        return all(bool(source.isfinite().all()) for source in self._sources())

    def _sources(self) -> Iterator[torch.Tensor]:
        """The current values of tensors that no loop is compiled for; each valid until the next."""
        for piece in self._pieces:
            piece.fill()
            yield piece.source
        for name in self._gathered:
            yield self._binding.real(name).to(self._places[name].pool.dtype)

    def _add(self, pool: Pool) -> None:
        """Plan how the averages of one pool move."""
        loops = pool.device.type == "cpu" and pool.dtype == torch.float32 and native.library()
        team = torch_threads()
        compiled: dict[str, list[tuple[torch.Tensor, int]]] = {}
        chunk = _CPU_CHUNK if pool.device.type == "cpu" else pool.size
        with torch.inference_mode(False):
            scratch = torch.empty(
                min(max(_BLOCK, _SMALL), pool.size), dtype=pool.dtype, device=pool.device
            )
        block: list[tuple[torch.Tensor, Place]] = []
        filled = 0
        for name in pool.names:
            place = self._places[name]
            tensor = self._binding.real(name)
            count = tensor.numel()
            if not _same_order(tensor, place.stride) or self._binding.is_lazy(name):
                self._gathered.append(name)
                block, filled = self._close(block, scratch), 0
                continue
            flat = tensor.as_strided((count,), (1,), tensor.storage_offset())
            direct = flat.dtype == pool.dtype and flat.device == pool.device
            # Without its threads PyTorch's own loop is faster for large tensors.
            compiles = team or count < _SMALL or not direct
            if loops and compiles and flat.is_cpu and flat.dtype in _NATIVE:
                compiled.setdefault(_NATIVE[flat.dtype], []).append((flat, place.start))
                block, filled = self._close(block, scratch), 0  # what follows lies elsewhere
                continue
            if count < _SMALL:
                if filled + count > scratch.numel() or _differs(flat, block):
                    block, filled = self._close(block, scratch), 0
                if count:
                    block.append((flat, place))
                    filled += count
                continue
            block, filled = self._close(block, scratch), 0
            step = chunk if direct else min(chunk, scratch.numel())
            for start in range(0, count, step):
                stop = min(start + step, count)
                source, part = flat[start:stop], scratch[: stop - start]
                averages = pool.flats[:, place.start + start : place.start + stop]
                if direct:
                    self._pieces.append(_Piece(source, averages))
                else:
                    self._pieces.append(_Piece(part, averages, [([source], part)]))
        self._close(block, scratch)
        self._compiled += [
            native.Tensors(
                dtype,
                [flat.data_ptr() for flat, _ in tensors],
                [flat.numel() for flat, _ in tensors],
                [pool.flats.data_ptr() + 4 * start for _, start in tensors],
                [pool.size] * len(tensors),
                team,
            )
            for dtype, tensors in compiled.items()
        ]

    def _close(self, block: list[tuple[torch.Tensor, Place]], scratch: torch.Tensor) -> list[Any]:
        """Make a piece of the small tensors gathered so far; they lie end to end in the pool."""
        if block:
            start, stop = block[0][1].start, block[-1][1].stop
            gather: list[tuple[list[torch.Tensor], torch.Tensor]] = []
            first = done = 0
            tensors: list[torch.Tensor] = []
            for flat, _ in block:
                if tensors and done + flat.numel() - first > _CAT:
                    gather.append((tensors, scratch[first:done]))
                    tensors, first = [], done
                tensors.append(flat)
                done += flat.numel()
            gather.append((tensors, scratch[first:done]))
            averages = block[0][1].pool.flats[:, start:stop]
            self._pieces.append(_Piece(scratch[:done], averages, gather))
        return []


@cache
def torch_threads() -> native.Team | None:
    """The threads of the OpenMP runtime that PyTorch runs on; None if it has another.

    GNU's runtime, and LLVM's and Intel's on Linux, start a team by the same function.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        start = library.GOMP_parallel  # of whatever runtime that library is linked with
    except (OSError, AttributeError):
        return None
    start.restype = None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]

    def run(function: Any, argument: Any) -> None:
        threads = torch.get_num_threads()
        if threads > 1:
            start(ctypes.cast(function, ctypes.c_void_p), argument, threads, 0)
        else:  # as workers of a DataLoader: a process forked from one with threads has none
            function(argument)

    return run


def _same_order(tensor: torch.Tensor, stride: Sequence[int]) -> bool:
    """Whether memory order agrees although strides of single-element axes differ."""
    pairs = zip(tensor.shape, tensor.stride(), stride, strict=True)
    return tensor.numel() == 0 or all(size == 1 or a == b for size, a, b in pairs)


def _differs(flat: torch.Tensor, block: Sequence[tuple[torch.Tensor, Place]]) -> bool:
    """Whether a tensor cannot be gathered with those before: another type or device."""
    return bool(block) and (flat.dtype, flat.device) != (block[0][0].dtype, block[0][0].device)
