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
    MPResidual,
)
from reference_model.group_norm_blocks import (
    GroupNormBlock,
    GroupNormOutput,
    GroupNormResidual,
    SoftmaxAttention,
)
from reference_model.layers import Conv, GroupNorm, GroupScale, Sinusoid
from reference_model.mp_layers import Gain, MPConv, MPFourier
from reference_model.rungs import Rung, identity, plain_cat, plain_sum_weights, rung_of
from reference_model.unet import UNet
from reference_model.unit_blocks import (
    UnitAttention,
    UnitDecoderBlock,
    UnitEmbedding,
    UnitEncoderBlock,
    UnitResidual,
)

if TYPE_CHECKING:
    from reference_model.configs import NetworkConfig

# Operations for each element: square, sum and division; SiLU; softmax.
NORMALIZE, SILU, SOFTMAX = 3, 3, 3
# Mean and variance, then scale and shift.
GROUP_NORM = 6


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
        rung = rung_of(config)
        net = UNet(config, rung).eval()
        image = torch.zeros(1, *config.input_shape)
        labels = torch.zeros(1, config.label_dim) if config.label_dim else None
        c_noise = torch.zeros(1)
    costs: list[LayerCost] = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            costs.extend(_costs(module, name, rung, inputs, output))

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
    module: nn.Module, name: str, rung: Rung, inputs: tuple[Any, ...], output: Tensor
) -> list[LayerCost]:
    """A module's own operations, without those of modules in it."""
    shape = tuple(output.shape[1:])
    elements = output[0].numel()
    if isinstance(module, MPConv | Conv):
        weights = module.weight.numel()
        return [
            LayerCost(
                name,
                kind="conv" if module.weight.ndim == 4 else "linear",
                output=shape,
                parameters=sum(p.numel() for p in module.parameters()),
                macs=elements * module.weight[0].numel(),
                elementwise=0 if getattr(module, "bias", None) is None else elements,
                weight_norm=NORMALIZE * weights if getattr(module, "normalized", False) else 0,
            )
        ]
    costs = []
    if isinstance(module, MPAttention | SoftmaxAttention | UnitAttention):
        # Logits, and sums of values: each a product over all channels for pairs of pixels.
        macs = 2 * elements * shape[1] * shape[2]
        costs.append(LayerCost(f"{name}.products", "attention", shape, macs=macs))
    own = _elementwise(module, rung, inputs, output)
    learned = sum(p.numel() for p in module.parameters(recurse=False))
    if own or learned:
        costs.append(
            LayerCost(name or "concatenations", "elementwise", shape, learned, elementwise=own)
        )
    return costs


def _elementwise(module: nn.Module, rung: Rung, inputs: tuple[Any, ...], output: Tensor) -> int:
    """Operations on elements of activations outside of layers with weights."""
    elements, entering = output[0].numel(), inputs[0][0].numel()
    add = 1 if rung.sum_weights is plain_sum_weights else 3
    silu = SILU if rung.silu_magnitude == 1 else SILU + 1
    norm = 0 if rung.pixel_norm is identity else NORMALIZE

    def embedding() -> int:
        return (silu + (add if module.label is not None else 0)) * elements

    def block() -> int:
        return (add + int(getattr(module, "clip_act", None) is not None)) * elements

    def attention() -> int:
        softmax = SOFTMAX * int(getattr(module, "heads", 1)) * output[0, 0].numel() ** 2
        return softmax + add * elements

    operations: dict[type[nn.Module], Callable[[], int]] = {
        Sinusoid: lambda: 2 * elements,
        MPFourier: lambda: 4 * elements,
        MPEmbedding: embedding,
        UnitEmbedding: embedding,
        nn.SiLU: lambda: SILU * elements,
        nn.AvgPool2d: lambda: entering,
        Gain: lambda: elements,
        GroupNorm: lambda: GROUP_NORM * elements,
        GroupScale: lambda: NORMALIZE * elements,
        # Activation before each convolution, and the modulation.
        MPResidual: lambda: silu * entering + (silu + 1) * elements,
        UnitResidual: lambda: silu * entering + (silu + 1) * elements,
        GroupNormResidual: lambda: SILU * entering + (SILU + rung.modulation_width) * elements,
        MPAttention: lambda: NORMALIZE * 3 * elements + attention(),
        SoftmaxAttention: attention,
        UnitAttention: lambda: elements + attention(),
        # Pixel norm; the mean of 2×2 pixels.
        MPEncoderBlock: lambda: block() + norm * elements + (entering if module.down else 0),
        MPDecoderBlock: block,
        UnitEncoderBlock: lambda: block() + (entering + elements if module.down else 0),
        UnitDecoderBlock: block,
        GroupNormBlock: block,
        GroupNormOutput: lambda: SILU * entering,
        UNet: lambda: 0 if rung.cat is plain_cat else _joined(module),
    }
    return operations.get(type(module), lambda: 0)()


def _joined(net: nn.Module) -> int:
    """Elements of all concatenations, each scaled once."""
    return sum(
        block.residual.conv0.weight.shape[1] * int(size.split("x")[0]) ** 2
        for size, block in net.dec.items()
        if block.skip_channels
    )
