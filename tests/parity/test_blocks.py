"""Blocks of few bits: against their definition, and how far rounding may take a number."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posthoc_ema.blocks import BITS, BLOCK, block_bytes, decode_blocks, encode_blocks


def by_definition(block: bytes, bits: int) -> list[Fraction]:
    """One block as docs/snapshot_format.md describes it, in exact arithmetic."""
    scale = np.frombuffer(bytes(2) + block[:2], "<f4")[0]
    rest, place, left = [0] * BLOCK, 2, bits
    while left:
        width = max(w for w in (2, 4, 8) if w <= left)
        left -= width
        share = BLOCK * width // 8
        for i in range(BLOCK):
            byte = block[place + i % share]
            rest[i] = rest[i] << width | byte >> width * (i // share) & (1 << width) - 1
        place += share
    signed = [r - (1 << bits) if r >> bits - 1 else r for r in rest]
    return [Fraction(float(scale)) * r for r in signed]


@pytest.mark.parametrize("bits", BITS)
def test_blocks_are_what_the_format_says(bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = rng.standard_normal(3 * BLOCK + 7).astype(np.float32)
    stored, square = encode_blocks(values, bits)
    assert stored.shape == (4, block_bytes(bits))
    decoded = np.empty(4 * BLOCK, np.float32)
    decode_blocks(stored.reshape(-1), bits, decoded)
    exact = [x for block in stored for x in by_definition(block.tobytes(), bits)]
    assert [Fraction(float(x)) for x in decoded] == exact  # up to 16 bits times 8: no rounding
    assert not decoded[3 * BLOCK + 7 :].any()
    measured = float(((decoded[: len(values)].astype(np.float64) - values) ** 2).sum())
    assert square == pytest.approx(measured, rel=1e-3)  # of differences in float32


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
def test_no_number_is_off_by_more_than_half_a_step(bits: int, data: Any) -> None:
    exponents = st.integers(-100, 100)
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    scales = [2.0 ** data.draw(exponents) for _ in range(3)]
    values = np.concatenate([rng.standard_normal(BLOCK) * s for s in scales]).astype(np.float32)
    stored, _ = encode_blocks(values, bits)
    decoded = np.empty(len(values), np.float32)
    decode_blocks(stored.reshape(-1), bits, decoded)
    largest = np.abs(values).reshape(-1, BLOCK).max(1)
    # The scale is rounded up to 8 significant bits.
    step = largest / ((1 << bits - 1) - 1) * (1 + 2**-7)
    error = np.abs(decoded.astype(np.float64) - values).reshape(-1, BLOCK)
    assert (error <= step[:, None] * (0.5 + 1e-3)).all()  # the product is rounded once more


@pytest.mark.parametrize("bits", BITS)
def test_zeros_and_tiny_numbers(bits: int) -> None:
    values = np.zeros(2 * BLOCK, np.float32)
    values[BLOCK:] = 1e-44
    stored, square = encode_blocks(values, bits)
    decoded = np.ones(2 * BLOCK, np.float32)
    decode_blocks(stored.reshape(-1), bits, decoded)
    assert not decoded.any()
    assert square < 1e-80
