"""The inner loops of a pass, in numpy and in PyTorch: equal to each other and to the definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from posthoc_ema import CorruptSnapshotError, SnapshotStore, reconstruct, streaming
from posthoc_ema.encoding import PageDigest
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
    found = np.empty(len(values), out)
    kernel.decode_into(values.view(np.uint8), stored, found)
    expected = values.astype(out)
    assert found.tobytes() == expected.tobytes(), "to the last bit, zeros with their sign"


@pytest.mark.parametrize("shift", [0, 1, 2, 4])
@pytest.mark.parametrize("stored", ["F16", "BF16", "F32", "F64"])
def test_bytes_need_not_be_aligned(kernel: Any, stored: str, shift: int) -> None:
    # Files of other hands may hold a tensor anywhere.
    dtype = {"F16": "<f2", "BF16": ml_dtypes.bfloat16, "F32": "<f4", "F64": "<f8"}[stored]
    values = np.random.default_rng(0).normal(size=1001).astype(dtype)
    raw = np.empty(values.nbytes + 8, np.uint8)[shift : shift + values.nbytes]
    raw[:] = values.view(np.uint8)
    out = np.empty(1001, np.float64 if stored == "F64" else np.float32)
    kernel.decode_into(raw, stored, out)
    assert np.array_equal(out, values.astype(out.dtype))


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


@pytest.mark.parametrize("pages", [1, 2, 63, 64, 65, 257, 600])
def test_page_numbers(kernel: Any, pages: int) -> None:
    rng = np.random.default_rng(pages)
    for data in (rng.integers(0, 256, pages * 4096, np.uint8), np.full(pages * 4096, 128, "u1")):
        words = data.view("<i4").reshape(pages, 1024).astype(np.int64)
        expected = (words * np.arange(1, 2048, 2)).sum(1)
        assert np.array_equal(kernel.page_numbers(data), expected)


def test_digests_agree(kernel: Any) -> None:
    data = np.random.default_rng(0).integers(0, 256, 1_234_567, np.uint8)
    plain, other = PageDigest(), PageDigest(kernel.page_numbers)
    for piece in np.array_split(data, 7):
        plain.update(piece)
        other.update(piece)
    assert plain.hexdigest() == other.hexdigest()


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
