"""Building blocks of configs F and G: embedding, attention, encoder and decoder blocks, output.

And what blocks of all configs share. F and G differ in constants and gains that the rung names
(`rungs.Rung`): plain sums have both weights one, a plain SiLU has the magnitude one.

Submodules are created in the order in which the checkpoint layout lists their parameters
(embedding gain, conv0, embedding linear, conv1, skip, qkv, projection), which is also the
order of `parameters()`. Source throughout: Karras et al. 2024, arXiv:2312.02696, Table 1 and
App. B.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference_model.dropout import ImageDropout
from reference_model.normalization import normalize

if TYPE_CHECKING:
    from reference_model.configs import NetworkConfig
    from reference_model.rungs import Rung


class MPEmbedding(nn.Module):
    """Noise level and class, mixed into one vector that conditions every block.

    Args:
        config: Widths, label dimension and `label_balance`.
        rung: Layers and constants.
    """

    def __init__(self, config: NetworkConfig, rung: Rung) -> None:
        super().__init__()
        self.label_dim = config.label_dim
        self.label_scale = math.sqrt(config.label_dim) if rung.class_scale else 1.0
        self.weights = rung.sum_weights(config.label_balance)
        self.silu_magnitude = rung.silu_magnitude
        self.fourier = rung.noise_features(config.noise_channels)
        self.noise = rung.noise_layers(rung.conv, config.noise_channels, config.emb_channels)
        # An unconditional network has no class branch at all, so nothing to sum.
        self.label = (
            rung.label_conv(config.label_dim, config.emb_channels, kernel=())
            if config.label_dim
            else None
        )

    def forward(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        """Map `[B]` and `[B, label_dim]` (`None`: no class, all zeros) to `[B, emb]`."""
        emb = self.noise(self.fourier(c_noise))
        if self.label is not None:
            if class_labels is None:
                class_labels = emb.new_zeros(1, self.label_dim)
            # √label_dim gives a one-hot vector unit mean square.
            labels = class_labels.to(emb.dtype) * self.label_scale
            weight_noise, weight_label = self.weights
            emb = torch.add(weight_label * self.label(labels), emb, alpha=weight_noise)
        return F.silu(emb) / self.silu_magnitude


class MPResidual(nn.Module):
    """Residual branch: two convolutions, the first modulated by the embedding.

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
        _, share = rung.sum_weights(config.res_balance)
        magnitude = rung.silu_magnitude
        self.emb_gain = rung.emb_gain()
        # Convolutions carry the constants of MP-SiLU before them and of MP-Sum behind.
        self.conv0 = rung.conv(
            in_channels, out_channels, kernel=(3, 3), factor=1 / magnitude, up=up
        )
        self.emb_linear = rung.conv(config.emb_channels, out_channels, kernel=())
        self.conv1 = rung.conv(out_channels, out_channels, kernel=(3, 3), factor=share / magnitude)
        self.dropout = ImageDropout(config.dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `[B, in, H, W]` and `[B, emb]` to `[B, out, H or 2H, W or 2W]`, times its share."""
        scale = 1 + self.emb_gain(self.emb_linear(emb))  # (B, out)
        scale = scale[:, :, None, None].to(x.dtype)
        y = self.conv0(F.silu(x))
        # A gradient needs what both steps start from; without one they need no memory.
        recording = torch.is_grad_enabled()
        y = F.silu(y * scale if recording else y.mul_(scale), inplace=not recording)
        return self.conv1(self.dropout(y))


def dot_product_attention(qkv: Tensor, heads: int) -> Tensor:
    """Softmax attention over all pixels, with logits that nothing bounds.

    Args:
        qkv: `[B, 3C, H, W]`; slowest first: head, channel of the head, query/key/value.
        heads: Number of heads.

    Returns:
        `[B, heads, HW, C / heads]`, of the type of `qkv`; computed in float32 at least.
    """
    q, k, v = qkv.flatten(2).unflatten(1, (heads, -1, 3)).permute(3, 0, 1, 4, 2)
    if qkv.element_size() < 4:
        q, k, v = q.float(), k.float(), v.float()
    y = F.scaled_dot_product_attention(q, k, v)  # logits divided by √(C / heads)
    return y.to(qkv.dtype)


class MPAttention(nn.Module):
    """Cosine self-attention over all pixels, added to its input.

    Queries, keys and values are pixel-normalised for each head, so that every logit lies
    within ±√(channels per head) and no sharpening can run away.

    Args:
        channels: Channels of input and result.
        config: `channels_per_head` and `attn_balance`.
        rung: Layers and weights of the sum.
    """

    def __init__(self, channels: int, config: NetworkConfig, rung: Rung) -> None:
        super().__init__()
        self.heads = config.num_heads(channels)
        self.share, share = rung.sum_weights(config.attn_balance)
        self.qkv = rung.conv(channels, 3 * channels, kernel=(1, 1), arrange=self._by_kind)
        self.proj = rung.conv(channels, channels, kernel=(1, 1), factor=share)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to the same shape."""
        batch, channels, height, width = x.shape
        y = self.qkv(x).permute(0, 2, 3, 1)  # (B, H, W, 3C), as channels-last stores it
        y = y.reshape(batch, height * width, 3, self.heads, channels // self.heads)
        q, k, v = normalize(y, dim=4).permute(2, 0, 3, 1, 4)  # (B, heads, HW, C / heads)
        y = F.scaled_dot_product_attention(q, k, v)  # logits divided by √(C / heads)
        y = y.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return self.proj(y).add_(x, alpha=self.share)

    def _by_kind(self, weight: Tensor) -> Tensor:
        """Put queries, keys and values one after the other.

        Stored is, slowest first: head, channel of the head, query/key/value.
        """
        return weight.unflatten(0, (self.heads, -1, 3)).movedim(2, 0).flatten(0, 2)


class Block(nn.Module):
    """What the blocks of all configs are made of: residual branch and main path, then attention.

    Args:
        in_channels: Channels from the block before.
        out_channels: Channels of the result.
        config: Sizes, and constants of its own.
        rung: Layers and constants.
        attention: Whether self-attention follows the residual branch.
        down: Whether the block first halves the resolution by 2×2 means.
        up: Whether the block first doubles the resolution by repeating pixels.
        skip_channels: Channels of the encoder output that the network concatenates to the
            input of this block; 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: NetworkConfig,
        rung: Rung,
        *,
        attention: bool,
        down: bool = False,
        up: bool = False,
        skip_channels: int = 0,
    ) -> None:
        super().__init__()
        self.share, _ = rung.sum_weights(config.res_balance)
        self.pixel_norm = rung.pixel_norm  # of encoder blocks of F and G
        self.clip_act = config.clip_act
        self.down, self.up = down, up
        self.skip_channels = skip_channels
        total = in_channels + skip_channels
        self.residual = self.make_residual(total, out_channels, config, rung)
        self.skip = main_path_conv(total, out_channels, rung)
        self.attention = rung.attention(out_channels, config, rung) if attention else nn.Identity()

    def make_residual(
        self, in_channels: int, out_channels: int, config: NetworkConfig, rung: Rung
    ) -> nn.Module:
        """Make the residual branch of a block that reads so many channels."""
        return rung.residual(in_channels, out_channels, config, rung, up=self.up)


class MPEncoderBlock(Block):
    """Encoder block: resample, change width, normalise pixels, then residual and attention.

    The pixel norm on the main path is what stops magnitudes from drifting from block to
    block: mean-pooling alone halves them.
    """

    def make_residual(
        self, in_channels: int, out_channels: int, config: NetworkConfig, rung: Rung
    ) -> nn.Module:
        """Make the residual branch, which comes after the change of width."""
        return super().make_residual(out_channels, out_channels, config, rung)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `[B, in, H, W]` and `[B, emb]` to `[B, out, H or H/2, W or W/2]`."""
        if self.down:
            x = F.avg_pool2d(x, 2)
        x = self.pixel_norm(self.skip(x))
        x = self.residual(x, emb).add_(x, alpha=self.share)
        return clip(self.attention(x), self.clip_act)


class MPDecoderBlock(Block):
    """Decoder block: resample, then residual and attention, with no pixel norm."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `[B, in + skip, H, W]` and `[B, emb]` to `[B, out, H or 2H, W or 2W]`."""
        y = self.residual(x, emb)
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = y.add_(self.skip(x), alpha=self.share)
        return clip(self.attention(x), self.clip_act)


class MPOutput(nn.Module):
    """Last convolution with a learned gain, zero at first, so that training starts at F = 0.

    Args:
        in_channels: Channels of the last decoder block.
        out_channels: Channels of the image.
        rung: Layers; config F has no gain.
    """

    def __init__(self, in_channels: int, out_channels: int, rung: Rung) -> None:
        super().__init__()
        self.conv = rung.last_conv(in_channels, out_channels, kernel=(3, 3))
        self.gain = rung.output_gain()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in, H, W]` to `[B, out, H, W]`."""
        return self.gain(self.conv(x))


def main_path_conv(in_channels: int, out_channels: int, rung: Rung) -> nn.Module:
    """1×1 convolution on the main path where the width changes, nothing elsewhere."""
    if in_channels == out_channels:
        return nn.Identity()
    return rung.conv(in_channels, out_channels, kernel=(1, 1))


def clip(x: Tensor, limit: float | None) -> Tensor:
    """Clamp to ±`limit`: a guard against overflow in half precision, idle in practice."""
    # Unlike that of clamp, the gradient of hardtanh is a single pass.
    return x if limit is None else F.hardtanh(x, -limit, limit, inplace=True)
