"""The tracker for PyTorch: modules, and mappings of tensors.

An update reads every weight and reads and writes every average, and can do no less. What it
need not do is walk the module, call a kernel for each tensor, or bring a weight into the cache
once for each track. So the averages of one type and device are one flat vector for each track;
large tensors are taken in chunks that serve all tracks while in cache, small ones are gathered
into a block first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch

from posthoc_ema.errors import StructureError
from posthoc_ema.snapshot_file import AverageSource, CopySource
from posthoc_ema.trackers.base import (
    CHUNK,
    FLOATING,
    Selection,
    TensorSpec,
    Tracker,
    check_specs,
    flatten_mapping,
    unflatten_like,
    unique_names,
)

_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex128: "C128", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
_KEPT = {"F32": torch.float32, "F64": torch.float64}
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

_SMALL = 1 << 14  # below this many elements a call costs more than a copy into a block
_BLOCK = 1 << 20  # elements gathered at most: 4 MB of float32
_CPU_CHUNK = 1 << 18  # source and averages of one chunk stay in the cache of a core


@dataclass
class _Pool:
    """Averages of one type on one device: a flat vector for each track."""

    dtype: torch.dtype
    device: torch.device
    names: list[str] = field(default_factory=list)
    size: int = 0
    flats: list[torch.Tensor] = field(default_factory=list)


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
        return self.pool.flats[track].as_strided(self.shape, self.stride, self.start)


@dataclass(frozen=True)
class _Piece:
    """One step of an update: ``sources`` end to end are the current values of ``averages``."""

    sources: list[torch.Tensor]
    averages: list[torch.Tensor]
    scratch: torch.Tensor | None  # where to gather or convert; None if the source serves as it is


class TorchTracker(Tracker):
    """Averages of a module's parameters, or of a mapping from names to tensors."""

    framework = "torch"

    def __init__(
        self, model: Any, select: Selection, tracks: int, device: str | torch.device | None
    ) -> None:
        self._select, self._model = select, model
        self._binding = _bind(model, select, first=True)
        self.specs, self.aliases = self._binding.specs, self._binding.aliases
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
        for pool in self._pools:
            with torch.inference_mode(False):  # else they could not be updated outside of it
                pool.flats = [
                    torch.zeros(pool.size, dtype=pool.dtype, device=pool.device)
                    for _ in range(tracks)
                ]
        self._tracks = range(tracks)
        self._plan()

    def check(self, model: Any) -> None:
        """Notice replaced, moved or converted tensors without walking the module."""
        binding = self._binding
        if model is not self._model or not binding.is_current():
            binding = _bind(model, self._select)
            check_specs(self.specs, binding.specs)
            self._model = model
        if binding is not self._binding or binding.layout() != self._layout:
            check_specs(self.specs, binding.current_specs())
            self._binding = binding
            self._plan()

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all weights to be averaged are finite; waits for the device once."""
        averaged = [self._binding.tensors[spec.name] for spec in self.averaged]
        averaged = [t.float() if t.element_size() == 1 else t for t in averaged]  # no float8 sums
        sums = [tensor.sum() for tensor in averaged]  # finite only if every element is
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for total in sums:
            by_device.setdefault(total.device, []).append(total.isfinite())
        if all(bool(torch.stack(flags).all()) for flags in by_device.values()):
            return True
        # Or a sum of finite values overflowed.
        return all(bool(tensor.isfinite().all()) for tensor in averaged)

    @torch.no_grad()
    def update(self, weights: Sequence[float] | None) -> None:
        """Move every average towards the current tensors; never waits for the device."""
        for piece in self._pieces:
            source = piece.sources[0]
            if piece.scratch is not None:
                source = piece.scratch
                if len(piece.sources) > 1:
                    torch.cat(piece.sources, out=source)
                else:
                    source.copy_(piece.sources[0])
            if weights is None:
                for average in piece.averages:
                    average.copy_(source)
            else:
                for average, weight in zip(piece.averages, weights, strict=True):
                    average.lerp_(source, weight)
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
        return torch.view_as_complex(values) if self._places[name].complex else values

    @torch.no_grad()
    def load(self, track: int, name: str, value: Any) -> None:
        """Set one average."""
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        self._places[name].of(track).copy_(_real(tensor))

    def average_sources(self, track: int) -> list[AverageSource]:
        """The averages of one track on their way to a file."""
        return [
            AverageSource(
                spec.name,
                spec.kept_shape,
                spec.kept,
                spec.dtype,
                partial(_chunks, self._places[spec.name].of(track)),
            )
            for spec in self.averaged
        ]

    def copy_sources(self) -> list[CopySource]:
        """Buffers and integer tensors as they are now."""
        self._rebind()
        sources = []
        for spec in self.specs:
            if not spec.averaged:
                tensor = self._binding.tensors[spec.name].detach().cpu().contiguous()
                data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else _NOTHING
                sources.append(CopySource(spec.name, spec.shape, spec.dtype, data))
        return sources

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
        return dict(unflatten_like(self._model, values))

    @contextmanager
    def applied(self, model: Any, track: int) -> Iterator[Any]:
        """Overwrite weights in place, and restore all that the model was."""
        binding = _bind(model, self._select)
        check_specs(self.specs, binding.specs)
        averaged = [binding.tensors[spec.name] for spec in self.averaged]
        with _restored(model, averaged):
            with torch.no_grad():
                for spec in self.averaged:
                    binding.real(spec.name).copy_(self._places[spec.name].of(track))
            yield model

    def _rebind(self) -> None:
        """Walk the model again: buffers may have been replaced, which updates do not look at."""
        binding = _bind(self._model, self._select)
        check_specs(self.specs, binding.specs)
        self._binding = binding
        self._plan()

    def _plan(self) -> None:
        """Cut the work of an update into pieces; holds until a tensor moves in memory."""
        self._layout = self._binding.layout()
        self._pieces: list[_Piece] = []
        self._gathered: list[str] = []
        for pool in self._pools:
            chunk = _CPU_CHUNK if pool.device.type == "cpu" else pool.size
            scratch = torch.empty(min(_BLOCK, pool.size), dtype=pool.dtype, device=pool.device)
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
                if count < _SMALL:
                    if filled + count > scratch.numel() or _differs(flat, block):
                        block, filled = self._close(block, scratch), 0
                    if count:
                        block.append((flat, place))
                        filled += count
                    continue
                block, filled = self._close(block, scratch), 0
                direct = flat.dtype == pool.dtype and flat.device == pool.device
                step = chunk if direct else min(chunk, scratch.numel())
                for start in range(0, count, step):
                    stop = min(start + step, count)
                    self._pieces.append(
                        _Piece(
                            [flat[start:stop]],
                            [f[place.start + start : place.start + stop] for f in pool.flats],
                            None if direct else scratch[: stop - start],
                        )
                    )
            self._close(block, scratch)

    def _close(self, block: list[tuple[torch.Tensor, _Place]], scratch: torch.Tensor) -> list[Any]:
        """Make a piece of the small tensors gathered so far; they lie end to end in the pool."""
        if block:
            start, stop = block[0][1].start, block[-1][1].stop
            flats = block[0][1].pool.flats
            self._pieces.append(
                _Piece(
                    [flat for flat, _ in block],
                    [flat[start:stop] for flat in flats],
                    scratch[: stop - start],
                )
            )
        return []


@dataclass
class _Binding:
    """The tensors of a model, found once."""

    specs: list[TensorSpec]
    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    # How the module led to them: each of these must still be so, or it is walked again.
    holders: Sequence[Mapping[str, Any]] = ()
    held: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._averaged = [self.tensors[spec.name] for spec in self.specs if spec.averaged]

    def is_current(self) -> bool:
        """Whether the module still holds the very same parameters and submodules."""
        found = list(chain.from_iterable(holder.values() for holder in self.holders))
        return len(found) == len(self.held) and all(map(is_, found, self.held))

    def current_specs(self) -> list[TensorSpec]:
        """The specs with the shapes of this moment: ``.data`` may have been replaced."""
        return [replace(s, shape=tuple(self.tensors[s.name].shape)) for s in self.specs]

    def layout(self) -> list[Any]:
        """Addresses, shapes and strides: one changes when ``.data`` is replaced."""
        tensors = self._averaged
        return [
            *map(torch.Tensor.data_ptr, tensors),
            *map(torch.Tensor.size, tensors),
            *map(torch.Tensor.stride, tensors),
        ]

    def is_lazy(self, name: str) -> bool:
        """Whether memory holds the conjugate or negative of the values."""
        return self.tensors[name].is_conj() or self.tensors[name].is_neg()

    def real(self, name: str) -> torch.Tensor:
        """One tensor, detached, complex numbers as pairs of reals."""
        return _real(self.tensors[name].detach())


def _bind(model: Any, select: Selection, first: bool = False) -> _Binding:
    """Find all tensors of a model by their unwrapped names."""
    holders: Sequence[Mapping[str, Any]]
    if isinstance(model, torch.nn.Module):
        named, holders = _walk(_unwrap(model))
        parameters = {id(parameter) for parameter in model.parameters()}
    else:
        named, holders = list(flatten_mapping(model)), list(_mappings(model))
        parameters = {id(tensor) for tensor in unique_names(named).values()}
    if first:
        select.check([name for name, _ in named])
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    specs: list[TensorSpec] = []
    names: dict[int, str] = {}
    for name, tensor in named:
        if not select(name):
            continue
        _check_tensor(name, tensor)
        known = names.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
            continue
        tensors[name] = tensor
        dtype = _DTYPES[tensor.dtype]
        averaged = id(tensor) in parameters and dtype in FLOATING
        specs.append(TensorSpec(name, tuple(tensor.shape), dtype, averaged))
    held = list(chain.from_iterable(holder.values() for holder in holders))
    return _Binding(specs, tensors, aliases, holders, held)


def _walk(model: torch.nn.Module) -> tuple[list[tuple[str, torch.Tensor]], list[dict[str, Any]]]:
    """Parameters and persistent buffers as ``state_dict`` orders them, without its hooks."""
    named: list[tuple[str, torch.Tensor]] = []
    holders: list[dict[str, Any]] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        path = [part for part in prefix.split(".") if part and part not in _WRAPPERS]
        for key, parameter in module._parameters.items():
            if parameter is not None:
                named.append((".".join([*path, key]), parameter))
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                named.append((".".join([*path, key]), buffer))
        holders += [module._parameters, module._modules]
    return named, holders


@contextmanager
def _restored(model: Any, changed: Sequence[torch.Tensor]) -> Iterator[None]:
    """Bring back, at the end, the tensors of a model and its train/eval modes.

    The same objects in the same places, with the same storage; of ``changed`` and of all
    buffers the values too. Other parameters may be large, and are not copied.
    """
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    modes = [module.training for module in modules]
    places = [(d, dict(d)) for m in modules for d in (m._parameters, m._buffers)]
    values = [*changed, *(b for m in modules for b in m._buffers.values() if b is not None)]
    everything = {id(t): t for _, held in places for t in held.values() if t is not None}
    everything.update({id(tensor): tensor for tensor in values})
    storages = [(tensor, tensor.detach()) for tensor in everything.values()]
    saved = [(tensor.detach(), tensor.detach().clone()) for tensor in values]
    try:
        yield
    finally:
        with torch.no_grad():
            for storage, copy in saved:
                storage.copy_(copy)
            for tensor, storage in storages:
                tensor.data = storage
        for place, held in places:
            place.clear()
            place.update(held)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The user's own module inside ``torch.compile`` and data-parallel wrappers."""
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
            model = model._orig_mod
        else:
            return model


def _mappings(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A nested mapping and all those inside."""
    yield tree
    for value in tree.values():
        if isinstance(value, Mapping):
            yield from _mappings(value)


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise StructureError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    problem = None
    if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
        problem = "is not initialised yet; run the model once before the first update"
    elif hasattr(tensor, "to_local"):
        problem = "is a DTensor (FSDP2, tensor parallel), which this version cannot track"
    elif tensor.is_meta:
        problem = "is on the meta device and holds no values; materialise the model first"
    elif tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
        problem = f"has layout {tensor.layout} and type {tensor.dtype}, which cannot be stored"
    if problem:
        raise StructureError(f"{name} {problem} (or leave it out with exclude={name!r})")


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


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
