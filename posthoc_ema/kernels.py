"""The inner loops of a pass over many files: their numbers decoded, and linearly combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema import native
from posthoc_ema.digests import Digest
from posthoc_ema.encoding import decode_into, stored_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TILE = 1 << 15  # elements decoded at once by numpy: those of all rows stay in the cache
_WIDTH = 512  # columns of a product: so few that BLAS starts no threads


def combine(
    rows: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    dtype: str,
    base: NDArray[Any] | None,
    coefficients: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """``out += coefficients @ (decoded rows - base)``, on the calling thread alone.

    Differences, because then rounding is relative to them, not to the numbers; in float64, because
    along a chain of residuals there may be many.

    Args:
        rows: ``g`` rows of the same ``m`` stored elements, as contiguous bytes.
        dtype: Their stored type.
        base: ``[m]`` what is subtracted from each row; None for nothing.
        coefficients: ``[k, g]`` float32, or float64 to decode to float64; contiguous; ``base`` is
            of the same type.
        out: ``[k, m]`` float64, each row contiguous.
    """
    library = native.library()
    if library is None or coefficients.dtype != np.float32 or dtype not in native.TYPES:
        _combine(rows, dtype, base, coefficients, out)
        return
    # In groups of as many, filled up with what counts nothing.
    files = len(rows)
    short = -files % native.TOGETHER
    if short:
        rows = [*rows, *[rows[files // native.TOGETHER * native.TOGETHER]] * short]
        coefficients = np.pad(coefficients, ((0, 0), (0, short)))
    pointers = native.addresses(rows)
    library.combine(
        native.TYPES[dtype],
        len(rows),
        native.address(pointers),
        out.shape[1],
        None if base is None else native.address(base),
        len(out),
        native.address(coefficients),
        native.address(out),
        out.strides[0] // out.itemsize,
    )


def combine_files(
    descriptors: Sequence[int],
    offsets: Sequence[int],
    dtype: str,
    base: NDArray[Any],
    coefficients: NDArray[Any],
    out: NDArray[Any],
    *,
    buffer: Callable[[int], NDArray[np.uint8]],
    hashed: bool,
) -> NDArray[np.uint64] | None:
    """As :func:`combine`, of open files: read, hashed and combined while they are in the cache.

    Needs the compiled loops.

    Args:
        descriptors: Of ``g`` files.
        offsets: Of the first element in each.
        dtype: As there; one of :data:`posthoc_ema.native.ITEM`.
        base: As there.
        coefficients: ``[k, g]`` float32.
        out: As there.
        buffer: Gives memory of so many bytes.
        hashed: Hash what is read, too: whole pieces of a :class:`~posthoc_ema.digests.Digest`.

    Returns:
        ``[g, pieces]`` hashes, empty if there are to be none; None if a file could not be read.
    """
    files, count = len(descriptors), out.shape[1]
    padded = np.zeros((len(out), files + -files % native.TOGETHER), np.float32)
    padded[:, :files] = coefficients
    pieces = -(-stored_size(dtype, count) // Digest.PIECE)
    hashes = np.empty((files, pieces if hashed else 0), np.uint64)
    # Of their own names, so that they live as long as the call.
    opened, starts = np.array(descriptors, np.int64), np.array(offsets, np.int64)
    memory = buffer(native.TOGETHER * Digest.PIECE)
    read = native.library().combine_files(
        native.TYPES[dtype],
        files,
        native.address(opened),
        native.address(starts),
        count,
        Digest.PIECE // native.ITEM[dtype],
        native.address(base),
        len(out),
        native.address(padded),
        padded.shape[1],
        native.address(out),
        out.strides[0] // out.itemsize,
        native.address(memory),
        native.address(hashes) if hashed else None,
    )
    return hashes if read else None


def read_pieces(
    descriptor: int, pieces: Sequence[tuple[int, int, int]], out: NDArray[np.uint8]
) -> bool:
    """Read many pieces of a file in one call; False if not all could be, or no loop is compiled.

    Args:
        descriptor: Of the open file.
        pieces: Each as its offset in the file, its place in ``out``, and its size in bytes.
        out: Contiguous bytes.
    """
    library = native.library()
    if library is None:
        return False
    table = np.array(pieces, np.int64).reshape(-1, 3)
    return bool(
        library.read_pieces(descriptor, len(table), native.address(table), native.address(out))
    )


def finish(total: NDArray[np.float64], base: NDArray[Any], out: NDArray[Any]) -> bool:
    """``out = total + base``, and whether all of it is finite.

    Args:
        total: ``[k, m]`` float64.
        base: ``[m]`` of the type of ``out``.
        out: ``[k, m]`` float32, or float64, rows contiguous.

    Returns:
        False if a result is NaN or infinite.
    """
    library = native.library()
    if library is not None and out.dtype == np.float32:
        found = [
            library.finish(
                native.address(row), native.address(base), len(row), native.address(result)
            )
            for row, result in zip(total, out, strict=True)
        ]
        return all(found)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, total + base, casting="same_kind")
        # A sum is finite only if all of it is; but that of large numbers may overflow.
        return bool(np.isfinite(out.sum()) or np.isfinite(out).all())


def _combine(
    rows: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    dtype: str,
    base: NDArray[Any] | None,
    coefficients: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """The same in numpy."""
    count = out.shape[1]
    numbers = np.empty((len(rows), min(_TILE, count)), coefficients.dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # damaged bytes may be anything
        for left in range(0, count, _TILE):
            right = min(left + _TILE, count)
            tile = numbers[:, : right - left]
            for row, decoded in zip(rows, tile, strict=True):
                decode_into(
                    row[stored_size(dtype, left) : stored_size(dtype, right)], dtype, decoded
                )
            if base is not None:
                tile -= base[left:right]
            whole = (right - left) // _WIDTH * _WIDTH
            cut = tile[:, :whole].reshape(len(rows), -1, _WIDTH).transpose(1, 0, 2)
            product = coefficients @ cut  # (pieces, k, width)
            for target, part in zip(out, product.transpose(1, 0, 2), strict=True):
                target[left : left + whole].reshape(-1, _WIDTH)[...] += part
            out[:, left + whole : right] += coefficients @ tile[:, whole:]
