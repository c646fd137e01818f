"""The inner loops of a pass, in numpy and in PyTorch: equal to each other and to the definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from posthoc_ema import CorruptSnapshotError, SnapshotStore, reconstruct, streaming
from posthoc_ema.kernels import NumpyKernel, TorchKernel, fastest_kernel
from tests.parity.runs import record

KERNELS: dict[str, Any] = {"numpy": NumpyKernel, "torch": lambda: TorchKernel(torch)}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Any:
    return KERNELS[request.param]()


def test_torch_serves_where_it_is_loaded() -> None:
    assert isinstance(fastest_kernel(), TorchKernel)


@pytest.mark.parametrize("out", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)], ids=["F16", "BF16"]
)
def test_every_finite_number_of_16_bits(kernel: Any, stored: str, dtype: Any, out: Any) -> None:
    values = np.arange(1 << 16).astype(np.uint16).view(dtype)
    values = values[np.isfinite(values.astype(np.float32))]
    found = np.empty((2, len(values)), out)
    rows = np.stack([values, values[::-1]]).view(np.uint8)
    kernel.differences(rows, stored, np.zeros(len(values), out), found)
    expected = values.astype(out)
    assert found[0].tobytes() == expected.tobytes(), "to the last bit, zeros with their sign"
    assert found[1].tobytes() == expected[::-1].tobytes()


@pytest.mark.parametrize("out", [np.float32, np.float64])
@pytest.mark.parametrize("stored", ["F16", "BF16", "F32", "F64"])
def test_differences(kernel: Any, stored: str, out: Any) -> None:
    dtype = {"F16": "<f2", "BF16": ml_dtypes.bfloat16, "F32": "<f4", "F64": "<f8"}[stored]
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 1001)).astype(dtype)
    base = rng.normal(size=501).astype(out)
    item = values.itemsize
    part = values.view(np.uint8)[:, 100 * item : 601 * item]  # rows that are not contiguous
    found = np.empty((3, 501), out)
    kernel.differences(part, stored, base, found)
    assert np.array_equal(found, values[:, 100:601].astype(out) - base)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("targets", [1, 2, 7])
@pytest.mark.parametrize("count", [1, 511, 512, 513, 20_000])
def test_products_are_added(kernel: Any, count: int, targets: int, dtype: Any) -> None:
    rng = np.random.default_rng(count)
    rows = rng.normal(size=(6, count)).astype(dtype)
    coefficients = rng.normal(size=(targets, 6)).astype(dtype)
    before = rng.normal(size=(targets, count)).astype(dtype)
    found = before.copy()
    kernel.accumulate(found, coefficients, rows)
    exact = before.astype(np.longdouble) + coefficients.astype(np.longdouble) @ rows
    # Seven terms of about one, each product and sum rounded.
    assert np.abs(found - exact).max() <= 40 * np.finfo(dtype).eps


@pytest.mark.parametrize("encoding", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("double", [False, True])
def test_whole_reconstructions_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, double: bool
) -> None:
    dtype = np.float64 if double else np.float32
    run = record(
        tmp_path / "ema",
        steps=24,
        every=4,
        encoding=encoding,
        shapes={"a": (300, 101), "b": (5,), "c": (77, 600)},
        convert=lambda ws: {n: w.astype(dtype) for n, w in ws.items()},
    )
    results = {}
    for name, make in KERNELS.items():
        monkeypatch.setattr(streaming, "fastest_kernel", make)
        results[name] = reconstruct(run.folder, [0.03, 0.07, 0.10], framework="numpy")
    for a, b in zip(*results.values(), strict=True):
        for name in a.params:
            eps = float(np.finfo(a.params[name].dtype).eps)
            bound = 20 * eps * 6 * a.diagnostics["l1_norm"]  # sums of 12 terms of up to 6
            assert np.abs(a.params[name] - b.params[name]).max() <= bound
    # A stored average is copied, whoever does it.
    for name, value in results["numpy"][2].params.items():
        assert value.tobytes() == results["torch"][2].params[name].tobytes()


@pytest.mark.parametrize("damaged", [False, True])
def test_the_number_of_threads_is_left_as_it_was(tmp_path: Path, damaged: bool) -> None:
    import threading

    run = record(tmp_path / "ema", steps=24, every=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        if damaged:
            snapshot = SnapshotStore(run.folder).list()[-1]
            data = bytearray(snapshot.path.read_bytes())
            data[-3] ^= 1
            snapshot.path.write_bytes(data)
            with pytest.raises(CorruptSnapshotError):
                reconstruct(run.folder, 0.07)
        else:
            reconstruct(run.folder, 0.07)
        assert torch.get_num_threads() == 3
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [3], "threads begun later too"
    finally:
        torch.set_num_threads(before)
