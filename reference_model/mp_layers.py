"""Magnitude-preserving layers: given inputs of unit expected magnitude, they return the same.

The expected magnitude of an array a of N entries is M[a] = √(1/N Σ E[a_i²]), uncentred
(Eq. 68). Each function here maps M = 1 to M = 1 under the assumption that its inputs are
uncorrelated. Equation numbers are those of Karras et al. 2024, arXiv:2312.02696.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# √E[silu(x)²] for x ~ N(0, 1) is 0.59647; the paper rounds it (Eq. 81).
SILU_MAGNITUDE = 0.596


def normalize(x: Tensor, dim: int | Sequence[int], eps: float = 1e-4) -> Tensor:
    """Divide by the root mean square over `dim`, so that what remains has RMS one.

    `eps` is added to the RMS itself, not under the root (Algorithm 1, where Eq. 30 puts it
    inside; they differ for tiny inputs only). The norm is taken in float32 at least, since
    squares of half-precision numbers overflow.

    Args:
        x: Tensor of any shape and floating dtype.
        dim: Dimensions that share one norm: 1 for pixel normalisation of `[B, C, H, W]`.
        eps: Keeps an all-zero slice finite.

    Returns:
        Tensor of the same shape and dtype.

    Source:
        arXiv:2312.02696, Eq. 30 and Algorithm 1.
    """
    norm_dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=norm_dtype)
    elements_per_norm = x.numel() / norm.numel()
    return x / (norm / math.sqrt(elements_per_norm) + eps).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU scaled to unit magnitude for unit normal input (Eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Weighted sum of two uncorrelated tensors; `t` is the share of `b` (Eq. 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Concatenate channels so that each input contributes by `t`, not by its width (Eq. 103).

    Args:
        a: Main path, `[B, Na, ...]`.
        b: Skip connection, `[B, Nb, ...]`.
        t: Share of `b` in the magnitude of the result; 0 < t < 1.

    Returns:
        `[B, Na + Nb, ...]`, `a` first.

    Source:
        arXiv:2312.02696, Eq. 103.
    """
    channels_a, channels_b = a.shape[1], b.shape[1]
    scale = math.sqrt((channels_a + channels_b) / ((1 - t) ** 2 + t**2))
    scale_a = scale * (1 - t) / math.sqrt(channels_a)
    scale_b = scale * t / math.sqrt(channels_b)
    return torch.cat([a * scale_a, b * scale_b], dim=1)


class MPConv(nn.Module):
    """Convolution or linear layer with forced weight normalisation and no bias.

    The stored weight has RMS one for each output channel and is normalised again, with
    gradient, at every use. Each training-mode forward first overwrites the stored weight by
    its normalised self (Algorithm 1): this keeps the effective learning rate tied to the
    schedule, since Adam's update then always meets a weight of the same size. Evaluation
    leaves the stored weight alone, so averages of weights pass through unchanged.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: `(height, width)`, odd, padded to keep the resolution; `()` is a linear layer.

    Source:
        arXiv:2312.02696, Eq. 47, Eq. 66 and Algorithm 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in]` or `[B, in, H, W]` to the same with `out` channels."""
        over_inputs = tuple(range(1, self.weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight, over_inputs))
        # 1/√fan_in on top of RMS one makes each output channel's weight vector of unit norm.
        fan_in = self.weight[0].numel()
        weight = (normalize(self.weight, over_inputs) / math.sqrt(fan_in)).to(x.dtype)
        if weight.ndim == 2:
            return x @ weight.t()
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def extra_repr(self) -> str:
        """Shape in the printed module tree."""
        out_channels, in_channels, *kernel = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel={tuple(kernel)}"


class MPFourier(nn.Module):
    """Random Fourier features √2·cos(2π(f·a + φ)) of a scalar, frozen (Eq. 75).

    Args:
        features: Width of the result; f ~ N(0, 1) and φ ~ U(0, 1) are drawn once.

    Source:
        arXiv:2312.02696, Eq. 75.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(features))
        self.register_buffer("phases", torch.rand(features))

    def forward(self, a: Tensor) -> Tensor:
        """Map `[B]` to `[B, features]`."""
        angle = torch.outer(a.to(self.freqs.dtype), self.freqs) + self.phases
        return (2 * math.pi * angle).cos() * math.sqrt(2)


class Gain(nn.Module):
    """One learned scalar, zero at first: forced normalisation rules out zero weights.

    Source:
        arXiv:2312.02696, App. B.7.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` scaled by the gain."""
        return x * self.weight.to(x.dtype)
