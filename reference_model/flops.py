"""What one evaluation of a network costs: operations per layer, from its definition.

Counts follow the paper's convention: a multiply-accumulate is one operation; elementwise
operations are one for each element, SiLU and softmax three; the normalisation of weights is
counted too, once, as for a batch of one. Computed on the meta device: no weights, no arithmetic.
They describe the network as it is defined, whatever shortcuts its implementation takes.

Source: Karras et al. 2024, arXiv:2312.02696, Tables 1 and 6 (Gflops).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reference_model.blocks import (
    MPAttention,
    MPDecoderBlock,
    MPEmbedding,
    MPEncoderBlock,
    MPOutput,
    MPResidual,
)
from reference_model.mp_layers import MPConv, MPFourier
from reference_model.unet import UNet

if TYPE_CHECKING:
    from reference_model.configs import NetworkConfig

# Operations for each element: RMS and division; two products and their sum; SiLU and division.
NORMALIZE, MP_SUM, MP_SILU = 3, 3, 4
SOFTMAX = 3


@dataclass(frozen=True)
class LayerCost:
    """Operations of one layer for one image.

    Attributes:
        name: Path of the module, or of the module whose own operations these are.
        kind: "conv", "linear", "attention" (products of queries, keys and values) or
            "elementwise" (everything between the layers of a block).
        output: Shape of the result, without the batch.
        parameters: Learned numbers.
        macs: Multiply-accumulates.
        elementwise: Operations on elements of activations.
        weight_norm: Operations on weights.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int = 0
    macs: int = 0
    elementwise: int = 0
    weight_norm: int = 0

    @property
    def total(self) -> int:
        """All operations."""
        return self.macs + self.elementwise + self.weight_norm


def count(config: NetworkConfig) -> list[LayerCost]:
    """Count the operations of one evaluation for one image, layer by layer.

    Args:
        config: The network's shape.

    Returns:
        Costs in the order of use; a block's elementwise operations follow its layers. The
        uncertainty head, which only training uses, is not among them.
    """
    with torch.device("meta"):
        net = UNet(config).eval()
        image = torch.zeros(1, *config.input_shape)
        labels = torch.zeros(1, config.label_dim) if config.label_dim else None
        c_noise = torch.zeros(1)
    costs: list[LayerCost] = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            costs.extend(_costs(module, name, inputs, output))

        return hook

    for name, module in net.named_modules():
        module.register_forward_hook(record(name))
    with torch.no_grad():
        net(image, c_noise, labels)
    return costs


def report(config: NetworkConfig, costs: Sequence[LayerCost], *, as_json: bool = False) -> str:
    """Write costs down as a table in units of a million operations, or as JSON.

    Args:
        config: What was counted.
        costs: Its layers.
        as_json: Whether to return JSON, in single operations.

    Returns:
        Text of one line for each layer, and the totals.
    """
    total = {
        "parameters": sum(c.parameters for c in costs),
        "macs": sum(c.macs for c in costs),
        "elementwise": sum(c.elementwise for c in costs),
        "weight_norm": sum(c.weight_norm for c in costs),
        "total": sum(c.total for c in costs),
    }
    if as_json:
        layers = [asdict(c) | {"total": c.total} for c in costs]
        return json.dumps({"network": asdict(config), "layers": layers, **total}, indent=2)

    width = max(len(c.name) for c in costs)
    head = f"{'layer':{width}}  {'kind':11}  {'output':>15}  {'parameters':>13}  {'Mflops':>11}"
    lines = [head, "-" * len(head)]
    for c in costs:
        output = "×".join(map(str, c.output))
        lines.append(
            f"{c.name:{width}}  {c.kind:11}  {output:>15}  {c.parameters:13,}"
            f"  {c.total / 1e6:11,.3f}"
        )
    lines.append("-" * len(head))
    lines.append(
        f"{'total':{width}}  {'':11}  {'':15}  {total['parameters']:13,}"
        f"  {total['total'] / 1e6:11,.3f}"
    )
    parts = ", ".join(
        f"{name} {total[key] / total['total']:.1%}"
        for name, key in (
            ("multiply-accumulates", "macs"),
            ("elementwise", "elementwise"),
            ("weight normalisation", "weight_norm"),
        )
    )
    lines.append(f"\n{total['total'] / 1e9:.4g} Gflops for each image and evaluation ({parts})")
    return "\n".join(lines)


def _costs(
    module: nn.Module, name: str, inputs: tuple[Any, ...], output: Tensor
) -> list[LayerCost]:
    """A module's own operations, without those of modules in it."""
    shape = tuple(output.shape[1:])
    elements = output[0].numel()
    if isinstance(module, MPConv):
        weights = module.weight.numel()
        fan_in = module.weight[0].numel()
        return [
            LayerCost(
                name,
                kind="conv" if module.weight.ndim == 4 else "linear",
                output=shape,
                parameters=weights,
                macs=elements * fan_in,
                weight_norm=NORMALIZE * weights,
            )
        ]
    if isinstance(module, MPAttention):
        pixels = shape[1] * shape[2]
        softmax = SOFTMAX * module.heads * pixels**2
        return [
            # Logits, and sums of values: each a product over all channels for pairs of pixels.
            LayerCost(f"{name}.products", "attention", shape, macs=2 * elements * pixels),
            LayerCost(
                name,
                "elementwise",
                shape,
                elementwise=NORMALIZE * 3 * elements + softmax + MP_SUM * elements,
            ),
        ]
    if isinstance(module, UNet):
        # Of the concatenations, each output once.
        joined = sum(
            block.residual.conv0.weight.shape[1] * int(size.split("x")[0]) ** 2
            for size, block in module.dec.items()
            if block.skip_channels
        )
        return [LayerCost("concatenations", "elementwise", shape, elementwise=joined)]
    operations = {
        MPFourier: lambda: 4 * elements,
        MPEmbedding: lambda: (MP_SILU + (MP_SUM if module.label is not None else 0)) * elements,
        # MP-SiLU before each convolution, and the modulation.
        MPResidual: lambda: (
            MP_SILU * elements // shape[0] * module.conv0.weight.shape[1] + (MP_SILU + 1) * elements
        ),
        # Pixel norm and sum; the mean of 2×2 pixels.
        MPEncoderBlock: lambda: (
            (NORMALIZE + MP_SUM) * elements + (inputs[0][0].numel() if module.down else 0)
        ),
        MPDecoderBlock: lambda: MP_SUM * elements,
        MPOutput: lambda: elements,
    }.get(type(module))
    if operations is None:
        return []
    own = operations() + (elements if getattr(module, "clip_act", None) is not None else 0)
    gain = int(isinstance(module, MPResidual | MPOutput))
    return [LayerCost(name, "elementwise", shape, parameters=gain, elementwise=own)]
