"""Config G, whole or with ingredients left out, in plain numpy loops over float64.

Written from the paper's equations. Shares no code with the package: it takes a list of
parameters in creation order, and so checks that order too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Shape:
    """What the equations need to know beside the parameters."""

    resolution: int
    channels: Sequence[int]
    num_blocks: int
    attn_resolutions: Sequence[int]
    channels_per_head: int
    sigma_data: float = 0.5
    without: frozenset[str] = frozenset()


def unit_rms(x: Array, axes: tuple[int, ...]) -> Array:
    return x / (np.sqrt(np.mean(x**2, axis=axes, keepdims=True)) + 1e-4)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x)) / 0.596


def add(a: Array, b: Array, t: float) -> Array:
    return ((1 - t) * a + t * b) / np.sqrt((1 - t) ** 2 + t**2)


def concatenate(a: Array, b: Array, t: float = 0.5) -> Array:
    na, nb = a.shape[1], b.shape[1]
    c = np.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return np.concatenate([c * (1 - t) / np.sqrt(na) * a, c * t / np.sqrt(nb) * b], axis=1)


def weight(w: Array) -> Array:
    axes = tuple(range(1, w.ndim))
    return unit_rms(w, axes) / np.sqrt(w[0].size)


def linear(x: Array, w: Array, weight: Callable[[Array], Array] = weight) -> Array:
    return np.einsum("bi,oi->bo", x, weight(w))


def conv(x: Array, w: Array, weight: Callable[[Array], Array] = weight) -> Array:
    w, k = weight(w), w.shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    height, width = x.shape[2:]
    y = np.zeros((x.shape[0], w.shape[0], height, width))
    for i in range(k):
        for j in range(k):
            patch = padded[:, :, i : i + height, j : j + width]
            y += np.einsum("bihw,oi->bohw", patch, w[:, :, i, j])
    return y


def attend(
    x: Array,
    qkv: Array,
    proj: Array,
    channels_per_head: int,
    conv: Callable[[Array, Array], Array],
    add: Callable[[Array, Array, float], Array],
) -> Array:
    batch, channels, height, width = x.shape
    heads = channels // channels_per_head
    y = conv(x, qkv).reshape(batch, heads, channels // heads, 3, height * width)
    y = unit_rms(y, (2,))
    q, k, v = y[:, :, :, 0], y[:, :, :, 1], y[:, :, :, 2]
    logits = np.einsum("nhcq,nhck->nhqk", q, k) / np.sqrt(channels // heads)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    y = np.einsum("nhqk,nhck->nhcq", p, v).reshape(x.shape)
    return add(x, conv(y, proj), 0.3)


def fourier(a: Array, freqs: Array, phases: Array) -> Array:
    return np.sqrt(2) * np.cos(2 * np.pi * (np.outer(a, freqs) + phases))


def denoise(
    shape: Shape,
    parameters: Sequence[Array],
    buffers: Sequence[Array],
    x: Array,
    sigma: Array,
    class_labels: Array | None,
    *,
    unconditional: bool = False,
) -> tuple[Array, Array]:
    """Return D(x; sigma, class) `[B, C, H, W]` and u(sigma) `[B]`.

    `parameters` and `buffers` in creation order; every one must be used, in that order.
    """
    w: Iterator[Array] = iter(parameters)
    lacks = shape.without.__contains__

    def scaled(w: Array) -> Array:
        return w / np.sqrt(w[0].size) if lacks("weight_norm") else weight(w)

    def linear_(x: Array, w: Array) -> Array:
        return linear(x, w, scaled)

    def conv_(x: Array, w: Array) -> Array:
        return conv(x, w, scaled)

    def silu_(x: Array) -> Array:
        return silu(x) * 0.596 if lacks("mp_silu") else silu(x)

    def add_(a: Array, b: Array, t: float) -> Array:
        return a + b if lacks("mp_sum") else add(a, b, t)

    def join(a: Array, b: Array) -> Array:
        return np.concatenate([a, b], axis=1) if lacks("mp_cat") else concatenate(a, b)

    amplitude = 1 / np.sqrt(2) if lacks("mp_fourier") else 1
    one = np.ones([])

    freqs, phases = buffers[:2]
    s = sigma[:, None, None, None]
    variance = s**2 + shape.sigma_data**2
    c_noise = np.log(sigma) / 4

    emb = linear_(amplitude * fourier(c_noise, freqs, phases), next(w))
    if not unconditional:
        label_weight = next(w)
        label_dim = label_weight.shape[1]
        labels = np.zeros((len(x), label_dim)) if class_labels is None else class_labels
        label_scale = 1 if lacks("class_scale") else np.sqrt(label_dim)
        emb = add_(emb, linear_(labels * label_scale, label_weight), 0.5)
    emb = silu_(emb)

    def block(h: Array, out: int, *, decoder: bool, attention: bool) -> Array:
        gain = one if lacks("emb_gain") else next(w)
        conv0, emb_linear, conv1 = (next(w) for _ in range(3))
        skip = next(w) if h.shape[1] != out else None
        if not decoder:
            h = conv_(h, skip) if skip is not None else h
            h = h if lacks("pixel_norm") else unit_rms(h, (1,))
        y = conv_(silu_(h), conv0) * (1 + gain * linear_(emb, emb_linear))[:, :, None, None]
        y = conv_(silu_(y), conv1)
        if decoder and skip is not None:
            h = conv_(h, skip)
        h = add_(h, y, 0.3)
        if attention:
            h = attend(h, next(w), next(w), shape.channels_per_head, conv_, add_)
        return np.clip(h, -256, 256)

    # Encoder: input convolution with a channel of ones, then levels from fine to coarse.
    h = x / np.sqrt(variance)
    if not lacks("ones_channel"):
        h = np.concatenate([h, np.ones_like(h[:, :1])], axis=1)
    h = conv_(h, next(w))
    skips = [h]
    for level, out in enumerate(shape.channels):
        resolution = shape.resolution >> level
        if level:
            b, c, height, width = h.shape
            h = h.reshape(b, c, height // 2, 2, width // 2, 2).mean(axis=(3, 5))
            h = block(h, c, decoder=False, attention=False)
            skips.append(h)
        for _ in range(shape.num_blocks):
            h = block(h, out, decoder=False, attention=resolution in shape.attn_resolutions)
            skips.append(h)

    # Decoder: back from coarse to fine, taking the skips last in, first out.
    for level in reversed(range(len(shape.channels))):
        out, resolution = shape.channels[level], shape.resolution >> level
        if level == len(shape.channels) - 1:
            h = block(h, h.shape[1], decoder=True, attention=True)
            h = block(h, h.shape[1], decoder=True, attention=False)
        else:
            h = h.repeat(2, axis=2).repeat(2, axis=3)
            h = block(h, h.shape[1], decoder=True, attention=False)
        for _ in range(shape.num_blocks + 1):
            h = join(h, skips.pop())
            h = block(h, out, decoder=True, attention=resolution in shape.attn_resolutions)
    F = conv_(h, next(w)) * (one if lacks("output_gain") else next(w))

    sd = shape.sigma_data
    denoised = sd**2 / variance * x + s * sd / np.sqrt(variance) * F
    u = np.zeros(len(x))
    if not lacks("uncertainty"):
        u_freqs, u_phases = buffers[2:]
        u = linear_(amplitude * fourier(c_noise, u_freqs, u_phases), next(w))[:, 0]
    left = len(list(w))
    if left or skips:
        raise AssertionError(f"{left} parameters and {len(skips)} skips left over")
    return denoised, u
