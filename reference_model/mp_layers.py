"""Magnitude-preserving layers: given inputs of unit expected magnitude, they return the same.

The expected magnitude of an array a of N entries is M[a] = √(1/N Σ E[a_i²]), uncentred
(Eq. 68). Each function here maps M = 1 to M = 1 under the assumption that its inputs are
uncorrelated. Equation numbers are those of Karras et al. 2024, arXiv:2312.02696.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference_model.normalization import EPS, normalize, root_mean_square

# √E[silu(x)²] for x ~ N(0, 1) is 0.59647; the paper rounds it (Eq. 81).
SILU_MAGNITUDE = 0.596


def mp_silu(x: Tensor) -> Tensor:
    """SiLU scaled to unit magnitude for unit normal input (Eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum_weights(t: float) -> tuple[float, float]:
    """Weights of the two summands of `mp_sum` (Eq. 88)."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Weighted sum of two uncorrelated tensors; `t` is the share of `b` (Eq. 88)."""
    weight_a, weight_b = mp_sum_weights(t)
    return torch.add(weight_b * b, a, alpha=weight_a)


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
    # Parts of equal width at t = ½ stay what they are, but for rounding.
    parts = ((a, scale_a), (b, scale_b))
    return torch.cat([x if abs(s - 1) < 1e-15 else x * s for x, s in parts], dim=1)


class MPConv(nn.Module):
    """Convolution or linear layer with forced weight normalisation and no bias.

    The stored weight has RMS one for each output channel and is normalised again, with
    gradient, at every use. Each training-mode forward first overwrites the stored weight by
    its normalised self (Algorithm 1): this keeps the effective learning rate tied to the
    schedule, since Adam's update then always meets a weight of the same size. Evaluation
    leaves the stored weight alone, so averages of weights pass through unchanged; under
    `folding.folded_weights` it normalises once for many uses.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: `(height, width)`, odd, padded to keep the resolution; `()` is a linear layer.
        factor: Magnitude of the output for unit input. Constants that precede or follow the
            layer cost nothing as part of its weight.
        normalized: Whether weights are normalised at use (Eq. 47); if not, what is stored is
            divided by √fan_in alone.
        forced: Whether training overwrites what is stored by its normalised self (Eq. 66).
        up: Whether to first double the resolution by repeating pixels; for kernels of 3×3.
        arrange: Reorders the output channels of the normalised weight.

    Source:
        arXiv:2312.02696, Eq. 47, Eq. 66 and Algorithm 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, ...],
        *,
        factor: float = 1.0,
        normalized: bool = True,
        forced: bool = True,
        up: bool = False,
        arrange: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.factor = factor
        self.normalized = normalized
        self.forced = forced
        self.up = up
        self.arrange = arrange
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.folded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in]` or `[B, in, H, W]` to the same with `out` channels."""
        weight = self.folded
        # A folded weight is a constant: where gradients are recorded it would hide them.
        if weight is None or self.training or torch.is_grad_enabled():
            weight = self.kernel()
        weight = weight.to(x.dtype)
        if weight.ndim == 2:
            return x @ weight.t()
        if self.up:
            return F.conv_transpose2d(x, weight, stride=2, padding=1)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def kernel(self) -> Tensor:
        """Normalise the weight, in training the stored one too, and arrange it for use."""
        over_inputs = tuple(range(1, self.weight.ndim))
        rms = None
        if self.training and self.forced:
            with torch.no_grad():
                rms = root_mean_square(self.weight, over_inputs)
                divisor = rms + EPS
                self.weight.div_(divisor)
                rms /= divisor  # of the new weight
        # 1/√fan_in on top of RMS one makes each output channel's weight vector of unit norm.
        factor = self.factor / math.sqrt(self.weight[0].numel())
        if self.normalized:
            weight = normalize(self.weight, over_inputs, rms=rms, factor=factor)
        else:
            weight = self.weight * factor
        if self.arrange is not None:
            weight = self.arrange(weight)
        return repeat_kernel(weight) if self.up else weight

    def extra_repr(self) -> str:
        """Shape in the printed module tree."""
        out_channels, in_channels, *kernel = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel={tuple(kernel)}"


def channels_last(weight: Tensor) -> Tensor:
    """Store a kernel as convolutions of channels-last images read it, else a copy for each."""
    if weight.ndim != 4:
        return weight
    return weight.contiguous(memory_format=torch.channels_last)


def repeat_kernel(weight: Tensor) -> Tensor:
    """Merge a 3×3 convolution with the repetition of pixels that precedes it.

    Repeating each pixel 2×2 is a transposed convolution with a kernel of ones; the two in a
    row are one with a kernel of 4×4. It multiplies 16 times for each input pixel and pair of
    channels instead of 4 · 9 times.

    Args:
        weight: `[out, in, 3, 3]`.

    Returns:
        `[in, out, 4, 4]`, for `conv_transpose2d` with stride 2 and padding 1.
    """
    flipped = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    rows = flipped[:, :, 1:] + flipped[:, :, :-1]
    return rows[..., 1:] + rows[..., :-1]


class MPFourier(nn.Module):
    """Random Fourier features √2·cos(2π(f·a + φ)) of a scalar, frozen (Eq. 75).

    Args:
        features: Width of the result; f ~ N(0, 1) and φ ~ U(0, 1) are drawn once.
        amplitude: Of the cosines; √2 gives them unit magnitude.

    Source:
        arXiv:2312.02696, Eq. 75.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, features: int, *, amplitude: float = math.sqrt(2)) -> None:
        super().__init__()
        self.amplitude = amplitude
        self.register_buffer("freqs", torch.randn(features))
        self.register_buffer("phases", torch.rand(features))

    def forward(self, a: Tensor) -> Tensor:
        """Map `[B]` to `[B, features]`."""
        angle = torch.outer(a.to(self.freqs.dtype), self.freqs) + self.phases
        return (2 * math.pi * angle).cos() * self.amplitude


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
