"""Config U in plain numpy over float64: the values of its forward pass, factor by factor.

Shares no code with the package: it takes parameters and buffers in creation order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.reference_model.numpy_edm2 import Array, Shape, add, concatenate, fourier, silu
from tests.reference_model.numpy_edm2 import conv as conv_of
from tests.reference_model.numpy_edm2 import linear as linear_of


def by_fan_in(w: Array) -> Array:
    return w / np.sqrt(w[0].size)


def linear(x: Array, w: Array) -> Array:
    return linear_of(x, w, by_fan_in)


def conv(x: Array, w: Array) -> Array:
    return conv_of(x, w, by_fan_in)


def attend(x: Array, qkv: Array, proj: Array, channels_per_head: int) -> Array:
    batch, channels, height, width = x.shape
    heads = channels // channels_per_head
    y = conv(x, qkv).reshape(batch, heads, channels_per_head, 3, height * width)
    q, k, v = y[:, :, :, 0], y[:, :, :, 1], y[:, :, :, 2]
    logits = np.einsum("nhcq,nhck->nhqk", q, k) / np.sqrt(channels_per_head)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    y = np.einsum("nhqk,nhck->nhcq", p, v).reshape(x.shape)
    # Half of the variance is common to all pixels, the rest is a mean over n / e of them.
    y = y / np.sqrt(0.5 + 0.5 * np.e / (height * width))
    return add(x, conv(y, proj), 0.3)


def denoise(
    shape: Shape,
    parameters: Sequence[Array],
    buffers: Sequence[Array],
    x: Array,
    sigma: Array,
    class_labels: Array,
) -> tuple[Array, Array]:
    """Return D(x; sigma, class) `[B, C, H, W]` and u(sigma) `[B]`."""
    w = iter(parameters)
    freqs, phases, u_freqs, u_phases = buffers
    s = sigma[:, None, None, None]
    variance = s**2 + shape.sigma_data**2
    c_noise = np.log(sigma) / 4

    emb = linear(fourier(c_noise, freqs, phases), next(w))
    emb = add(emb, linear(class_labels * np.sqrt(class_labels.shape[1]), next(w)), 0.5)
    emb = silu(emb)

    def block(h: Array, out: int, *, decoder: bool, attention: bool) -> Array:
        conv0, emb_linear, conv1 = (next(w) for _ in range(3))
        skip = next(w) if h.shape[1] != out else None
        if not decoder and skip is not None:
            h = conv(h, skip)
        y = conv(silu(h), conv0)
        y = y * (1 + linear(emb, emb_linear))[:, :, None, None] / np.sqrt(2)
        y = conv(silu(y), conv1)
        if decoder and skip is not None:
            h = conv(h, skip)
        h = add(h, y, 0.3)
        return attend(h, next(w), next(w), shape.channels_per_head) if attention else h

    h = x / np.sqrt(variance)
    h = conv(np.concatenate([h, np.ones_like(h[:, :1])], axis=1), next(w))
    skips = [h]
    for level, out in enumerate(shape.channels):
        attends = shape.resolution >> level in shape.attn_resolutions
        if level:
            b, c, height, width = h.shape
            h = h.reshape(b, c, height // 2, 2, width // 2, 2).mean(axis=(3, 5))
            # A third is common to the four pixels: 1 / √(⅓ + ⅔ · ¼).
            h = block(h * np.sqrt(2), c, decoder=False, attention=False)
            skips.append(h)
        for _ in range(shape.num_blocks):
            h = block(h, out, decoder=False, attention=attends)
            skips.append(h)
    for level in reversed(range(len(shape.channels))):
        out, attends = shape.channels[level], shape.resolution >> level in shape.attn_resolutions
        if level == len(shape.channels) - 1:
            h = block(h, h.shape[1], decoder=True, attention=True)
            h = block(h, h.shape[1], decoder=True, attention=False)
        else:
            h = h.repeat(2, axis=2).repeat(2, axis=3)
            h = block(h, h.shape[1], decoder=True, attention=False)
        for _ in range(shape.num_blocks + 1):
            h = block(concatenate(h, skips.pop()), out, decoder=True, attention=attends)
    F = conv(h, next(w))

    sd = shape.sigma_data
    denoised = sd**2 / variance * x + s * sd / np.sqrt(variance) * F
    u = linear(fourier(c_noise, u_freqs, u_phases), next(w))[:, 0]
    left = len(list(w))
    if left or skips:
        raise AssertionError(f"{left} parameters and {len(skips)} skips left over")
    return denoised, u
