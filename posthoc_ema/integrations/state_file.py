"""The state of an EMA as one safetensors file: durable, complete or absent, and no pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posthoc_ema.errors import StateError
from posthoc_ema.tensorfile import TensorEntry, TensorFileWriter, read_header, read_range

_DTYPES = {
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "C128": torch.complex128,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write what ``EMA.state_dict`` gave; an earlier file is replaced as a whole.

    Args:
        state: Of a PyTorch model.
        path: The file.

    Raises:
        OSError: If it cannot be written.
    """
    tensors = {
        f"{track}.{name}": value
        for track, averages in enumerate(state["averages"])
        for name, value in averages.items()
    }
    # Complex numbers as pairs of reals: not every reader knows them.
    reals = {n: torch.view_as_real(x) if x.is_complex() else x for n, x in tensors.items()}
    entries = [TensorEntry(n, _NAMES[x.dtype], tuple(x.shape)) for n, x in reals.items()]
    entries.sort(key=lambda entry: entry.dtype != "F64")  # so that all are aligned
    metadata = {
        "ema_state": {key: value for key, value in state.items() if key != "averages"},
        "tracks": len(state["averages"]),
        "complex": [name for name, x in tensors.items() if x.is_complex()],
    }
    with TensorFileWriter(path, entries, metadata) as writer:
        for entry in entries:
            writer.write(np.ascontiguousarray(reals[entry.name].cpu().numpy()))
        writer.commit(metadata)


def read_identity(path: Path) -> tuple[str, float]:
    """Run and time of a state, from its header alone.

    Raises:
        StateError: If it is no state of an EMA.
        FileNotFoundError: If there is no such file.
    """
    state = _metadata(path)["ema_state"]
    return str(state["run_id"]), state["clock"]


def load_state(path: Path) -> dict[str, Any]:
    """Read a state for ``EMA.load_state_dict``.

    Args:
        path: What :func:`save_state` wrote.

    Returns:
        The state, tensors on the CPU.

    Raises:
        StateError: If it is no state of an EMA.
        CorruptSnapshotError: If it is truncated or damaged.
        FileNotFoundError: If there is no such file.
    """
    metadata = _metadata(path)
    complexes = frozenset(metadata["complex"])
    averages: list[dict[str, torch.Tensor]] = [{} for _ in range(metadata["tracks"])]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for full, entry in read_header(path).entries.items():
            value = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
            read_range(descriptor, entry.offset, value.reshape(-1).view(torch.uint8).numpy())
            track, name = full.split(".", 1)
            averages[int(track)][name] = (
                torch.view_as_complex(value) if full in complexes else value
            )
    finally:
        os.close(descriptor)
    return {**metadata["ema_state"], "averages": averages}


def _metadata(path: Path) -> Any:
    metadata = read_header(path).metadata
    if not isinstance(metadata, dict) or "ema_state" not in metadata:
        raise StateError(f"{path} is no state of an EMA")
    return metadata
