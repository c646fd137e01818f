"""Memory for results: an array like any other."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import run_python

from posthoc_ema.memory import fresh

SHAPES = [(), (0,), (7,), (1 << 20,), (3, 1 << 20), (2, 0, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_arrays_can_be_filled_and_kept(shape: tuple[int, ...], dtype: type) -> None:
    arrays = [fresh(shape, dtype) for _ in range(3)]
    for k, array in enumerate(arrays):
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.writeable
        array[...] = k
    views = [array.reshape(-1)[1:] for array in arrays]
    del arrays, array
    for k, view in enumerate(views):  # which keep the memory
        assert (view == k).all()


def test_a_forked_process_has_its_own() -> None:
    """As with all memory: what a worker of a DataLoader does stays with it."""
    printed = run_python(
        "-c",
        "import os, numpy as np; from posthoc_ema.memory import fresh\n"
        "values = fresh((1 << 21,), np.float32); values[:] = 1\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    values[:] = 2; os._exit(0)\n"
        "os.waitpid(child, 0); print(values.min(), values.max())",
    )
    assert printed.split() == ["1.0", "1.0"]
