"""Sharded tensors (``DTensor``: FSDP2, tensor parallel): what this process holds of them.

Nothing here communicates but :func:`all_agree`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch

from posthoc_ema.boxes import Box
from posthoc_ema.errors import StructureError


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which each process holds a part (or a copy)."""
    return hasattr(tensor, "_local_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that this process holds, not a view of it: of others, the tensor itself."""
    # Not to_local(), which makes a new object, and with gradients a node of the graph.
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def box_of(tensor: Any) -> tuple[Box, bool]:
    """Which part of the whole tensor this process holds, and whether it is the first to hold it."""
    if not is_sharded(tensor):
        return Box.whole(tensor.shape), True
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    coordinate = mesh.get_coordinate() or []
    first = all(
        place == 0 for place, how in zip(coordinate, placements, strict=True) if how.is_replicate()
    )
    return Box(tuple(offsets), tuple(shape)), first


def check_sharded(name: str, tensor: Any) -> str | None:
    """Why a DTensor cannot be tracked, if so."""
    if any(placement.is_partial() for placement in tensor.placements):
        return f"has the placements {tensor.placements}: what processes hold is yet to be summed"
    if tensor.device_mesh.get_coordinate() is None:
        return "lies on a device mesh that this process is no part of"
    box, _ = box_of(tensor)
    if box.shape != tuple(local(tensor).shape):
        return f"has the local shape {tuple(local(tensor).shape)}, expected {box.shape}"
    return None


def sharded_like(values: torch.Tensor, tensor: Any) -> Any:
    """A DTensor whose local part are these values, cut like another."""
    if not is_sharded(tensor):
        return values
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # Not from_local(), which would send averages kept on the CPU to the device of the mesh.
    meta = TensorMeta(tensor.shape, tensor.stride(), values.dtype)
    spec = DTensorSpec(tensor.device_mesh, tensor.placements, tensor_meta=meta)
    return DTensor(values, spec, requires_grad=False)


def part_for(name: str, value: Any, box: Box, shape: tuple[int, ...]) -> Any:
    """The part of a given value that belongs into this process's part of a tensor.

    Args:
        name: Of the tensor, for errors.
        value: Whole, or a DTensor.
        box: What this process holds.
        shape: Of the whole tensor.

    Raises:
        StructureError: If the value does not hold it.
    """
    held, _ = box_of(value)
    if held == box:
        return local(value)
    if held == Box.whole(shape):
        return local(value)[box.slices]
    raise StructureError(
        f"the state holds {held} of {name}, this process {box}: it was saved by another number of "
        "processes. Save and load it with torch.distributed.checkpoint, which cuts it anew (see "
        "docs/distributed.md)"
    )


def reshard(model: Any, failed: bool = False) -> None:
    """Let FSDP2 modules hold their shards, where a forward pass left them gathered.

    Args:
        model: A module, or anything else, which is left alone.
        failed: Whether a forward pass may have been left by an exception.
    """
    for module in _fsdp_modules(model):
        if failed and hasattr(module, "reset_iter_state"):
            with suppress(RuntimeError):  # no root, which takes all modules below with it
                module.reset_iter_state()
        module.reshard()


def _fsdp_modules(model: Any) -> Iterator[Any]:
    """FSDP2 modules; there are none unless FSDP was imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    fsdp_module = getattr(fsdp, "FSDPModule", ())
    if isinstance(model, torch.nn.Module):
        yield from (m for m in model.modules() if isinstance(m, fsdp_module))


def check_wrapper(name: str, module: Any) -> None:
    """Refuse FSDP1, whose parameters are stretches of one flat tensor.

    Raises:
        StructureError: If the module is one.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        raise StructureError(
            f"{name or 'the model'} is a FullyShardedDataParallel module (FSDP1), whose tensors "
            "have no place in the model's own; use torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def all_agree(tensors: Iterable[Any], value: bool) -> bool:
    """Whether a value is true in all processes that share the tensors; waits for them."""
    meshes = list(dict.fromkeys(tensor.device_mesh for tensor in tensors))
    for mesh in meshes:
        flag = torch.tensor(int(value), device=mesh.device_type)
        for axis in range(mesh.ndim):
            torch.distributed.all_reduce(
                flag, torch.distributed.ReduceOp.MIN, group=mesh.get_group(axis)
            )
        value = bool(flag.item())
    return value
