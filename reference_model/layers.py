"""Layers of the configs before magnitudes are preserved, A to C: weights used as they are stored.

Equation numbers are those of Karras et al. 2024, arXiv:2312.02696; what config A is made of
follows Dhariwal & Nichol 2021 ("ADM", arXiv:2105.05233) as trained by Karras et al. 2022
("EDM", arXiv:2206.00364).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
"""Groups of a group normalisation, where channels suffice."""

LEAST_CHANNELS = 4
"""Fewest channels of a group."""


def uniform_init(parameter: Tensor, fan_in: int) -> None:
    """Draw from U(−1/√fan_in, 1/√fan_in): standard deviation 1/√(3 · fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)


def normal_init(parameter: Tensor, fan_in: int) -> None:
    """Draw from N(0, 1), whatever the fan-in."""
    nn.init.normal_(parameter)


def zero_init(parameter: Tensor, fan_in: int) -> None:
    """Start from zero: a residual branch that ends so is idle at first."""
    nn.init.zeros_(parameter)


class Conv(nn.Module):
    """Convolution or linear layer that uses its weights as they are stored.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: `(height, width)`, odd, padded to keep the resolution; `()` is a linear layer.
        bias: Whether to add a learned constant to each output channel.
        init: Fills a parameter, given the fan-in of the layer; the bias too.
        factor: What the weights are multiplied by at use.
        up: Whether to first double the resolution by repeating pixels.
        arrange: Reorders the output channels at use.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, ...],
        *,
        bias: bool = False,
        init: Callable[[Tensor, int], None] = uniform_init,
        factor: float = 1.0,
        up: bool = False,
        arrange: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.factor = factor
        self.up = up
        self.arrange = arrange
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        for parameter in self.parameters():
            init(parameter, self.weight[0].numel())

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in]` or `[B, in, H, W]` to the same with `out` channels."""
        weight = self.weight.to(x.dtype) * self.factor
        if self.arrange is not None:
            weight = self.arrange(weight)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def extra_repr(self) -> str:
        """Shape in the printed module tree."""
        out_channels, in_channels, *kernel = self.weight.shape
        bias = "" if self.bias is None else ", bias"
        return f"{in_channels}, {out_channels}, kernel={tuple(kernel)}{bias}"


def num_groups(channels: int) -> int:
    """Groups of a group normalisation: 32, or fewer if they would have less than 4 channels.

    Where that does not divide the channels (never at the paper's sizes), the largest number
    below that does.
    """
    most = max(min(GROUPS, channels // LEAST_CHANNELS), 1)
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class GroupNorm(nn.Module):
    """Group normalisation of configs A and B: mean and variance, then scale and shift.

    Args:
        channels: Channels of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = num_groups(channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, C, H, W]`."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.groups, weight, bias, eps=1e-5)


class GroupScale(nn.Module):
    """Group normalisation of configs C to E: b = a / √(mean over the group of a² + 10⁻⁴).

    Nothing is subtracted or learned (Eq. 29).

    Args:
        channels: Channels of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = num_groups(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, C, H, W]`; squares are summed in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = wide.unflatten(1, (self.groups, -1))  # (B, groups, C / groups, H, W)
        scale = (grouped.square().mean((2, 3, 4)) + 1e-4).rsqrt()
        scale = scale.repeat_interleave(x.shape[1] // self.groups, dim=1)
        return x * scale[:, :, None, None].to(x.dtype)


class Sinusoid(nn.Module):
    """Noise features of configs A and B: cosines, then sines, of geometric frequencies.

    Args:
        features: Width of the result, even; frequencies fall from 1 towards 1/10,000.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, Sec. 3.5, as used by ADM.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        if features % 2:
            raise ValueError(
                f"cosines and sines come in pairs: the noise features must be even in number "
                f"(got {features}); change model_channels or channel_mult_noise"
            )
        self.half = features // 2

    def forward(self, a: Tensor) -> Tensor:
        """Map `[B]` to `[B, features]`."""
        exponents = torch.arange(self.half, dtype=a.dtype, device=a.device) / self.half
        angle = torch.outer(a, 10_000.0**-exponents)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


def scale_and_shift(y: Tensor, emb: Tensor) -> Tensor:
    """Modulation of configs A and B: y · (1 + s) + b, with (s, b) the halves of `emb`."""
    scale, shift = emb[:, :, None, None].to(y.dtype).chunk(2, dim=1)
    return y * (1 + scale) + shift


def scale_only(y: Tensor, emb: Tensor) -> Tensor:
    """Modulation from config C on: y · (1 + s)."""
    return y * (1 + emb[:, :, None, None].to(y.dtype))
