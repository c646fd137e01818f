"""A PyTorch model as its tensors: found by unwrapped names, watched, and restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from operator import is_
from typing import Any

import torch

from posthoc_ema.errors import StructureError
from posthoc_ema.trackers.base import (
    FLOATING,
    Selection,
    TensorSpec,
    flatten_mapping,
    unique_names,
)
from posthoc_ema.trackers.torch_sharded import (
    box_of,
    check_sharded,
    check_wrapper,
    is_sharded,
    local,
    reshard,
)

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex128: "C128", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
_END = (object(),)
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass
class Binding:
    """The tensors of a model, found once."""

    specs: list[TensorSpec]
    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    # How the module led to them: each of these must still be so, or it is walked again.
    holders: Sequence[Mapping[str, Any]] = ()
    held: Sequence[Any] = ()

    def __post_init__(self) -> None:
        averaged = [self.tensors[spec.name] for spec in self.specs if spec.averaged]
        self.sharded = [tensor for tensor in averaged if is_sharded(tensor)]
        self._whole = [tensor for tensor in averaged if not is_sharded(tensor)]
        self._as_bound = [local(tensor).detach() for tensor in (*self._whole, *self.sharded)]
        self._views = [holder.values() for holder in self.holders]  # live, without a walk

    def is_current(self) -> bool:
        """Whether the module still holds the very same parameters and submodules."""
        # An end of its own on both sides: one that is longer meets the other's.
        return all(map(is_, chain(chain.from_iterable(self._views), _END), chain(self.held, _END)))

    def is_in_place(self) -> bool:
        """Whether all averaged tensors have the storage, shape and strides they were bound with.

        One of them changes when ``.data`` is replaced.
        """
        tensors = chain(self._whole, map(local, self.sharded)) if self.sharded else self._whole
        return all(map(torch.Tensor.is_set_to, tensors, self._as_bound))

    def current_specs(self) -> list[TensorSpec]:
        """The specs with the shapes of this moment: ``.data`` may have been replaced."""
        return [replace(s, shape=tuple(self.tensors[s.name].shape)) for s in self.specs]

    def is_lazy(self, name: str) -> bool:
        """Whether memory holds the conjugate or negative of the values."""
        tensor = local(self.tensors[name])
        return tensor.is_conj() or tensor.is_neg()

    def real(self, name: str) -> torch.Tensor:
        """What this process holds of one tensor, detached, complex numbers as pairs of reals."""
        return real_view(local(self.tensors[name]).detach())


def bind(model: Any, select: Selection, first: bool = False) -> Binding:
    """Find all tensors of a model by their unwrapped names."""
    holders: Sequence[Mapping[str, Any]]
    if isinstance(model, torch.nn.Module):
        reshard(model)
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
        if known != name and isinstance(model, torch.nn.Module):  # in mappings, names alone count
            aliases[name] = known
            continue
        tensors[name] = tensor
        dtype = DTYPES[tensor.dtype]
        averaged = id(tensor) in parameters and dtype in FLOATING
        part = box_of(tensor) if is_sharded(tensor) else (None, True)
        specs.append(TensorSpec(name, tuple(tensor.shape), dtype, averaged, *part))
    held = list(chain.from_iterable(holder.values() for holder in holders))
    return Binding(specs, tensors, aliases, holders, held)


def adapters_alone(model: Any, select: Selection) -> Selection:
    """Of a model with PEFT adapters, what is trained, if the caller names nothing else.

    The base model is frozen, and often a thousand times as large.
    """
    if select.include is not None or not isinstance(model, torch.nn.Module):
        return select
    if not any(getattr(module, "peft_config", None) for module in model.modules()):
        return select
    trained = tuple(name for name, tensor in _walk(_unwrap(model))[0] if tensor.requires_grad)
    if not trained:
        raise StructureError(
            "the model has adapters, but nothing in it is trained (requires_grad is false "
            'everywhere); load the adapter with is_trainable=True, or track all with include="*"'
        )
    return replace(select, include=trained)


def _walk(model: torch.nn.Module) -> tuple[list[tuple[str, torch.Tensor]], list[dict[str, Any]]]:
    """Parameters and persistent buffers as ``state_dict`` orders them, without its hooks."""
    named: list[tuple[str, torch.Tensor]] = []
    holders: list[dict[str, Any]] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        check_wrapper(prefix, module)
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
def restored(model: Any, changed: Sequence[torch.Tensor]) -> Iterator[None]:
    """Bring back, at the end, the tensors of a model and its train/eval modes.

    The same objects in the same places, with the same storage; and their values, but for
    frozen parameters that are not ``changed``: they may be large, and nothing writes to them.
    """
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    modes = [module.training for module in modules]
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    everything = {id(tensor): tensor for tensor in tensors if tensor is not None}
    places = [(d, dict(d)) for m in modules for d in (m._parameters, m._buffers, m._modules)]
    everything.update({id(tensor): tensor for tensor in changed})
    copied = {id(tensor) for tensor in changed}
    storages = [(tensor, local(tensor).detach()) for tensor in everything.values()]
    saved = [
        (storage, storage.clone())
        for tensor, storage in storages
        if id(tensor) in copied
        or tensor.requires_grad
        or not isinstance(tensor, torch.nn.Parameter)
    ]
    failed = True
    try:
        yield
        failed = False
    finally:
        reshard(model, failed)
        with torch.no_grad():
            for storage, copy in saved:
                storage.copy_(copy)
            for tensor, storage in storages:
                if not is_sharded(tensor):  # FSDP moves the others' memory where it must be
                    tensor.data = storage
                elif not local(tensor).is_set_to(storage):
                    local(tensor).copy_(storage)
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
    elif hasattr(tensor, "ds_tensor"):
        problem = "is partitioned by DeepSpeed ZeRO-3, which this version cannot track"
    elif tensor.is_meta:
        problem = "is on the meta device and holds no values; materialise the model first"
    elif tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        problem = f"has layout {tensor.layout} and type {tensor.dtype}, which cannot be stored"
    elif is_sharded(tensor):
        problem = check_sharded(name, tensor)
    if problem:
        raise StructureError(f"{name} {problem} (or leave it out with exclude={name!r})")


def real_view(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, complex numbers as pairs of reals."""
    tensor = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
