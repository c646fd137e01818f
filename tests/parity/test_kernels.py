"""The inner loops, in numpy and compiled: equal to each other and to the definition."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash

from posthoc_ema import EMA, native, reconstruct
from posthoc_ema.blocks import BITS
from posthoc_ema.digests import Digest
from posthoc_ema.encoding import decode_into, encode, measure, stored_size
from posthoc_ema.kernels import combine, combine_files, finish
from tests.parity.runs import record

COMPILED = native.library()
needs_compiled = pytest.mark.skipif(COMPILED is None, reason="installed without a compiler")
BLOCKS = [f"Q{bits}" for bits in BITS]


@pytest.fixture(params=["numpy", pytest.param("compiled", marks=needs_compiled)])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(
        native, "library", lambda: COMPILED if request.param == "compiled" else None
    )
    return str(request.param)


def in_both(monkeypatch: pytest.MonkeyPatch, action: Any) -> tuple[Any, Any]:
    """What an action returns with the loops of numpy, and compiled."""
    monkeypatch.setattr(native, "library", lambda: None)
    plain = action()
    monkeypatch.setattr(native, "library", lambda: COMPILED)
    return plain, action()


@pytest.mark.skipif(
    os.environ.get("POSTHOC_EMA_NATIVE") == "0" or shutil.which("cc") is None,
    reason="no C compiler here, or not wanted",
)
def test_compiled_here() -> None:
    """The figures of the benchmarks are those of the compiled loops: `make` must build them."""
    assert COMPILED is not None, "install once more: there is a C compiler now"


def test_left_out_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    monkeypatch.setenv("POSTHOC_EMA_NATIVE", "0")
    try:
        assert native.library() is None
    finally:
        native.library.cache_clear()


@pytest.mark.parametrize(
    ("stored", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)], ids=["F16", "BF16"]
)
@pytest.mark.parametrize("out", [np.float32, np.float64])
def test_every_finite_number_of_16_bits(loops: str, stored: str, dtype: Any, out: Any) -> None:
    values = np.arange(1 << 16).astype(np.uint16).view(dtype)
    values = values[np.isfinite(values.astype(np.float32))]
    found = np.empty(len(values), out)
    decode_into(values.view(np.uint8), stored, found)
    assert found.tobytes() == values.astype(out).tobytes(), "to the last bit, zeros with their sign"
    back, square = encode(found.astype(np.float32), stored)
    assert back.tobytes() == values.tobytes()
    assert square == 0


@needs_compiled
@pytest.mark.parametrize("dtype", ["F16", "BF16", *BLOCKS])
@pytest.mark.parametrize("count", [1, 7, 64, 1000, 5000])
def test_files_are_the_same(monkeypatch: pytest.MonkeyPatch, dtype: str, count: int) -> None:
    """Byte for byte, halfway cases, subnormals and zeros included."""
    rng = np.random.default_rng(count)
    values = rng.normal(size=count) * 10.0 ** rng.uniform(-9, 4, size=count)
    values[rng.random(count) < 0.1] = 0
    values = values.astype(np.float16 if count % 2 else np.float32).astype(np.float32)
    terms = [] if count == 64 else [(f, rng.normal(size=count)) for f in (1.5, -0.5)]

    def written() -> tuple[bytes, float, bytes]:
        decoded = np.empty(count)
        stored, square = encode(values, dtype, terms, decoded)
        return stored.tobytes(), square, decoded.tobytes()

    (plain, square, decoded), (compiled, square_2, decoded_2) = in_both(monkeypatch, written)
    assert compiled == plain
    assert decoded_2 == decoded
    assert square_2 == pytest.approx(square, rel=1e-5)  # sums in another order, of float32


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", *BLOCKS])
def test_rounding_is_told(loops: str, dtype: str) -> None:
    """The sum of squares is that of what a reader finds, the prediction included."""
    rng = np.random.default_rng(1)
    values, predicted = rng.normal(size=3001).astype(np.float32), rng.normal(size=3001)
    decoded = np.empty(3001)
    stored, square = encode(values, dtype, [(1.0, predicted)], decoded)
    assert stored.size == stored_size(dtype, 3001)
    expected = float(np.sum((decoded - values) ** 2))
    # What remains is a float32 before it is rounded: 2e-7² for each of 3001.
    assert square == pytest.approx(expected, rel=1e-3, abs=3e-10)


@pytest.mark.parametrize("targets", [1, 2, 7])
@pytest.mark.parametrize("count", [1, 511, 1024, 1025, 9_000])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", *BLOCKS])
@pytest.mark.parametrize("files", [1, 6, 8, 19])
def test_combinations(loops: str, dtype: str, count: int, targets: int, files: int) -> None:
    rng = np.random.default_rng(count)
    kind = np.float64 if dtype == "F64" else np.float32
    rows, decoded = [], np.empty((files, count), kind)
    for row in decoded:
        rows.append(encode(rng.normal(size=count).astype(kind), dtype)[0])
        decode_into(rows[-1], dtype, row)
    base = None if dtype in BLOCKS else rng.normal(size=count).astype(kind)
    coefficients = rng.normal(size=(targets, files)).astype(kind)
    before = rng.normal(size=(targets, count + 3))
    found = before.copy()
    combine(rows, dtype, base, coefficients, found[:, :count])  # rows apart in memory
    differences = decoded.astype(np.longdouble) - (0 if base is None else base)
    exact = before[:, :count] + coefficients.astype(np.longdouble) @ differences
    # Up to nineteen terms of a few, each product and sum rounded.
    assert np.abs(found[:, :count] - exact).max() <= 400 * np.finfo(kind).eps
    assert np.array_equal(found[:, count:], before[:, count:])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_sums_do_not_depend_on_what_stands_beside_them(loops: str, dtype: str) -> None:
    """Bit for bit, so that a reconstruction in parts is that in one piece."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 45)).astype(np.float32)
    coefficients = rng.normal(size=(2, 6)).astype(np.float32)
    base = rng.normal(size=45).astype(np.float32)

    def combined(left: int, right: int) -> Any:
        out = np.zeros((2, right - left))
        rows = [encode(np.ascontiguousarray(row[left:right]), dtype)[0] for row in values]
        combine(rows, dtype, base[left:right], coefficients, out)
        return out

    whole = combined(0, 45)
    for left, right in ((0, 7), (3, 44), (8, 21), (44, 45)):
        if loops == "compiled":
            assert np.array_equal(combined(left, right), whole[:, left:right])
        else:  # BLAS sums as it likes: a few roundings of single precision
            assert np.abs(combined(left, right) - whole[:, left:right]).max() < 5e-6


@needs_compiled
def test_hashes_are_those_of_xxhash() -> None:
    """Whole pieces, and rests of every kind: stripes of 64 bytes, blocks of 1024."""
    sizes = [241, 255, 256, 257, 1024, 1025, 1088, 1089, 5000, 65_535, 65_536, 65_777, 200_000]
    for size in sizes:
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        pieces = [data[k : k + Digest.PIECE] for k in range(0, size, Digest.PIECE)]
        found = np.empty(len(pieces), np.uint64)
        COMPILED.hash_pieces(native.address(data), size, native.address(found))
        assert found.tolist() == [xxhash.xxh3_64_intdigest(piece) for piece in pieces], size


@needs_compiled
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("files", [1, 8, 11])
def test_files_are_combined_like_rows(tmp_path: Path, dtype: str, files: int) -> None:
    """Bit for bit, and their hashes are those of a digest; a file that ends early is told."""
    count, before = 70_001, 100  # several pieces, and a rest
    rng = np.random.default_rng(files)
    rows = [encode(rng.normal(size=count).astype(np.float32), dtype)[0] for _ in range(files)]
    base = rng.normal(size=count).astype(np.float32)
    coefficients = rng.normal(size=(3, files)).astype(np.float32)
    expected = np.ones((3, count))
    combine(rows, dtype, base, coefficients, expected)

    with ExitStack() as stack:
        opened = []
        for k, row in enumerate(rows):
            path = tmp_path / str(k)
            path.write_bytes(b"x" * (before + k) + row.tobytes())
            opened.append(stack.enter_context(open(path, "r+b")))
        descriptors, offsets = [f.fileno() for f in opened], [before + k for k in range(files)]
        # Columns chosen from many lie in memory the other way round.
        arguments = (descriptors, offsets, dtype, base, np.asfortranarray(coefficients))
        found = np.ones((3, count))
        hashes = combine_files(*arguments, found, buffer=memory, hashed=True)
        assert hashes is not None
        assert found.tobytes() == expected.tobytes()
        for row, known in zip(rows, hashes, strict=True):
            digest, plain = Digest(len(row)), Digest(len(row))
            assert digest.takes_hashes(0, len(row))
            digest.add_hashes(0, known)
            plain.add(0, row)
            assert digest.hexdigest() == plain.hexdigest()
        again = np.ones((3, count))
        unhashed = combine_files(*arguments, again, buffer=memory, hashed=False)
        assert unhashed is not None
        assert unhashed.size == 0
        assert again.tobytes() == expected.tobytes()

        opened[-1].truncate(before + files - 1 + len(rows[-1]) - 1)
        assert combine_files(*arguments, found, buffer=memory, hashed=True) is None


def test_pieces_that_cannot_be_hashed_apart() -> None:
    digest = Digest(3 * Digest.PIECE + 240)
    assert digest.takes_hashes(Digest.PIECE, 2 * Digest.PIECE)
    assert not digest.takes_hashes(1, Digest.PIECE), "beginning within a piece"
    assert not digest.takes_hashes(0, Digest.PIECE + 5000), "ending within a piece"
    assert not digest.takes_hashes(0, 3 * Digest.PIECE + 240), "a rest of other rules"
    assert Digest(Digest.PIECE + 241).takes_hashes(Digest.PIECE, 241)


def memory(size: int) -> Any:
    return np.empty(size, np.uint8)


def test_magnitudes(loops: str) -> None:
    values = np.random.default_rng(0).normal(size=1003).astype(np.float32)
    values[1002] = -9
    square, largest = measure(values)
    assert largest == 9
    # numpy sums in float32.
    assert square == pytest.approx(float(np.sum(values.astype(np.float64) ** 2)), rel=1e-5)
    values[77] = np.nan
    assert np.isnan(measure(values)[0])
    assert measure(values[:0]) == (0, 0)


@needs_compiled
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_non_finite_numbers_are_found(dtype: Any, bad: float) -> None:
    name = {np.float32: "F32", np.float16: "F16"}.get(dtype, "BF16")
    largest = float(ml_dtypes.finfo(dtype).max)
    values = np.array([0, -0.0, largest, -largest, 1e-7] * 50, dtype)

    def is_finite() -> bool:
        return native.Tensors(name, [native.address(values)], [values.size], [0], [0]).is_finite()

    assert is_finite()
    values[123] = bad
    assert not is_finite()


@needs_compiled
def test_tracked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Averages of arrays of any size and type; float32 sums in another order."""
    types = [np.float32, np.float16, np.float64, np.complex64]
    shapes = [(), (5,), (3, 1100), (2, 2, 1024)]

    def averages() -> dict[str, Any]:
        rng = np.random.default_rng(0)
        ema = EMA((0.05, 0.25))
        for _ in range(5):
            arrays = {
                f"{k}-{j}": rng.normal(size=shape).astype(dtype)
                for k, dtype in enumerate(types)
                for j, shape in enumerate(shapes)
            }
            arrays["transposed"] = rng.normal(size=(30, 70)).astype(np.float32).T
            ema.update(arrays)
        return {f"{s} {n}": a for s in (0.05, 0.25) for n, a in ema.average(s).items()}

    plain, compiled = in_both(monkeypatch, averages)
    assert list(plain) == list(compiled)
    for name, values in plain.items():
        # Each of five steps rounds a number of about four.
        bound = 5 * 4 * np.finfo(values.dtype).eps
        assert np.abs(compiled[name] - values).max() <= bound, name


@needs_compiled
@pytest.mark.parametrize("encoding", ["float32", "float16", "bfloat16", "delta16", "delta6"])
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
    plain, compiled = in_both(
        monkeypatch, lambda: reconstruct(run.folder, [0.03, 0.07, 0.10], framework="numpy")
    )
    for a, b in zip(plain, compiled, strict=True):
        for name in a.params:
            eps = float(np.finfo(a.params[name].dtype).eps)
            bound = 20 * eps * 6 * a.diagnostics["l1_norm"]  # sums of 12 terms of up to 6
            assert np.abs(a.params[name] - b.params[name]).max() <= bound
    if encoding.startswith("delta"):
        return
    # A stored average is copied, whoever does it.
    for name, value in plain[2].params.items():
        assert value.tobytes() == compiled[2].params[name].tobytes()


@needs_compiled
def test_tensors_tracked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors in one call, those of other types gathered between them."""
    import torch

    types = [torch.float32, torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.float16]

    def averages() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        ema = EMA((0.05, 0.25))
        model = {f"w{k}": torch.empty(3, 100 + k).to(types[k % 5]) for k in range(15)}
        model["channels last"] = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
        model["large"] = torch.empty(70_000)
        for _ in range(5):
            for tensor in model.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            ema.update(model)
        return {f"{s} {n}": a.double() for s in (0.05, 0.25) for n, a in ema.average(s).items()}

    plain, compiled = in_both(monkeypatch, averages)
    assert list(plain) == list(compiled)
    for name, values in plain.items():
        # Each of five steps rounds a float32 of about four.
        assert (compiled[name] - values).abs().max() <= 5 * 4 * 2**-23, name


@pytest.mark.parametrize("count", [1, 7, 8, 1003])
def test_finishing_adds_and_finds_what_is_not_finite(loops: str, count: int) -> None:
    rng = np.random.default_rng(count)
    total, base = rng.normal(size=(2, count)), rng.normal(size=count).astype(np.float32)
    out = np.empty((2, count), np.float32)
    assert finish(total, base, out)
    assert np.array_equal(out, (total + base).astype(np.float32))
    for bad in (np.nan, np.inf, -np.inf, 1e39):  # the last one overflows float32
        broken = total.copy()
        broken[1, count // 2] = bad
        assert not finish(broken, base, out)
