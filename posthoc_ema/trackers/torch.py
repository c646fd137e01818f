"""The tracker for PyTorch: modules, and mappings of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

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
from posthoc_ema.trackers.torch_model import Binding, adapters_alone, bind, real_view, restored
from posthoc_ema.trackers.torch_plan import Place, Plan, Pool
from posthoc_ema.trackers.torch_sharded import (
    all_agree,
    is_sharded,
    local,
    part_for,
    reshard,
    sharded_like,
)

_KEPT = {"F32": torch.float32, "F64": torch.float64}


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
        self._places: dict[str, Place] = {}
        pools: dict[tuple[torch.dtype, torch.device], Pool] = {}
        for spec in self.averaged:
            tensor = self._binding.real(spec.name)
            key = (_KEPT[spec.kept], torch.device(device) if device else tensor.device)
            pool = pools.setdefault(key, Pool(*key))
            stop = pool.size + tensor.numel()
            stride = tensor.stride() if _is_dense(tensor) else _contiguous_stride(tensor.shape)
            shape, complex_ = tuple(tensor.shape), spec.dtype.startswith("C")
            self._places[spec.name] = Place(pool, pool.size, stop, shape, tuple(stride), complex_)
            pool.names.append(spec.name)
            pool.size = stop
        self._pools = list(pools.values())
        for pool in self._pools:
            with torch.inference_mode(False):  # else they could not be updated outside of it
                pool.flats = _zeros((tracks, pool.size), pool.dtype, pool.device)
        self._plan = Plan(self._pools, self._places, self._binding)

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
            self._follow(binding)

    def is_finite(self) -> bool:
        """Whether all weights to be averaged are finite; waits for the device once.

        Of sharded weights, in all processes: they must do the same.
        """
        return all_agree(self._binding.sharded, self._plan.is_finite())

    def update(self, weights: Sequence[float] | None) -> None:
        """Move every average towards the current tensors; never waits for the device."""
        self._plan.move(weights)

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

    def _rebind(self) -> None:
        """Walk the model again: buffers may have been replaced, which updates do not look at."""
        binding = bind(self._model, self._select)
        check_specs(self.specs, binding.specs)
        self._follow(binding)

    def _follow(self, binding: Binding) -> None:
        self._binding = binding
        self._plan = Plan(self._pools, self._places, binding)


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


def _chunks(average: torch.Tensor) -> Iterator[Any]:
    """Pieces of an average in the order of its shape, on the CPU, without copying all of it."""
    flat = average.reshape(-1)  # copies if the memory order is another: one tensor at a time
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK].cpu().numpy()


_NOTHING = np.empty(0, np.uint8)
