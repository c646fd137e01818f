"""The tracker for PyTorch: modules, and mappings of tensors.

An update reads every weight and reads and writes every average, and can do no less. What it
need not do is walk the module, call a kernel for each tensor and track, or bring a weight into
the cache once for each track. So the averages of one type and device are one matrix, a row for
each track. A chunk of a large tensor moves all rows in one call. Small tensors, and those to be
converted, all move in one call of a compiled loop; where there is none (on a GPU, without a
compiler, of types it does not know) they are gathered into a block first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

from posthoc_ema import native
from posthoc_ema.snapshot_file import AverageSource, CopySource, PartOf
from posthoc_ema.trackers.base import (
    CHUNK,
    Selection,
    TensorSpec,
    Tracker,
    check_specs,
    flatten_mapping,
    unflatten_like,
)
from posthoc_ema.trackers.torch_model import adapters_alone, bind, real_view, restored
from posthoc_ema.trackers.torch_sharded import (
    all_agree,
    is_sharded,
    local,
    part_for,
    reshard,
    sharded_like,
)

_KEPT = {"F32": torch.float32, "F64": torch.float64}
_NATIVE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SMALL = 1 << 14  # below this many elements a call costs more than a copy into a block
_BLOCK = 1 << 17  # elements gathered at most
_CAT = (1 << 15) - 1  # torch.cat copies more elements than this tensor by tensor
_CPU_CHUNK = 1 << 19  # source and averages of one chunk stay in the cache


@dataclass
class _Pool:
    """Averages of one type on one device: a row for each track."""

    dtype: torch.dtype
    device: torch.device
    names: list[str] = field(default_factory=list)
    size: int = 0
    flats: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class _Place:
    """Where the average of one tensor lies in its pool, and in which order of its elements."""

    pool: _Pool
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


class TorchTracker(Tracker):
    """Averages of a module's parameters, or of a mapping from names to tensors."""

    framework = "torch"

    def __init__(
        self, model: Any, select: Selection, tracks: int, device: str | torch.device | None
    ) -> None:
        self._select, self._model = adapters_alone(model, select), model
        self._binding = bind(model, self._select, first=True)
        self.specs, self.aliases = self._binding.specs, self._binding.aliases
        self._specs = {spec.name: spec for spec in self.specs}
        self._places: dict[str, _Place] = {}
        pools: dict[tuple[torch.dtype, torch.device], _Pool] = {}
        for spec in self.averaged:
            tensor = self._binding.real(spec.name)
            key = (_KEPT[spec.kept], torch.device(device) if device else tensor.device)
            pool = pools.setdefault(key, _Pool(*key))
            stop = pool.size + tensor.numel()
            stride = tensor.stride() if _is_dense(tensor) else _contiguous_stride(tensor.shape)
            shape, complex_ = tuple(tensor.shape), spec.dtype.startswith("C")
            self._places[spec.name] = _Place(pool, pool.size, stop, shape, tuple(stride), complex_)
            pool.names.append(spec.name)
            pool.size = stop
        self._pools = list(pools.values())
        self._kept = {pool.dtype for pool in self._pools}
        for pool in self._pools:
            with torch.inference_mode(False):  # else they could not be updated outside of it
                pool.flats = _zeros((tracks, pool.size), pool.dtype, pool.device)
        self._tracks = range(tracks)
        self._plan()

    def check(self, model: Any) -> None:
        """Notice replaced, moved or converted tensors without walking the module."""
        binding = self._binding
        if model is self._model and binding.sharded and not binding.is_current():
            reshard(model)  # a forward pass without a backward pass leaves parameters gathered
        if model is not self._model or not binding.is_current():
            binding = bind(model, self._select)
            check_specs(self.specs, binding.specs)
            self._model = model
        if binding is self._binding and not binding.is_in_place():
            check_specs(self.specs, binding.current_specs())
            binding = bind(model, self._select)
        if binding is not self._binding:
            self._binding = binding
            self._plan()

    def is_finite(self) -> bool:
        """Whether all weights to be averaged are finite; waits for the device once.

        Of sharded weights, in all processes: they must do the same.
        """
        return all_agree(self._binding.sharded, self._is_finite())

    @torch.no_grad()
    def _is_finite(self) -> bool:
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

    @torch.no_grad()
    def update(self, weights: Sequence[float] | None) -> None:
        """Move every average towards the current tensors; never waits for the device."""
        columns = {}
        if self._pieces and weights is not None:
            columns = {dtype: torch.tensor(weights, dtype=dtype)[:, None] for dtype in self._kept}
        whole = [1.0] * len(self._tracks)  # takes the tensors as they are
        for tensors in self._compiled:
            tensors.lerp(np.array(whole if weights is None else weights, np.float32))
        for piece in self._pieces:
            piece.fill()
            if weights is None:
                piece.averages.copy_(piece.source)
            elif piece.averages.is_cpu:
                piece.averages.lerp_(piece.source, columns[piece.averages.dtype])
            else:  # a launch for each track costs nothing, a column would have to be sent there
                for average, weight in zip(piece.averages, weights, strict=True):
                    average.lerp_(piece.source, weight)
        for name in self._gathered:  # views that do not lie densely in memory
            source = self._binding.real(name)
            for track in self._tracks:
                average = self._places[name].of(track)
                moved = source.to(average.device, average.dtype)
                if weights is None:
                    average.copy_(moved)
                else:
                    average.lerp_(moved, weights[track])

    def average(self, track: int, name: str) -> torch.Tensor:
        """A copy of one average, in the memory order of its parameter."""
        values = self._places[name].of(track).clone()
        values = torch.view_as_complex(values) if self._places[name].complex else values
        return sharded_like(values, self._binding.tensors[name])

    def check_loadable(self, averages: Mapping[str, Any]) -> None:
        """Names and shapes, and that this process's part is there."""
        super().check_loadable(averages)
        for spec in self.averaged:
            part_for(spec.name, averages[spec.name], spec.box, spec.shape)

    @torch.no_grad()
    def load(self, track: int, name: str, value: Any) -> None:
        """Set one average."""
        spec = self._specs[name]
        part = part_for(name, value, spec.box, spec.shape)
        tensor = part if isinstance(part, torch.Tensor) else torch.from_numpy(np.array(part))
        self._places[name].of(track).copy_(real_view(tensor))

    def connect(self) -> None:
        """Meet the other processes, if tensors are cut across several."""
        sharded = [tensor for tensor in self._binding.tensors.values() if is_sharded(tensor)]
        if sharded:
            from posthoc_ema.trackers.torch_ranks import Ranks

            self.ranks = Ranks(sharded)

    def average_sources(self, track: int) -> list[AverageSource]:
        """What this process shall write of the averages of one track."""
        return [
            AverageSource(
                spec.name,
                self._places[spec.name].shape,
                spec.kept,
                spec.dtype,
                partial(_chunks, self._places[spec.name].of(track)),
                self._part(spec, spec.kept_shape),
            )
            for spec in self.averaged
            if self._writes(spec)
        ]

    def copy_sources(self) -> list[CopySource]:
        """What it shall write of buffers and integer tensors, as they are now."""
        self._rebind()
        sources = []
        for spec in self.specs:
            if not spec.averaged and self._writes(spec):
                tensor = local(self._binding.tensors[spec.name]).detach().cpu().contiguous()
                data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else _NOTHING
                part = self._part(spec, spec.shape) if spec.part else None
                shape = tuple(tensor.shape)
                sources.append(CopySource(spec.name, shape, spec.dtype, data, part))
        return sources

    def _writes(self, spec: TensorSpec) -> bool:
        """Whether it is this process that writes what it holds of a tensor."""
        if self.ranks is None:
            return True
        if spec.part is None or not prod(spec.shape):
            return self.ranks.number == 0
        return spec.first and spec.part.count > 0

    def _part(self, spec: TensorSpec, whole: tuple[int, ...]) -> PartOf | None:
        if self.ranks is None:
            return None
        return PartOf((*spec.box.offsets, 0)[: len(whole)], whole)  # complex: an axis more

    def assemble(self, averages: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict with unwrapped names (or a mapping of the given form)."""
        self._rebind()
        copies = {
            spec.name: self._binding.tensors[spec.name].detach().clone()
            for spec in self.specs
            if not spec.averaged
        }
        values = {**copies, **averages}
        if isinstance(self._model, torch.nn.Module):
            state = {spec.name: values[spec.name] for spec in self.specs}
            return {**state, **{alias: state[name] for alias, name in self.aliases.items()}}
        values.update({a: values[name] for a, name in self.aliases.items() if name in values})
        left_out = {
            name: leaf.detach().clone()
            for name, leaf in flatten_mapping(self._model)
            if name not in values and isinstance(leaf, torch.Tensor)
        }
        return dict(unflatten_like(self._model, {**left_out, **values}))

    @contextmanager
    def applied(self, model: Any, track: int) -> Iterator[Any]:
        """Overwrite weights in place, and restore all that the model was."""
        binding = bind(model, self._select)
        check_specs(self.specs, binding.specs)
        with restored(model, list(binding.tensors.values())):
            with torch.no_grad():
                for spec in self.averaged:
                    binding.real(spec.name).copy_(self._places[spec.name].of(track))
            yield model

    def _sources(self) -> Iterator[torch.Tensor]:
        """The current values of tensors that no loop is compiled for; each valid until the next."""
        for piece in self._pieces:
            piece.fill()
            yield piece.source
        for name in self._gathered:
            yield self._binding.real(name).to(self._places[name].pool.dtype)

    def _rebind(self) -> None:
        """Walk the model again: buffers may have been replaced, which updates do not look at."""
        binding = bind(self._model, self._select)
        check_specs(self.specs, binding.specs)
        self._binding = binding
        self._plan()

    def _plan(self) -> None:
        """Cut the work of an update into pieces; holds until a tensor moves in memory."""
        self._pieces: list[_Piece] = []
        self._gathered: list[str] = []
        self._compiled: list[native.Tensors] = []
        for pool in self._pools:
            loops = pool.device.type == "cpu" and pool.dtype == torch.float32 and native.library()
            compiled: dict[str, list[tuple[torch.Tensor, int]]] = {}
            chunk = _CPU_CHUNK if pool.device.type == "cpu" else pool.size
            with torch.inference_mode(False):
                scratch = torch.empty(
                    min(max(_BLOCK, _SMALL), pool.size), dtype=pool.dtype, device=pool.device
                )
            block: list[tuple[torch.Tensor, _Place]] = []
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
                # Large tensors that need no conversion are moved as well by PyTorch's own threads,
                # which after a training step are awake.
                compiles = count < _SMALL or not direct
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
                )
                for dtype, tensors in compiled.items()
            ]

    def _close(self, block: list[tuple[torch.Tensor, _Place]], scratch: torch.Tensor) -> list[Any]:
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


def _zeros(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU by way of numpy, which asks for large pages: an update waits less for memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch."))).zero_()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def _same_order(tensor: torch.Tensor, stride: Sequence[int]) -> bool:
    """Whether memory order agrees although strides of single-element axes differ."""
    pairs = zip(tensor.shape, tensor.stride(), stride, strict=True)
    return tensor.numel() == 0 or all(size == 1 or a == b for size, a, b in pairs)


def _differs(flat: torch.Tensor, block: Sequence[tuple[torch.Tensor, _Place]]) -> bool:
    """Whether a tensor cannot be gathered with those before: another type or device."""
    return bool(block) and (flat.dtype, flat.device) != (block[0][0].dtype, block[0][0].device)


def _chunks(average: torch.Tensor) -> Iterator[Any]:
    """Pieces of an average in the order of its shape, on the CPU, without copying all of it."""
    flat = average.reshape(-1)  # copies if the memory order is another: one tensor at a time
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK].cpu().numpy()


_NOTHING = np.empty(0, np.uint8)
