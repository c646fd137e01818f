"""Magnitudes of a training run: recorded at intervals, kept in its directory, grouped by level."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reference_model.magnitudes import LayerMagnitudes, record_magnitudes

if TYPE_CHECKING:
    from reference_model.precond import Denoiser

MAGNITUDES_FILE = "magnitudes.jsonl"

LEVEL = re.compile(r"(?:^|\.)(enc|dec)\.(\d+)x\d+_")
"""Encoder or decoder, and resolution, in the name of a layer."""


@contextmanager
def logged_magnitudes(net: Denoiser, path: Path, nimg: int, lr: float) -> Iterator[None]:
    """Record one training step and append a line to the run's log of magnitudes.

    Args:
        net: The network; forward, backward and optimiser step belong into the context.
        path: File to append to.
        nimg: Images seen after the step.
        lr: Learning rate of the step.
    """
    with record_magnitudes(net, output_scales(net)) as recorder:
        yield
    line = {"nimg": nimg, "lr": lr, "layers": [_short(layer) for layer in recorder.layers]}
    with path.open("a") as file:
        print(json.dumps(line), file=file)


def recording(
    due: bool, net: Denoiser, path: Path, nimg: int, lr: float
) -> AbstractContextManager[None]:
    """`logged_magnitudes` where it is due, nothing elsewhere."""
    return logged_magnitudes(net, path, nimg, lr) if due else nullcontext()


def read_magnitudes(path: Path) -> list[tuple[int, float, list[LayerMagnitudes]]]:
    """Read what `logged_magnitudes` wrote: images seen, learning rate and layers of each line.

    Raises:
        ValueError: If a line cannot be understood.
    """
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
            layers = [_layer(values) for values in line["layers"]]
            found.append((int(line["nimg"]), float(line["lr"]), layers))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {path} is not one of magnitudes: {error}"
            ) from error
    return found


def level_of(name: str) -> str | None:
    """Level of a layer, such as "enc 16": one of the paper's {encoder, decoder} × resolutions.

    `None` for the embedding, the output and the uncertainty head, which the paper leaves out.
    """
    match = LEVEL.search(name)
    return f"{match[1]} {match[2]}" if match else None


def by_level(layers: Sequence[LayerMagnitudes], field: str) -> dict[str, float]:
    """Mean of a field over the layers of each level; maxima are taken for fields of maxima.

    Args:
        layers: Layers of one line.
        field: Field of `LayerMagnitudes`.

    Returns:
        Values by level, encoder first, as the network runs.
    """
    groups: dict[str, list[float]] = {}
    for layer in layers:
        level, value = level_of(layer.name), getattr(layer, field)
        if level is not None and math.isfinite(value):
            groups.setdefault(level, []).append(value)
    if field.endswith("_max"):
        return {level: max(values) for level, values in groups.items()}
    return {level: sum(values) / len(values) for level, values in groups.items()}


def output_scales(net: Denoiser) -> dict[str, float]:
    """Layers whose output carries the weight of the sum that follows, with that weight."""
    from reference_model.blocks import MPAttention, MPResidual
    from reference_model.rungs import rung_of

    config = net.config
    sum_weights = rung_of(config).sum_weights
    scales = {}
    for name, module in net.named_modules():
        if isinstance(module, MPResidual):
            scales[f"{name}.conv1"] = sum_weights(config.res_balance)[1]
        if isinstance(module, MPAttention):
            scales[f"{name}.proj"] = sum_weights(config.attn_balance)[1]
    return {name: share for name, share in scales.items() if share > 0}


def _layer(values: dict[str, Any]) -> LayerMagnitudes:
    """A layer from JSON, as `_short` wrote it."""
    numbers: dict[str, Any] = {k: math.nan if v is None else v for k, v in values.items()}
    return LayerMagnitudes(**numbers)


def _short(layer: LayerMagnitudes) -> dict[str, Any]:
    """A layer as JSON: five digits, and null where there is no number."""
    values = asdict(layer)
    for name, value in values.items():
        if isinstance(value, float):
            values[name] = float(f"{value:.5g}") if math.isfinite(value) else None
    return values
