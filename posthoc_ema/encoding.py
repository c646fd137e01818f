"""Numbers to bytes and back: storage precisions, and the digest that finds damaged bytes."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

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

ENCODINGS: dict[str, str | None] = {"float32": None, "float16": "F16", "bfloat16": "BF16"}
"""Encodings of snapshots: the stored type, or None for the precision in which averages are kept
(float32, and float64 for float64 weights)."""

_LARGEST = {"F16": 65504.0, "BF16": 3.3895e38}  # above, rounding gives infinity
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


def stored_dtype(encoding: str, kept: str, max_abs: float, rms: float) -> str:
    """Type in which one tensor is stored.

    Args:
        encoding: One of :data:`ENCODINGS`.
        kept: ``"F32"`` or ``"F64"``, the type of the average in memory.
        max_abs: Largest magnitude in the tensor.
        rms: Root mean square of the tensor.

    Returns:
        The encoding's own type, or ``kept`` where that would overflow, or where float16 would
        lose precision to its subnormal numbers.
    """
    wanted = ENCODINGS[encoding]
    if wanted is None or max_abs > _LARGEST[wanted]:
        return kept
    return kept if wanted == "F16" and 0 < rms < _FLOAT16_SMALL_RMS else wanted


def encode(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Round finite float32 or float64 values to the stored type, to nearest even.

    Returns:
        A contiguous array whose bytes are what the file holds (bfloat16 as uint16).
    """
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values, dtype=NUMPY_DTYPE[dtype])


def decode_into(raw: NDArray[np.uint8], dtype: str, out: NDArray[Any]) -> None:
    """Convert stored bytes to floats.

    Args:
        raw: ``[n * itemsize]`` bytes as read from the file.
        dtype: Stored type: F64, F32, F16 or BF16.
        out: ``[n]`` float32 or float64, overwritten.
    """
    if out.dtype != np.float32 or dtype in ("F32", "F64"):
        if dtype == "BF16":
            single = np.empty(len(out), np.float32)
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


def all_finite(raw: NDArray[np.uint8], dtype: str) -> bool:
    """Whether stored floats hold neither NaN nor infinity: exponents that are not all ones."""
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


if TYPE_CHECKING:
    PageNumbers = Callable[[NDArray[np.uint8]], NDArray[np.float64]]


class PageDigest:
    """Digest of a stream of bytes, at the speed of memory.

    The bytes are cut into pages of 4 KiB; a BLAKE2b hash runs over one number for each page and
    the total length. That number is the sum of the page's 1024 words of 4 bytes, taken as signed
    integers, times 1, 3, 5, …, 2047. Float64 holds it exactly (it stays below 2⁵¹), so the
    order of summation does not matter. A change within one word, any two flipped bits and any
    two exchanged words of a page are found for certain; a hash of every byte would find more, and
    take ten times as long as reading.

    Args:
        numbers: Computes the numbers of whole pages; default :func:`page_numbers`.
    """

    PAGE = 4096

    def __init__(self, numbers: PageNumbers | None = None) -> None:
        self._numbers = numbers or page_numbers
        self._hash = blake2b(digest_size=8)
        self._rest = np.empty(0, np.uint8)
        self._length = 0

    def update(self, data: NDArray[np.uint8]) -> None:
        """Add contiguous bytes."""
        self._length += len(data)
        if len(self._rest):
            take = min(self.PAGE - len(self._rest), len(data))
            self._rest = np.concatenate([self._rest, data[:take]])
            data = data[take:]
            if len(self._rest) < self.PAGE:
                return
            self._add(self._rest)
            self._rest = np.empty(0, np.uint8)
        whole = len(data) - len(data) % self.PAGE
        if whole:
            self._add(data[:whole])
        self._rest = data[whole:].copy()

    def hexdigest(self) -> str:
        """16 hexadecimal digits for all bytes so far."""
        final = self._hash.copy()
        padded = np.zeros(self.PAGE, np.uint8)
        padded[: len(self._rest)] = self._rest
        final.update(self._numbers(padded).astype("<i8").tobytes())
        final.update(self._length.to_bytes(8, "little"))
        return final.hexdigest()

    def _add(self, pages: NDArray[np.uint8]) -> None:
        self._hash.update(self._numbers(pages).astype("<i8").tobytes())


_MULTIPLIERS = np.arange(1.0, PageDigest.PAGE // 2, 2)


def page_numbers(pages: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The number of each page, see :class:`PageDigest`; float64 holds it exactly.

    Args:
        pages: ``[n * 4096]`` contiguous bytes.
    """
    words = pages.view("<i4").reshape(-1, PageDigest.PAGE // 4)
    numbers = np.empty(len(words))
    # 64 pages stay in cache; as products of 8 by 1024 BLAS starts no threads for them.
    double = np.zeros((64, words.shape[1]))
    for start in range(0, len(words), 64):
        part = words[start : start + 64]
        np.copyto(double[: len(part)], part)
        eights = double.reshape(-1, 8, words.shape[1])[: -(-len(part) // 8)]
        numbers[start : start + 64] = (eights @ _MULTIPLIERS).ravel()[: len(part)]
    return numbers
