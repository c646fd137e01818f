"""Building blocks of the unit-scaled network: those of config G with static factors.

Sums and concatenations of G have unit variance for unit inputs as they are. What differs:
layers (`unit_scaling.UnitConv`), attention without normalisation, encoder blocks without pixel
norm, no learned gains, and gradients of their own scale in every branch. Submodules are created
in the order in which `blocks` creates those of G.

Source: Blake, Orr & Luschi 2023, arXiv:2303.11257.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from reference_model.blocks import (
    MPDecoderBlock,
    MPEmbedding,
    MPEncoderBlock,
    clip,
    dot_product_attention,
)
from reference_model.dropout import ImageDropout
from reference_model.unit_scaling import scaled

if TYPE_CHECKING:
    from reference_model.configs import NetworkConfig
    from reference_model.rungs import Rung


COMMON_TO_NEIGHBOURS, COMMON_TO_ALL = 1 / 3, 1 / 2
"""Assumed part of the variance that is common to pixels of which a mean is taken.

Means of n independent pixels would ask for the factor √n, those of equal ones for none. Classes,
noise level and the mean of SiLU reach all pixels alike: at the start a fifth to a third is common
to 2×2 pixels of the first level, and a third to nine tenths to those that attention weights.
"""


class UnitEmbedding(MPEmbedding):
    """Embedding of G; its gradient is a sum over blocks and pixels, which is scaled back.

    Args:
        config: Widths, label dimension and `label_balance`.
        rung: Layers and constants.
    """

    def __init__(self, config: NetworkConfig, rung: Rung) -> None:
        super().__init__(config, rung)
        # Blocks count by halves with each skip connection that bridges them, two by two:
        # 1 + 2 (½ + ¼ + …) = 3 blocks of the finest level.
        width = 3 * config.model_channels * config.res_balance**2
        width /= (1 - config.res_balance) ** 2 + config.res_balance**2
        pixels = config.img_resolution**2
        self.backward_scale = math.sqrt(2 * config.emb_channels / (max(width, 1e-4) * pixels))

    def forward(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        """Map `[B]` and `[B, label_dim]` (`None`: no class, all zeros) to `[B, emb]`."""
        return scaled(super().forward(c_noise, class_labels), backward=self.backward_scale)


class UnitResidual(nn.Module):
    """Residual branch of G; the embedding modulates by (1 + e) / √2 instead of 1 + gain · e.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result.
        config: Embedding width, dropout, and `res_balance`.
        rung: Layers and constants.
        up: Whether the branch first doubles the resolution by repeating pixels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: NetworkConfig,
        rung: Rung,
        *,
        up: bool = False,
    ) -> None:
        super().__init__()
        _, self.share = rung.sum_weights(config.res_balance)
        factor = 1 / rung.silu_magnitude
        self.conv0 = rung.conv(in_channels, out_channels, kernel=(3, 3), factor=factor, up=up)
        self.emb_linear = rung.conv(config.emb_channels, out_channels, kernel=())
        self.conv1 = rung.conv(out_channels, out_channels, kernel=(3, 3), factor=factor)
        self.dropout = ImageDropout(config.dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `[B, in, H, W]` and `[B, emb]` to `[B, out, H or 2H, W or 2W]`, times its share."""
        # The share acts where the branch ends on values, and where it starts on gradients.
        y = self.conv0(F.silu(scaled(x, backward=self.share)))
        height, width = y.shape[2:]
        emb = scaled(emb, backward=self.share)
        e = self.emb_linear(emb, summed=height * width / 2)[:, :, None, None]
        y = y * ((1 + e) * math.sqrt(0.5)).to(y.dtype)
        y = self.conv1(self.dropout(F.silu(y)))
        return scaled(y, forward=self.share)


def mean_scale(pixels: float, common: float) -> float:
    """What restores the magnitude of a mean over pixels with a common part of their variance."""
    return 1 / math.sqrt(common + (1 - common) / max(pixels, 1.0))


class UnitAttention(nn.Module):
    """Dot-product self-attention over all pixels, added to its input.

    Over n pixels with logits of N(0, 1), Σ w² ≈ e / n: it is a mean over n / e of them.

    Args:
        channels: Channels of input and result.
        config: `channels_per_head` and `attn_balance`.
        rung: Layers and weights of the sum.
    """

    def __init__(self, channels: int, config: NetworkConfig, rung: Rung) -> None:
        super().__init__()
        self.heads = config.num_heads(channels)
        self.main_share, self.share = rung.sum_weights(config.attn_balance)
        self.qkv = rung.conv(channels, 3 * channels, kernel=(1, 1))
        self.proj = rung.conv(channels, channels, kernel=(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to the same shape."""
        pixels = x.shape[2] * x.shape[3]
        forward = mean_scale(pixels / math.e, COMMON_TO_ALL)
        backward = max(math.sqrt(pixels / math.e), 1.0)
        y = self.qkv(scaled(x, backward=self.share * forward / backward))
        y = scaled(dot_product_attention(y, self.heads), forward=forward, backward=backward)
        y = self.proj(y.transpose(2, 3).reshape(x.shape))
        return x * self.main_share + scaled(y, forward=self.share)


class UnitEncoderBlock(MPEncoderBlock):
    """Encoder block: resample, change width, then residual and attention."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `[B, in, H, W]` and `[B, emb]` to `[B, out, H or H/2, W or W/2]`."""
        if self.down:
            x = F.avg_pool2d(x, 2) * mean_scale(4, COMMON_TO_NEIGHBOURS)
        x = self.skip(x)
        x = x * self.share + self.residual(x, emb)
        return clip(self.attention(x), self.clip_act)


class UnitDecoderBlock(MPDecoderBlock):
    """Decoder block: resample, then residual and attention."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `[B, in + skip, H, W]` and `[B, emb]` to `[B, out, H or 2H, W or 2W]`."""
        y = self.residual(x, emb)
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.skip(x) * self.share + y
        return clip(self.attention(x), self.clip_act)


class UnitOutput(nn.Module):
    """Last convolution: its input is a cut-edge, so that gradients may have a factor of their own.

    Args:
        in_channels: Channels of the last decoder block.
        out_channels: Channels of the image.
        rung: Layers.
    """

    def __init__(self, in_channels: int, out_channels: int, rung: Rung) -> None:
        super().__init__()
        self.backward_scale = math.sqrt(in_channels / out_channels)
        self.conv = rung.last_conv(in_channels, out_channels, kernel=(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in, H, W]` to `[B, out, H, W]`."""
        return self.conv(scaled(x, backward=self.backward_scale))
