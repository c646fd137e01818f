"""Reconstructions as folders that ``from_pretrained`` loads: diffusers, transformers, PEFT."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posthoc_ema.errors import StructureError
from posthoc_ema.reconstruct import Reconstruction, reconstruct
from posthoc_ema.snapshots import SnapshotStore
from posthoc_ema.trackers.base import Selection
from posthoc_ema.trackers.torch_model import bind, real_view, restored


def save_pretrained(
    snapshots: str | os.PathLike[str] | SnapshotStore,
    sigma_rel: float | None,
    like: Any,
    folder: str | os.PathLike[str],
    *,
    prefix: str = "",
    **options: Any,
) -> Reconstruction:
    """Reconstruct an average and save it as its framework saves models.

    Args:
        snapshots: The folder that ``EMA(snapshots=...)`` wrote, or its URL, or a store.
        sigma_rel: EMA length.
        like: A model of ``diffusers`` or ``transformers``, or one with PEFT adapters; or a folder
            that its ``save_pretrained`` wrote, such as a checkpoint of the run. What the
            snapshots do not hold is taken from it, and so is the floating-point type. A model
            given is as before afterwards.
        folder: Where to save. Of a ``PeftModel`` the adapter is saved.
        prefix: What names in the snapshots begin with, before those of this model:
            ``"model."`` where a larger module held it as ``self.model``.
        **options: Of :func:`posthoc_ema.reconstruct`: ``t``, ``target``, ``method``.

    Returns:
        The reconstruction, which tells its predicted error.

    Raises:
        StructureError: If the snapshots are of another model.
        SnapshotError: As of :func:`posthoc_ema.reconstruct`.
        ValueError: If ``like`` is no such model or folder.

    Example:
        >>> save_pretrained("run/ema", 0.07, unet, "unet-0.07")  # doctest: +SKIP
        >>> UNet2DModel.from_pretrained("unet-0.07")  # doctest: +SKIP
    """
    model = _load(Path(like)) if isinstance(like, str | os.PathLike) else like
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"like= must be a model with save_pretrained, or a folder (got {type(model).__name__})"
        )
    weights: Reconstruction = reconstruct(snapshots, sigma_rel, framework="torch", **options)
    with holding(model, weights, prefix=prefix):
        model.save_pretrained(folder)
    return weights


@contextmanager
def holding(model: torch.nn.Module, weights: Reconstruction, *, prefix: str = "") -> Iterator[None]:
    """Let a model hold a reconstruction inside a ``with`` block, for any way of saving it.

    Args:
        model: The model; as before afterwards, whatever happens inside.
        weights: A reconstruction. Tensors that it does not hold stay as they are.
        prefix: As of :func:`save_pretrained`.

    Example:
        >>> with holding(unet, reconstruct("run/ema", 0.07)):  # doctest: +SKIP
        ...     unet.save_lora_adapter("adapter")
    """
    values = {**weights.params, **weights.buffers}
    tensors = _pairs(model, values, prefix)
    with restored(model, [tensor for tensor, _ in tensors]):
        _copy(tensors)
        yield


def put(model: torch.nn.Module, values: Mapping[str, Any]) -> None:
    """Write averages by name into a model, for good.

    Args:
        model: The model.
        values: As of ``EMA.average``.

    Raises:
        StructureError: If the names or shapes are of another model.
    """
    _copy(_pairs(model, values, ""))


@torch.no_grad()
def _copy(pairs: list[tuple[torch.Tensor, Any]]) -> None:
    for tensor, value in pairs:
        real_view(tensor.detach()).copy_(real_view(value))


def _pairs(
    model: torch.nn.Module, values: Mapping[str, Any], prefix: str
) -> list[tuple[torch.Tensor, Any]]:
    binding = bind(model, Selection())
    pairs = []
    for full, value in values.items():
        name = full.removeprefix(prefix)
        name = binding.aliases.get(name, name)
        if not full.startswith(prefix):
            continue
        tensor = binding.tensors.get(name)
        if tensor is None or tensor.shape != value.shape:
            found = "has no such tensor" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise StructureError(
                f"the average of {full} has shape {tuple(value.shape)}, but the model {found}; "
                "give the model that was tracked, or prefix= if it was part of a larger one. Names "
                f"of the model: {', '.join([*binding.tensors][:4])}, ..."
            )
        pairs.append((tensor, value))
    if not pairs:
        raise StructureError(f"no name in the snapshots begins with prefix={prefix!r}")
    return pairs


def _load(folder: Path) -> Any:
    """The model of a folder, by the class that its configuration names."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no config.json; give a folder that a model's save_pretrained wrote, or "
            "the model itself (of an adapter, the model that has it)"
        ) from None
    for library, name in (
        ("diffusers", config.get("_class_name")),
        ("transformers", next(iter(config.get("architectures") or []), None)),
    ):
        if name is not None:
            return getattr(importlib.import_module(library), name).from_pretrained(folder)
    raise ValueError(f"{folder}/config.json names no class of diffusers or transformers")
