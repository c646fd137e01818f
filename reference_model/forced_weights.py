"""Forced weight normalisation once for each step, where several forwards share one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from reference_model.mp_layers import MPConv
from reference_model.normalization import EPS, root_mean_square


def forced_layers(net: nn.Module) -> list[MPConv]:
    """Layers whose forwards in training overwrite the stored weight by its normalised self."""
    return [m for m in net.modules() if isinstance(m, MPConv) and m.forced]


@contextmanager
def weights_kept(layers: Sequence[MPConv], keep: bool = True) -> Iterator[None]:
    """Let forwards in training leave the stored weights as they are.

    Algorithm 1 overwrites a weight by its normalised self once for each step. The first forward
    does; a second one of the same step would do it again, which is not quite nothing: EPS in the
    divisor moves weights that were off by p by another p · EPS.

    Args:
        layers: What `forced_layers` found.
        keep: Whether to do anything at all.
    """
    for layer in layers:
        layer.forced = not keep
    try:
        yield
    finally:
        for layer in layers:
            layer.forced = True


@torch.no_grad()
def normalize_stored(layers: Sequence[MPConv]) -> None:
    """Overwrite stored weights by their normalised selves, of sharded ones this process's rows.

    A row is an output channel with all its inputs, so rows need nothing from other processes.

    Args:
        layers: What `forced_layers` found.

    Source:
        Karras et al. 2024, arXiv:2312.02696, Algorithm 1.
    """
    for layer in layers:
        weight = layer.weight
        rows = weight.to_local() if hasattr(weight, "to_local") else weight
        if rows.numel():
            rows.div_(root_mean_square(rows, tuple(range(1, rows.ndim))) + EPS)
