"""Writing one snapshot file: in two passes over the averages, durably.

``docs/snapshot_format.md`` is the contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.blocks import BLOCK
from posthoc_ema.encoding import (
    ENCODINGS,
    Digest,
    alignment,
    block_bits,
    check_encoding,
    encode,
    measure,
    refining_dtype,
    stored_dtype,
    sum_of_squares,
)
from posthoc_ema.errors import NonFiniteError
from posthoc_ema.profiles import Profile
from posthoc_ema.snapshot_file import (
    FORMAT_VERSION,
    AverageSource,
    CopySource,
    RunIdentity,
    Snapshot,
    header_digest,
)
from posthoc_ema.tensorfile import TensorEntry, TensorFileWriter
from posthoc_ema.workers import Workers

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NO_DIGEST = "0" * 32
_PIECE = 1 << 18  # elements encoded at once, whole blocks
_TILE = 1 << 14


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a snapshot is expected to be: a combination of earlier ones.

    Attributes:
        inputs: (coefficient, snapshot) from which; coefficients sum to one.
        first: Whether no other snapshot of the same time is among the inputs.
        terms: (coefficient, flat arrays by name) that make it up; the coefficients sum to one.
        names: Tensors that are predicted.
    """

    inputs: Sequence[tuple[float, Snapshot]]
    first: bool
    terms: Sequence[tuple[float, Mapping[str, NDArray[Any]]]]
    names: frozenset[str]

    def at(self, name: str, start: int, stop: int) -> NDArray[np.float64]:
        """Elements of one tensor."""
        out = np.zeros(stop - start)
        for left in range(0, stop - start, _TILE):  # what stays in the cache
            right = min(left + _TILE, stop - start)
            for factor, arrays in self.terms:
                out[left:right] += factor * arrays[name][start + left : start + right]
        return out


def write_snapshot(
    path: Path,
    run: RunIdentity,
    t: float,
    profile: Profile,
    averages: Sequence[AverageSource],
    copies: Sequence[CopySource] = (),
    aliases: Mapping[str, str] | None = None,
    encoding: str = "float32",
    prediction: Prediction | None = None,
    refines: bool = False,
    rounded_before: float = 0.0,
    rewrites: int = 0,
    decoded: dict[str, NDArray[Any]] | None = None,
) -> None:
    """Write one file, in two passes over the averages and without a copy of them.

    Args:
        path: Where; durable and complete when this returns, absent if it raises.
        run: What it shares with the other snapshots of its run.
        t: Time of the average.
        profile: Its averaging profile.
        averages: Averaged tensors, streamed in chunks.
        copies: Buffers and integer tensors.
        aliases: Tied names, each with the name that is stored.
        encoding: Storage precision; float16 gives way to the precision in memory for a tensor
            whose values it cannot hold.
        prediction: With it, encodings that have a type for residuals store what remains of each
            tensor, where that is smaller.
        refines: Whether the prediction is this very average as a coarser file holds it.
        rounded_before: Mean squared rounding error that the averages carry already.
        rewrites: How often this snapshot was written before.
        decoded: If given, receives the averages as the file holds them, flat, by name, float64:
            what is predicted from them adds up their rounding.

    Raises:
        NonFiniteError: If an average holds NaN or infinity.
        OSError: If the file cannot be written.
    """
    check_encoding(encoding)
    entries, size = _plan_file(path, averages, copies, encoding, prediction, refines)
    blocks = {e.name: list(e.shape) for e in entries if block_bits(e.dtype) is not None}
    inputs = prediction.inputs if prediction and blocks else ()
    identity = {
        "format_version": FORMAT_VERSION,
        "run_id": run.run_id,
        "t": t,
        "t_first": run.t_first,
        "unit": run.unit,
        "framework": run.framework,
        "profile": profile.to_dict(),
        "encoding": encoding,
        # Pairs, not a mapping: the model's order shall survive.
        "averages": [[source.name, source.dtype] for source in averages],
        "aliases": dict(aliases or {}),
        "rewrites": rewrites,
        "refines": refines,
        "blocks": blocks,
        "prediction": [[x, s.digests["header"], s.path.name] for x, s in inputs],
    }
    empty = {"averages": _NO_DIGEST, "copies": _NO_DIGEST, "header": _NO_DIGEST}
    # The digits of a float vary in number: reserve the longest.
    longest = {**size, "rounding_square": -1.2345678901234567e-300}
    sources = {source.name: source for source in averages}
    copied = {source.name: source for source in copies}
    sizes = {"averages": 0, "copies": 0}
    for entry in entries:
        sizes["copies" if entry.name in copied else "averages"] += entry.nbytes
    digests = {part: Digest(size) for part, size in sizes.items()}
    rounding = 0.0
    with (
        Workers() as pool,
        TensorFileWriter(
            path, entries, {**identity, "statistics": longest, "digest": empty}
        ) as writer,
    ):
        for entry in entries:
            if entry.name in copied:
                digests["copies"].update(copied[entry.name].data)
                writer.write(copied[entry.name].data)
                continue
            task = partial(_encode, entry, prediction, _room(entry, decoded))
            for stored, square in pool.in_order(task, _pieces(sources[entry.name].chunks())):
                digests["averages"].update(stored)
                writer.write(stored)
                rounding += square
        digest = {part: stream.hexdigest() for part, stream in digests.items()}
        metadata = {
            **identity,
            "statistics": {
                **size,
                "rounding_square": rounded_before + rounding / max(size["count"], 1),
            },
            "digest": digest,
        }
        digest["header"] = header_digest(metadata, entries)
        writer.commit(metadata)


def _plan_file(
    path: Path,
    averages: Sequence[AverageSource],
    copies: Sequence[CopySource],
    encoding: str,
    prediction: Prediction | None,
    refines: bool,
) -> tuple[list[TensorEntry], dict[str, float]]:
    """First pass over the values: are they finite, how large, and so in what type stored."""
    entries, total, count = [], 0.0, 0
    for source in averages:
        square, largest, size, finite, remaining = 0.0, 0.0, 0, True, 0.0
        predicted = prediction if prediction and source.name in prediction.names else None
        for chunk in source.chunks():
            if predicted is not None:
                # A part of each chunk tells as well which of the two is larger.
                part = chunk[: max(len(chunk) // 16, BLOCK)]
                rest = part - predicted.at(source.name, size, size + len(part))
                remaining += sum_of_squares(rest) * len(chunk) / max(len(part), 1)
            chunk_square, chunk_largest = measure(chunk)
            square, largest = square + chunk_square, max(largest, chunk_largest)
            # A finite sum of squares proves it at no cost; float64 can overflow all the same.
            finite &= bool(np.isfinite(square)) or bool(np.isfinite(chunk).all())
            size += len(chunk)
        if not finite:
            raise NonFiniteError(
                f"the average of {source.name!r} holds NaN or infinity, so {path} was not "
                "written. Resume from a checkpoint before the weights went bad; "
                'EMA(nonfinite="skip") leaves such steps out of the averages'
            )
        square = min(square, float(np.finfo(np.float64).max))
        rms = (square / max(size, 1)) ** 0.5
        dtype = stored_dtype(encoding, source.kept, size, largest, rms)
        residuals = ENCODINGS[encoding].residuals
        if predicted is not None and residuals and size >= BLOCK:
            if refines:
                dtype = refining_dtype((remaining / size) ** 0.5, rms)
            elif remaining < square / 4 or block_bits(dtype) is not None:
                dtype = residuals[not predicted.first]
        elif refines or (prediction is not None and block_bits(dtype) is not None):
            dtype = source.kept  # small; or blocks would be read as residuals
        entries.append(TensorEntry(source.name, dtype, source.shape))
        total, count = total + square, count + size
    entries += [TensorEntry(source.name, source.dtype, source.shape) for source in copies]
    # Larger elements first, so that every tensor is aligned to its own type.
    entries.sort(key=lambda entry: -alignment(entry.dtype))
    return entries, {"count": count, "mean_square": total / max(count, 1)}


def _encode(
    entry: TensorEntry,
    prediction: Prediction | None,
    decoded: NDArray[Any] | None,
    piece: tuple[int, NDArray[Any]],
) -> tuple[NDArray[np.uint8], float]:
    """Bytes of one piece of a tensor, and its sum of squared rounding errors."""
    start, values = piece
    stop = start + len(values)
    predicted = None
    if block_bits(entry.dtype) is not None and prediction is not None:
        predicted = prediction.at(entry.name, start, stop)
    part = None if decoded is None else decoded[start:stop]
    return encode(values, entry.dtype, predicted, part)


def _room(entry: TensorEntry, decoded: dict[str, NDArray[Any]] | None) -> NDArray[Any] | None:
    if decoded is None:
        return None
    return decoded.setdefault(entry.name, np.empty(entry.count))


def _pieces(chunks: Iterable[NDArray[Any]]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Cut or join chunks to pieces of whole blocks, each with its first element."""
    done, rest = 0, None
    for chunk in chunks:
        values = chunk if rest is None else np.concatenate([rest, chunk])
        whole = len(values) // BLOCK * BLOCK
        for start in range(0, whole, _PIECE):
            piece = values[start : min(start + _PIECE, whole)]
            yield done, piece
            done += len(piece)
        rest = values[whole:] if whole < len(values) else None
    if rest is not None:
        yield done, rest
