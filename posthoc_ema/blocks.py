"""Numbers in few bits: blocks of 64 with a scale of their own.

A block is a bfloat16 scale and 64 signed integers of ``bits`` bits, which times the scale are
the numbers. The integers are cut into planes, from the highest bits down: bytes, then nibbles,
then pairs of bits, each plane packed. ``docs/snapshot_format.md`` has the layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 64
"""Numbers in a block; the last block of a tensor is filled up with zeros."""

BITS = (4, 6, 8, 10, 12, 16)
"""Widths that there are."""

_SCALE_BYTES = 2
_TOO_SMALL = 2.0**-110  # of a block's largest number: the reciprocal of its scale would overflow


def block_bytes(bits: int) -> int:
    """Bytes of one block."""
    return _SCALE_BYTES + BLOCK * bits // 8


def encode_blocks(values: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], float]:
    """Round finite numbers to the nearest of their block.

    Args:
        values: ``[n]``.
        bits: One of :data:`BITS`.

    Returns:
        ``[ceil(n / 64), block_bytes(bits)]`` bytes, and the sum of squared rounding errors.
    """
    number = -(-len(values) // BLOCK)
    if len(values) % BLOCK:
        values = np.concatenate([values, np.zeros(number * BLOCK - len(values), np.float32)])
    blocks = values.reshape(number, BLOCK)
    largest = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
    top = (1 << bits - 1) - 1
    scale_bits = _bfloat16_above(largest / np.float32(top) * (largest > _TOO_SMALL))
    scale = (scale_bits.astype(np.uint32) << 16).view(np.float32)
    inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0).astype(np.float32)
    scaled = blocks * inverse[:, None]
    codes = np.rint(scaled)
    scaled -= codes
    scaled *= scale[:, None]
    error = scaled if scale.all() else blocks - codes * scale[:, None]
    flat = error.reshape(-1)
    square = float(np.einsum("i,i->", flat, flat, dtype=np.float64))

    out = np.empty((number, block_bytes(bits)), np.uint8)
    out[:, :_SCALE_BYTES] = scale_bits.astype("<u2")[:, None].view(np.uint8)
    place, left = _SCALE_BYTES, bits
    integers = codes.astype(np.int16)
    for width in _planes(bits):
        left -= width
        plane = integers >> left if left else integers
        if width == 8:
            packed = plane.astype(np.uint8)
        elif width == 4:
            nibbles = plane & 15
            packed = (nibbles[:, :32] | nibbles[:, 32:] << 4).astype(np.uint8)
        else:
            pairs = (plane & 3).reshape(number, 4, 16)
            packed = (pairs[:, 0] | pairs[:, 1] << 2 | pairs[:, 2] << 4 | pairs[:, 3] << 6).astype(
                np.uint8
            )
        out[:, place : place + BLOCK * width // 8] = packed
        place += BLOCK * width // 8
    return out, square


def decode_blocks(stored: NDArray[np.uint8], bits: int, out: NDArray[np.float32]) -> None:
    """Blocks to numbers.

    Args:
        stored: ``[..., m * block_bytes(bits)]``.
        bits: Their width.
        out: ``[..., m * 64]``, contiguous, overwritten.
    """
    size = block_bytes(bits)
    blocks = stored.reshape(*stored.shape[:-1], -1, size)
    numbers = out.reshape(*blocks.shape[:-1], BLOCK)
    place = _SCALE_BYTES
    for k, width in enumerate(_planes(bits)):
        plane = blocks[..., place : place + BLOCK * width // 8]
        place += BLOCK * width // 8
        if k:
            numbers *= np.float32(1 << width)
        share = BLOCK * width // 8
        for j in range(8 // width):
            part = plane if width == 8 else plane >> width * j & (1 << width) - 1
            target = numbers[..., j * share : (j + 1) * share]
            if k:
                target += part
            else:  # two's complement of so many bits
                np.copyto(target, (part << 8 - width).view(np.int8) >> 8 - width)
    numbers *= _scales(blocks)[..., None]


def scales_are_finite(stored: NDArray[np.uint8], bits: int) -> bool:
    """Whether ``[m * block_bytes(bits)]`` bytes are of finite numbers: damage may have hit them."""
    return bool(np.isfinite(_scales(stored.reshape(-1, block_bytes(bits)))).all())


def _scales(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    high = np.ascontiguousarray(blocks[..., :_SCALE_BYTES]).view("<u2")[..., 0]
    return (high.astype(np.uint32) << 16).view(np.float32)


def _planes(bits: int) -> list[int]:
    """Widths of the planes, from the highest bits down."""
    return [8] * (bits // 8) + [4] * (bits % 8 // 4) + [2] * (bits % 4 // 2)


def _bfloat16_above(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The next bfloat16 that is not smaller, as its bits: no code shall exceed the largest."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0xFFFF) >> 16).astype(np.uint16)
