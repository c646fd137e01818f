"""Configs A to F once more, in plain numpy over float64, written from the paper's description.

Shares no code with the package: it takes named parameters and buffers, and every one must be
used. Six networks in one function, each difference an `if` on the config's letter, as the paper
tells them; the package has a table instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.reference_model.numpy_edm2 import Array, Shape, unit_rms


class Parameters:
    """Parameters and buffers by name, each noted when used."""

    def __init__(self, config: str, tensors: Mapping[str, Array]) -> None:
        self.config, self.tensors = config, dict(tensors)
        self.used: set[str] = set()

    def __call__(self, name: str) -> Array:
        self.used.add(name)
        return self.tensors[name]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def layer(self, x: Array, name: str) -> Array:
        """Linear layer or convolution; weight-normalised from D on, with a bias in A and B."""
        w = self(f"{name}.weight")
        if self.config >= "D":
            w = unit_rms(w, tuple(range(1, w.ndim))) / np.sqrt(w[0].size)
        if w.ndim == 2:
            y = np.einsum("bi,oi->bo", x, w)
        else:
            k, (height, width) = w.shape[-1], x.shape[2:]
            padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
            y = np.zeros((len(x), len(w), height, width))
            for i in range(k):
                for j in range(k):
                    patch = padded[:, :, i : i + height, j : j + width]
                    y += np.einsum("bihw,oi->bohw", patch, w[:, :, i, j])
        if self.config in "AB" and not name.endswith("embedding.label"):
            bias = self(f"{name}.bias")
            y = y + bias.reshape(1, -1, *[1] * (y.ndim - 2))
        return y

    def group_norm(self, x: Array, name: str) -> Array:
        """With mean, scale and shift in A and B; the mean square alone in C to E."""
        batch, channels = x.shape[:2]
        groups = min(32, channels // 4)
        y = x.reshape(batch, groups, -1)
        if self.config in "AB":
            y = y - y.mean(axis=2, keepdims=True)
            y = y / np.sqrt((y**2).mean(axis=2, keepdims=True) + 1e-5)
            y = y.reshape(x.shape) * self(f"{name}.weight")[:, None, None]
            return y + self(f"{name}.bias")[:, None, None]
        return (y / np.sqrt((y**2).mean(axis=2, keepdims=True) + 1e-4)).reshape(x.shape)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def halve(x: Array) -> Array:
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels, height // 2, 2, width // 2, 2).mean(axis=(3, 5))


def double(x: Array) -> Array:
    return x.repeat(2, axis=2).repeat(2, axis=3)


def fourier(a: Array, freqs: Array, phases: Array) -> Array:
    return np.cos(2 * np.pi * (np.outer(a, freqs) + phases))


def sinusoid(a: Array, features: int) -> Array:
    angle = np.outer(a, 10_000.0 ** -(np.arange(features // 2) / (features // 2)))
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def attend(p: Parameters, x: Array, name: str, channels_per_head: int) -> Array:
    batch, channels, height, width = x.shape
    heads = channels // channels_per_head
    y = p.group_norm(x, f"{name}.norm") if p.config in "AB" else x
    y = p.layer(y, f"{name}.qkv").reshape(batch, heads, channels // heads, 3, height * width)
    if p.config >= "C":
        y = unit_rms(y, (2,))
    q, k, v = y[:, :, :, 0], y[:, :, :, 1], y[:, :, :, 2]
    logits = np.einsum("nhcq,nhck->nhqk", q, k) / np.sqrt(channels // heads)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    y = np.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)
    return x + p.layer(y, f"{name}.proj")


def block(
    p: Parameters, h: Array, emb: Array, name: str, channels_per_head: int, clip: float
) -> Array:
    decoder, down, up = ".dec." in name, name.endswith("_down"), name.endswith("_up")
    skip, residual = f"{name}.skip", f"{name}.residual"
    if p.config == "F":
        if down:
            h = halve(h)
        if up:
            h = double(h)
        if not decoder:
            h = p.layer(h, skip) if p.has(f"{skip}.weight") else h
            h = unit_rms(h, (1,))
        y = p.layer(silu(h), f"{residual}.conv0")
        y = y * (1 + p.layer(emb, f"{residual}.emb_linear"))[:, :, None, None]
    else:
        y = silu(p.group_norm(h, f"{residual}.norm0"))
        if down:
            h, y = halve(h), halve(y)
        if up:
            h, y = double(h), double(y)
        y = p.group_norm(p.layer(y, f"{residual}.conv0"), f"{residual}.norm1")
        affine = p.layer(emb, f"{residual}.emb_linear")[:, :, None, None]
        if p.config in "AB":
            out = y.shape[1]
            y = y * (1 + affine[:, :out]) + affine[:, out:]
        else:
            y = y * (1 + affine)
    y = p.layer(silu(y), f"{residual}.conv1")
    if (decoder or p.config < "F") and p.has(f"{skip}.weight"):
        h = p.layer(h, skip)
    h = h + y
    if p.has(f"{name}.attention.qkv.weight"):
        h = attend(p, h, f"{name}.attention", channels_per_head)
    return np.clip(h, -clip, clip)


def denoise(
    config: str,
    shape: Shape,
    tensors: Mapping[str, Array],
    x: Array,
    sigma: Array,
    class_labels: Array,
) -> tuple[Array, Array]:
    """Return D(x; sigma, class) `[B, C, H, W]` and u(sigma) `[B]`."""
    p = Parameters(config, tensors)
    clip = 256.0 if config >= "D" else np.inf
    s = sigma[:, None, None, None]
    variance = s**2 + shape.sigma_data**2
    c_noise = np.log(sigma) / 4

    if config in "AB":
        features, labels = sinusoid(c_noise, shape.channels[0]), class_labels
    else:
        freqs, phases = p("unet.embedding.fourier.freqs"), p("unet.embedding.fourier.phases")
        features = fourier(c_noise, freqs, phases)
        labels = class_labels * np.sqrt(class_labels.shape[1])
    if config == "F":
        emb = p.layer(features, "unet.embedding.noise")
    else:
        emb = silu(p.layer(features, "unet.embedding.noise.0"))
        emb = p.layer(emb, "unet.embedding.noise.2")
    emb = silu(emb + p.layer(labels, "unet.embedding.label"))

    h = x / np.sqrt(variance)
    if config >= "C":
        h = np.concatenate([h, np.ones_like(h[:, :1])], axis=1)
    h = p.layer(h, f"unet.enc.{shape.resolution}x{shape.resolution}_conv")
    skips = [h]
    last = len(shape.channels) - 1
    for level in range(last + 1):
        size = f"{shape.resolution >> level}x{shape.resolution >> level}"
        names = [f"{size}_down"] * (level > 0) + [
            f"{size}_block{i}" for i in range(shape.num_blocks)
        ]
        for name in names:
            h = block(p, h, emb, f"unet.enc.{name}", shape.channels_per_head, clip)
            skips.append(h)
    for level in range(last, -1, -1):
        size = f"{shape.resolution >> level}x{shape.resolution >> level}"
        for name in [f"{size}_in0", f"{size}_in1"] if level == last else [f"{size}_up"]:
            h = block(p, h, emb, f"unet.dec.{name}", shape.channels_per_head, clip)
        for i in range(shape.num_blocks + 1):
            h = np.concatenate([h, skips.pop()], axis=1)
            h = block(p, h, emb, f"unet.dec.{size}_block{i}", shape.channels_per_head, clip)
    if config < "F":
        h = silu(p.group_norm(h, "unet.out.norm"))
    F = p.layer(h, "unet.out.conv")

    sd = shape.sigma_data
    denoised = sd**2 / variance * x + s * sd / np.sqrt(variance) * F
    u = np.zeros(len(x))
    if config > "A":
        freqs, phases = p("logvar.fourier.freqs"), p("logvar.fourier.phases")
        u = p.layer(fourier(c_noise, freqs, phases), "logvar.linear")[:, 0]
    left = set(tensors) - p.used
    if left or skips:
        raise AssertionError(f"{sorted(left)} and {len(skips)} skips left over")
    return denoised, u
