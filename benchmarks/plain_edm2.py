"""Config G transcribed from the paper's formulas, one after the other: what speed is measured by.

Every weight is normalised at every forward, in training twice as Algorithm 1 has it; every
formula is an operation of its own; attention is two einsums around a softmax. Takes the weights
of a `reference_model.Denoiser` in the order in which both create them. Equation numbers are
those of Karras et al. 2024, arXiv:2312.02696.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference_model.configs import NetworkConfig


def normalize(x: Tensor, dims: Sequence[int], eps: float = 1e-4) -> Tensor:
    """x / (RMS(x) + eps), Algorithm 1 and Eq. 30."""
    rms = x.square().mean(dim=dims, keepdim=True).sqrt()
    return x / (rms + eps)


def mp_silu(x: Tensor) -> Tensor:
    """Eq. 81."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Eq. 88."""
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Eq. 103."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale * (1 - t) / math.sqrt(na) * a, scale * t / math.sqrt(nb) * b], dim=1)


class Conv(nn.Module):
    """Eq. 47 at use, Eq. 66 before it: a layer that keeps magnitudes."""

    def __init__(self, in_channels: int, out_channels: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor) -> Tensor:
        dims = list(range(1, self.weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight, dims))
        weight = normalize(self.weight, dims) / math.sqrt(self.weight[0].numel())
        if weight.ndim == 2:
            return x @ weight.t()
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Output(Conv):
    """The last convolution, with a learned gain."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, 3)
        self.gain = nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Fourier(nn.Module):
    """Eq. 75."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(features))
        self.register_buffer("phases", torch.rand(features))

    def forward(self, a: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(2 * math.pi * (a[:, None] * self.freqs + self.phases))


class Block(nn.Module):
    """One block of encoder or decoder: resample, residual branch, attention, clamp."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: NetworkConfig,
        *,
        decoder: bool = False,
        attention: bool = False,
        resample: bool = False,
        skip_channels: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.decoder, self.resample = config, decoder, resample
        self.skip_channels = skip_channels
        total = in_channels + skip_channels
        self.gain = nn.Parameter(torch.zeros([]))
        self.conv0 = Conv(total if decoder else out_channels, out_channels, 3, 3)
        self.emb = Conv(config.emb_channels, out_channels)
        self.conv1 = Conv(out_channels, out_channels, 3, 3)
        self.skip = Conv(total, out_channels, 1, 1) if total != out_channels else None
        self.qkv = Conv(out_channels, 3 * out_channels, 1, 1) if attention else None
        self.proj = Conv(out_channels, out_channels, 1, 1) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        c = self.config
        if self.decoder:
            if self.resample:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
        else:
            if self.resample:
                x = F.avg_pool2d(x, 2)
            if self.skip is not None:
                x = self.skip(x)
            x = normalize(x, [1])

        y = self.conv0(mp_silu(x))
        y = y * (1 + self.gain * self.emb(emb))[:, :, None, None]
        y = F.dropout(mp_silu(y), c.dropout, self.training)
        y = self.conv1(y)
        if self.decoder and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, y, c.res_balance)

        if self.qkv is not None and self.proj is not None:
            batch, channels, height, width = x.shape
            heads = c.num_heads(channels)
            y = self.qkv(x).reshape(batch, heads, channels // heads, 3, height * width)
            q, k, v = normalize(y, [2]).unbind(3)
            logits = torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(channels // heads)
            y = torch.einsum("nhqk,nhck->nhcq", logits.softmax(dim=3), v).reshape(x.shape)
            x = mp_sum(x, self.proj(y), c.attn_balance)
        return x if c.clip_act is None else x.clip(-c.clip_act, c.clip_act)


class PlainDenoiser(nn.Module):
    """D(x; σ, c) and u(σ), called like `reference_model.Denoiser`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.fourier = Fourier(config.noise_channels)
        self.noise = Conv(config.noise_channels, config.emb_channels)
        self.label = Conv(config.label_dim, config.emb_channels) if config.label_dim else None

        levels = [
            (config.img_resolution >> level, config.model_channels * mult)
            for level, mult in enumerate(config.channel_mult)
        ]
        channels = levels[0][1]
        self.stem = Conv(config.img_channels + 1, channels, 3, 3)
        self.enc, self.dec = nn.ModuleList(), nn.ModuleList()
        skips = [channels]
        for level, (resolution, width) in enumerate(levels):
            if level:
                self.enc.append(Block(channels, channels, config, resample=True))
                skips.append(channels)
            for _ in range(config.num_blocks):
                attention = resolution in config.attn_resolutions
                self.enc.append(Block(channels, width, config, attention=attention))
                channels = width
                skips.append(channels)
        for level, (resolution, width) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec.append(Block(channels, channels, config, decoder=True, attention=True))
                self.dec.append(Block(channels, channels, config, decoder=True))
            else:
                self.dec.append(Block(channels, channels, config, decoder=True, resample=True))
            for _ in range(config.num_blocks + 1):
                block = Block(
                    channels,
                    width,
                    config,
                    decoder=True,
                    attention=resolution in config.attn_resolutions,
                    skip_channels=skips.pop(),
                )
                self.dec.append(block)
                channels = width
        self.out = Output(channels, config.img_channels)
        self.u_fourier = Fourier(config.logvar_channels)
        self.u_linear = Conv(config.logvar_channels, 1)

    def copy_weights(self, net: nn.Module) -> PlainDenoiser:
        """Take the weights of a `Denoiser` of the same config, in order of creation."""
        with torch.no_grad():
            for ours, theirs in zip(self.parameters(), net.parameters(), strict=True):
                ours.copy_(theirs)
            for ours, theirs in zip(self.buffers(), net.buffers(), strict=True):
                ours.copy_(theirs)
        return self.train(net.training)

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor, return_logvar: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        # Preconditioning, Eq. 4 to 8.
        s, sigma_data = sigma.reshape(-1, 1, 1, 1), self.config.sigma_data
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
        c_in = 1 / (s**2 + sigma_data**2).sqrt()
        c_noise = sigma.log() / 4

        emb = self.noise(self.fourier(c_noise))
        if self.label is not None:
            labels = self.label(class_labels * math.sqrt(self.config.label_dim))
            emb = mp_sum(emb, labels, self.config.label_balance)
        emb = mp_silu(emb)

        h = torch.cat([c_in * x, torch.ones_like(x[:, :1])], dim=1)
        h = self.stem(h)
        skips = [h]
        for block in self.enc:
            h = block(h, emb)
            skips.append(h)
        for block in self.dec:
            if block.skip_channels:
                h = mp_cat(h, skips.pop(), self.config.concat_balance)
            h = block(h, emb)
        denoised = c_skip * x + c_out * self.out(h)
        if return_logvar:
            return denoised, self.u_linear(self.u_fourier(c_noise)).reshape(-1, 1, 1, 1)
        return denoised
