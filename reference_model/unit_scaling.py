"""Unit scaling: static factors that give activations, weights and gradients unit RMS at first.

Nothing is normalised afterwards: what training does to magnitudes, it does. Factors may differ
between forward and backward pass where the graph has a single connection (a cut-edge), which
every weight has to the rest of the network: there a factor scales all gradients behind it alike.
The same holds for a part of the network that one factor closes off: gradients are multiplied
where they enter it and divided by the same where they leave.

Source: Blake, Orr & Luschi 2023, arXiv:2303.11257. `docs/ladder.md` says what is our choice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from reference_model.layers import Conv, normal_init
from reference_model.mp_layers import mp_cat


def scaled(x: Tensor, *, forward: float = 1.0, backward: float = 1.0) -> Tensor:
    """Multiply a tensor by one factor, and its gradient by another.

    Args:
        x: Any tensor.
        forward: Factor of the values.
        backward: Factor of the gradient, whatever `forward` is.

    Returns:
        Tensor of the same shape and dtype.

    Source:
        arXiv:2303.11257, Sec. 4: the basis of all its operations.
    """
    return _Scaled.apply(x, forward, backward)  # type: ignore[no-any-return]


class _Scaled(torch.autograd.Function):
    """y = forward · x with ∇x = backward · ∇y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.factor = backward
        return x.view_as(x) if forward == 1 else x * forward

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad if ctx.factor == 1 else grad * ctx.factor), None, None


class UnitConv(Conv):
    """Convolution or linear layer with weights of N(0, 1) and static factors.

    The output is divided by √fan_in and the gradient of the input too, since a factor between
    the two would have to agree with every parallel path. The gradient of the weight, a sum over
    images and pixels, is divided by the root of their number instead.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: `(height, width)`, odd, padded to keep the resolution; `()` is a linear layer.
        factor: Magnitude of the output for unit input.
        up: Whether to first double the resolution by repeating pixels.

    Source:
        arXiv:2303.11257, Sec. 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, ...],
        *,
        factor: float = 1.0,
        up: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, init=normal_init, factor=factor, up=up)

    def forward(self, x: Tensor, *, summed: float = 1.0) -> Tensor:
        """Map `[B, in]` or `[B, in, H, W]` to the same with `out` channels.

        Args:
            x: The input.
            summed: Mean square of the gradient that is expected of each output, one but where
                outputs are used many times.
        """
        pixels = x[0, 0].numel() * (4 if self.up else 1)
        weight = scaled(
            self.weight,
            forward=self.factor / math.sqrt(self.weight[0].numel()),
            backward=1 / math.sqrt(len(x) * pixels * summed),
        ).to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def unit_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """`mp_cat`, with the gradient of the main path kept at unit size.

    A layer that follows halves the variance of its input's gradient, for it reads twice as many
    channels as it returns; `descend` undoes it.
    """
    return mp_cat(scaled(a, backward=math.sqrt(2)), b, t)


def descend(x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
    """Enter the part of the network that one skip connection bridges and `unit_cat` ends.

    Where `x` forks, half of the gradient's variance comes by either way.
    """
    return scaled(x, backward=math.sqrt(0.5)), scaled(emb, backward=math.sqrt(0.5))
