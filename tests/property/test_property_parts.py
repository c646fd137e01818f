"""Finding the bytes of whole tensors in files that hold boxes of them."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
from helpers import assert_equal
from hypothesis import given
from hypothesis import strategies as st

from posthoc_ema.boxes import Box
from posthoc_ema.parts import Layout, Piece, covers
from posthoc_ema.tensorfile import TensorEntry


@st.composite
def cut_tensors(draw: Any) -> Any:
    """Tensors, each cut into a grid, and the files that its boxes went to, at random places."""
    files = [bytearray(draw(st.binary(max_size=3))) for _ in range(3)]
    entries, pieces, content, offset = [], {}, b"", draw(st.integers(0, 9))
    for number in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        dtype = draw(st.sampled_from(["F32", "F16"]))
        count = int(np.prod(shape))
        kind = np.float32 if dtype == "F32" else np.float16
        values = np.arange(count, dtype=kind).reshape(shape) + 100 * number
        name = f"tensor{number}"
        entry = TensorEntry(name, dtype, shape, offset + len(content))
        edges = [
            sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape
        ]
        ranges = [list(pairwise(cuts)) or [(0, 0)] for cuts in edges]
        pieces[name] = []
        for corner in product(*ranges):
            box = Box(tuple(a for a, _ in corner), tuple(b - a for a, b in corner))
            file = draw(st.integers(0, 2))
            pieces[name].append(Piece(box, file, len(files[file])))
            files[file] += values[box.slices].tobytes()
        assert covers([piece.box for piece in pieces[name]], shape)
        if len(pieces[name]) > 1 and count:
            assert not covers([piece.box for piece in pieces[name][1:]], shape)
        entries.append(entry)
        content += values.tobytes()
    return entries, pieces, files, content, offset


@given(cut_tensors(), st.data())
def test_any_range_of_bytes_is_found(cut: Any, data: Any) -> None:
    entries, pieces, files, content, offset = cut
    start = data.draw(st.integers(0, len(content)))
    size = data.draw(st.integers(0, len(content) - start))
    runs = list(Layout(entries, pieces).locate(offset + start, size))
    found = b"".join(bytes(files[k][place : place + n]) for k, place, n in runs)
    assert_equal(found, content[start : start + size])


def test_gaps_and_overlaps_are_noticed() -> None:
    def rows(*ranges: tuple[int, int]) -> list[Box]:
        return [Box((a, 0), (b - a, 3)) for a, b in ranges]

    assert covers(rows((0, 2), (2, 4)), (4, 3))
    assert not covers(rows((0, 2), (2, 4), (0, 2)), (4, 3))
    assert not covers(rows((0, 2), (3, 4)), (4, 3))
    assert not covers(rows((0, 2), (1, 4)), (4, 3))
    assert not covers(rows((0, 2), (2, 3)), (4, 3))
    assert not covers([], (4, 3))
    assert covers([], (0, 3))
    assert not covers([Box((0, 0), (2, 2)), Box((2, 2), (2, 2))], (4, 4))
