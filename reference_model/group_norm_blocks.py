"""Building blocks of configs A to E, whose residual branches normalise groups of channels.

Encoder and decoder use the same block. Submodules are created in the order in which `blocks`
creates those of F and G: conv0, embedding linear, conv1, skip, qkv, projection, with a norm
before what it feeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from reference_model.blocks import Block, clip, dot_product_attention
from reference_model.dropout import ImageDropout

if TYPE_CHECKING:
    from reference_model.configs import NetworkConfig
    from reference_model.rungs import Rung


class GroupNormResidual(nn.Module):
    """Residual branch: norm, SiLU, resampling, convolution; norm, modulation, SiLU, convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result.
        config: Embedding width and dropout.
        rung: Layers, norm and modulation.
        down: Whether to halve the resolution by 2×2 means.
        up: Whether to double it by repeating pixels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: NetworkConfig,
        rung: Rung,
        *,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.norm0 = rung.norm(in_channels)
        self.down = nn.AvgPool2d(2) if down else nn.Identity()
        self.conv0 = rung.conv(in_channels, out_channels, kernel=(3, 3), up=up)
        self.emb_linear = rung.conv(
            config.emb_channels, out_channels * rung.modulation_width, kernel=()
        )
        self.modulate = rung.modulation
        self.norm1 = rung.norm(out_channels)
        self.conv1 = rung.last_conv(out_channels, out_channels, kernel=(3, 3))
        self.dropout = ImageDropout(config.dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `[B, in, H, W]` and `[B, emb]` to `[B, out, …]` at the block's resolution."""
        y = self.conv0(self.down(F.silu(self.norm0(x))))
        y = self.modulate(self.norm1(y), self.emb_linear(emb))
        return self.conv1(self.dropout(F.silu(y)))


class SoftmaxAttention(nn.Module):
    """Self-attention of configs A and B: a group norm before it, dot products in float32.

    Args:
        channels: Channels of input and result.
        config: `channels_per_head`.
        rung: Layers and norm.
    """

    def __init__(self, channels: int, config: NetworkConfig, rung: Rung) -> None:
        super().__init__()
        self.heads = config.num_heads(channels)
        self.norm = rung.norm(channels)
        self.qkv = rung.conv(channels, 3 * channels, kernel=(1, 1))
        self.proj = rung.last_conv(channels, channels, kernel=(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to the same shape."""
        y = dot_product_attention(self.qkv(self.norm(x)), self.heads)
        return x + self.proj(y.transpose(2, 3).reshape(x.shape))


class GroupNormBlock(Block):
    """Block of encoder or decoder; its residual branch resamples after a norm of its own."""

    def make_residual(
        self, in_channels: int, out_channels: int, config: NetworkConfig, rung: Rung
    ) -> nn.Module:
        """Make the residual branch."""
        return rung.residual(in_channels, out_channels, config, rung, down=self.down, up=self.up)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `[B, in + skip, H, W]` and `[B, emb]` to `[B, out, …]`, resampled if need be."""
        y = self.residual(x, emb)
        if self.down:
            x = F.avg_pool2d(x, 2)
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = y + self.skip(x)
        return clip(self.attention(x), self.clip_act)


class GroupNormOutput(nn.Module):
    """Last layers: norm, SiLU, convolution.

    Args:
        in_channels: Channels of the last decoder block.
        out_channels: Channels of the image.
        rung: Layers and norm.
    """

    def __init__(self, in_channels: int, out_channels: int, rung: Rung) -> None:
        super().__init__()
        self.norm = rung.norm(in_channels)
        self.conv = rung.last_conv(in_channels, out_channels, kernel=(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in, H, W]` to `[B, out, H, W]`."""
        return self.conv(F.silu(self.norm(x)))
