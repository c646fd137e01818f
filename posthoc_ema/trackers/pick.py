"""Which tracker a model needs, without importing a framework that is not in use."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import count
from typing import Any

from posthoc_ema.trackers.base import Selection, Tracker, flatten_mapping


def make_tracker(model: Any, select: Selection, tracks: int, device: Any) -> Tracker:
    """The tracker for the framework of the model, which is loaded already if it is one's."""
    leaves = [leaf for _, leaf in flatten_mapping(model)] if isinstance(model, Mapping) else []
    torch = sys.modules.get("torch")
    if torch is not None and (
        isinstance(model, torch.nn.Module) or any(isinstance(x, torch.Tensor) for x in leaves)
    ):
        from posthoc_ema.trackers.torch import TorchTracker

        return TorchTracker(model, select, tracks, device)
    if device is not None:
        raise ValueError("device= is for PyTorch models; others keep averages with the weights")
    jax = sys.modules.get("jax")
    if jax is not None and any(isinstance(x, jax.Array) for x in jax.tree.leaves(model)):
        from posthoc_ema.trackers.jax import JaxTracker

        return JaxTracker(model, select, tracks)
    if leaves:
        from posthoc_ema.trackers.numpy import NumpyTracker

        return NumpyTracker(model, select, tracks)
    raise TypeError(
        "expected a torch.nn.Module, a non-empty mapping from names to arrays, or a JAX pytree "
        f"(got {type(model).__name__})"
    )


def is_writer() -> bool:
    """Under torch.distributed every process holds the same averages: the first one writes."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return True
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def common_run_id(own: str) -> str:
    """One run id for the EMAs that data-parallel processes make alike, without waiting for any.

    A checkpoint that they save together keeps the state of any of them; the folder knows that of
    the first. The key-value store of the process group gives all what the first comer put there.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return own
    if not torch.distributed.is_initialized():
        return own
    store = torch.distributed.distributed_c10d._get_default_store()
    return str(store.compare_set(f"posthoc_ema/run_id/{next(_numbers)}", "", own).decode())


_numbers = count()
