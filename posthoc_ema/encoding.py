"""Numbers to bytes and back: storage precisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema import native
from posthoc_ema.blocks import (
    BITS,
    BLOCK,
    block_bytes,
    decode_blocks,
    encode_blocks,
    scales_are_finite,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

Terms = Sequence[tuple[float, "NDArray[np.float64]"]]
"""A sum of rows of numbers, each with a factor."""

ITEM_SIZE: dict[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Bytes of one element, by the safetensors name of its type."""

NUMPY_DTYPE: dict[str, str] = {
    "F64": "<f8", "I64": "<i8", "U64": "<u8", "C64": "<c8",
    "F32": "<f4", "I32": "<i4", "U32": "<u4",
    "F16": "<f2", "I16": "<i2", "U16": "<u2",
    "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
"""Types that numpy has itself; the others need ml_dtypes."""

_ML_DTYPES: dict[str, str] = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}

_BLOCK_TYPES = {f"Q{bits}": bits for bits in BITS}


@dataclass(frozen=True)
class Encoding:
    """How snapshots are stored.

    Attributes:
        whole: Type in which averages themselves are stored; None for the precision in which
            they are kept (float32, and float64 for float64 weights).
        residuals: Types for what remains of an average after its prediction from earlier
            snapshots: of the first track of a time, and of the others. None: always whole.
        refines: Whether the newest snapshot of each track is accompanied by what its rounding
            took, as nothing later tells of it.
    """

    whole: str | None
    residuals: tuple[str, str] | None = None
    refines: bool = False


ENCODINGS: dict[str, Encoding] = {
    "float32": Encoding(None),
    "float16": Encoding("F16"),
    "bfloat16": Encoding("BF16"),
    "delta16": Encoding(None, ("Q16", "Q12")),
    "delta8": Encoding("Q8", ("Q8", "Q6"), refines=True),
    "delta6": Encoding("Q8", ("Q6", "Q4"), refines=True),
    "delta4": Encoding("Q8", ("Q4", "Q4"), refines=True),
}
"""Encodings of snapshots, by name."""

_LARGEST = {"F16": 65504.0, "BF16": 3.3895e38}  # above, rounding gives infinity
_LARGEST |= dict.fromkeys(_BLOCK_TYPES, 1e38)
_UNFILLED = "F16"  # for tensors that fill no block
# What a refinement leaves, relative to the RMS of a tensor: less than rounding to float16 does.
_REFINED = 1.8e-4
# Below this RMS the fixed spacing of float16's subnormal numbers, 2⁻²⁴, adds more error than
# its 11 significant bits do.
_FLOAT16_SMALL_RMS = 2.0**-13


def check_encoding(encoding: str) -> str:
    """The name itself, if there is such an encoding.

    Raises:
        ValueError: If there is not.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)} (got {encoding!r})")
    return encoding


def stored_size(dtype: str, count: int) -> int:
    """Bytes of so many elements; block types fill up the last block."""
    if dtype in _BLOCK_TYPES:
        return -(-count // BLOCK) * block_bytes(_BLOCK_TYPES[dtype])
    return count * ITEM_SIZE[dtype]


def block_bits(dtype: str) -> int | None:
    """Width of the numbers of a block type; None for the others."""
    return _BLOCK_TYPES.get(dtype)


def alignment(dtype: str) -> int:
    """Bytes of one element in memory; those of block types are read as bytes."""
    return ITEM_SIZE.get(dtype, 1)


def stored_dtype(encoding: str, kept: str, count: int, max_abs: float, rms: float) -> str:
    """Type in which one tensor is stored whole.

    Args:
        encoding: One of :data:`ENCODINGS`.
        kept: ``"F32"`` or ``"F64"``, the type of the average in memory.
        count: Number of elements.
        max_abs: Largest magnitude in the tensor.
        rms: Root mean square of the tensor.

    Returns:
        The encoding's own type; float16 where a tensor fills no block; ``kept`` where that would
        overflow, or where float16 would lose precision to its subnormal numbers.
    """
    wanted = ENCODINGS[encoding].whole
    if wanted in _BLOCK_TYPES and count < BLOCK:
        wanted = _UNFILLED
    if wanted is None or max_abs > _LARGEST[wanted]:
        return kept
    return kept if wanted == "F16" and 0 < rms < _FLOAT16_SMALL_RMS else wanted


def refining_dtype(error: float, rms: float) -> str:
    """Type for what rounding took, as coarse as will do.

    Args:
        error: RMS of what it took.
        rms: Root mean square of the tensor.
    """
    for bits in (4, 6):
        # Rounding errors fill their range evenly, and are cut into so many parts.
        if error <= _REFINED * rms * ((1 << bits) - 2):
            return f"Q{bits}"
    return "Q8"


def encode(
    values: NDArray[Any],
    dtype: str,
    prediction: Terms = (),
    decoded: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.uint8], float]:
    """Round finite values, or what remains of them after a prediction, to the stored type.

    Args:
        values: ``[n]`` float32 or float64, contiguous.
        dtype: Stored type: F64, F32, F16, BF16, or a block type.
        prediction: What is subtracted first, as (factor, ``[n]`` float64) to be summed.
        decoded: ``[n]``, overwritten: what a reader will find, the prediction added.

    Returns:
        The bytes that the file holds, and the sum of squared rounding errors.
    """
    library = native.library()
    if library is None or values.dtype != np.float32 or dtype not in native.TYPES or dtype == "F32":
        return _encode(values, dtype, prediction, decoded)  # float32 as it is needs no loop
    stored = np.empty(stored_size(dtype, len(values)), np.uint8)
    factors = np.array([factor for factor, _ in prediction])
    rows = native.addresses([row for _, row in prediction])
    square = library.encode(
        native.TYPES[dtype],
        native.address(values),
        len(rows),
        native.address(rows),
        native.address(factors),
        len(values),
        native.address(stored),
        None if decoded is None else native.address(decoded),
    )
    return stored, square


def _encode(
    values: NDArray[Any],
    dtype: str,
    prediction: Terms,
    decoded: NDArray[np.float64] | None,
) -> tuple[NDArray[np.uint8], float]:
    """The same in numpy."""
    predicted = summed(prediction, len(values))
    rest = (values - predicted).astype(values.dtype) if prediction else values
    if dtype in _BLOCK_TYPES:
        blocks, square = encode_blocks(rest.astype(np.float32, copy=False), _BLOCK_TYPES[dtype])
        stored = blocks.reshape(-1)
    else:
        stored, square = _round(rest, dtype).view(np.uint8), 0.0
        if dtype != ("F64" if rest.dtype == np.float64 else "F32"):
            found = np.empty_like(rest)
            decode_into(stored, dtype, found)
            square = sum_of_squares(found - rest)
    if decoded is not None:
        decode_into(stored, dtype, decoded)
        if prediction:
            decoded += predicted
    return stored, square


def summed(terms: Terms, count: int) -> NDArray[np.float64]:
    """Σ factor × row, ``[count]``."""
    out = np.zeros(count)
    for factor, row in terms:
        out += factor * row
    return out


def _round(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """To nearest even; bfloat16 as uint16."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values, dtype=NUMPY_DTYPE[dtype])


def decode_into(raw: NDArray[np.uint8], dtype: str, out: NDArray[Any]) -> None:
    """Convert stored bytes to floats.

    Args:
        raw: ``[n * itemsize]`` bytes as read from the file.
        dtype: Stored type: F64, F32, F16, BF16, or a block type.
        out: ``[n]`` float32 or float64, contiguous, overwritten.
    """
    library = native.library()
    if library is not None and out.dtype == np.float32 and dtype in native.TYPES:
        source, target = native.address(raw), native.address(out)
        library.decode(native.TYPES[dtype], source, len(out), target)
        return
    if dtype in _BLOCK_TYPES:
        count = len(out)
        filled = -(-count // BLOCK) * BLOCK
        direct = out.dtype == np.float32 and filled == count
        numbers = out if direct else np.empty(filled, np.float32)
        decode_blocks(raw, _BLOCK_TYPES[dtype], numbers)
        if not direct:
            np.copyto(out, numbers[:count])
        return
    if out.dtype != np.float32 or dtype in ("F32", "F64"):
        if dtype == "BF16":
            single = np.empty(out.shape, np.float32)
            decode_into(raw, dtype, single)
            np.copyto(out, single)
        else:
            np.copyto(out, raw.view(NUMPY_DTYPE[dtype]), casting="same_kind")
        return
    bits = out.view(np.int32)
    np.copyto(bits, raw.view(np.int16))
    if dtype == "BF16":
        np.left_shift(bits, 16, out=bits)
        return
    # float16 to float32 in integer arithmetic, 2.4 times as fast as numpy's own conversion:
    # exponent and mantissa moved into place (the sign was extended), the bias of the exponent
    # corrected by a multiplication, which also normalises subnormals. Infinity and NaN do not
    # occur: they are never written.
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)
    np.multiply(out, np.float32(2.0**112), out=out)


def measure(values: NDArray[Any]) -> tuple[float, float]:
    """Sum of squares and largest magnitude of a contiguous chunk; NaN or infinity show in Σx²."""
    library = native.library()
    if library is None or values.dtype != np.float32:
        largest = max(float(values.max()), -float(values.min())) if len(values) else 0.0
        return sum_of_squares(values), largest
    square, top = np.empty(1), np.empty(1, np.float32)
    library.measure(
        native.address(values), len(values), native.address(square), native.address(top)
    )
    return float(square[0]), float(top[0])


def sum_of_squares(values: NDArray[Any]) -> float:
    """Σx² of a chunk, without overflow in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(values @ values)
        if not np.isfinite(square):
            double = values.astype(np.float64)
            square = float(double @ double)
    return square


def all_finite(raw: NDArray[np.uint8], dtype: str) -> bool:
    """Whether stored floats hold neither NaN nor infinity: exponents that are not all ones."""
    if dtype in _BLOCK_TYPES:
        return scales_are_finite(raw, _BLOCK_TYPES[dtype])
    mask = {"F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}.get(dtype)
    if mask is None:
        return bool(np.isfinite(raw.view(NUMPY_DTYPE[dtype])).all())
    return not ((raw.view(np.uint16) & mask) == mask).any()


def as_numpy(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Bytes of one tensor as an array of their own type.

    Raises:
        ModuleNotFoundError: If numpy does not know the type and ml_dtypes is not installed.
    """
    if dtype in NUMPY_DTYPE:
        return raw.view(NUMPY_DTYPE[dtype]).reshape(shape)
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"numpy has no type for {dtype}; `pip install ml_dtypes` adds it"
        ) from None
    return raw.view(getattr(ml_dtypes, _ML_DTYPES[dtype])).reshape(shape)


def numpy_dtype_name(dtype: np.dtype[Any]) -> str:
    """Safetensors name of a numpy (or ml_dtypes) type.

    Raises:
        TypeError: If files cannot hold it.
    """
    plain = dtype.newbyteorder("<").str if dtype.kind in "fiuc" else dtype.str
    for name, known in NUMPY_DTYPE.items():
        if plain == known:
            return name
    for name, known in _ML_DTYPES.items():
        if dtype.name == known:
            return name
    if dtype == np.complex128:
        return "C128"  # never stored as such: averages are stored as pairs of reals
    raise TypeError(f"arrays of type {dtype} cannot be stored; convert it, or leave it out")
