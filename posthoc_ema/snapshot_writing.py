"""Writing one snapshot file: in two passes over the averages, durably.

``docs/snapshot_format.md`` is the contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.blocks import BLOCK
from posthoc_ema.digests import Digest
from posthoc_ema.encoding import (
    ENCODINGS,
    Terms,
    alignment,
    block_bits,
    check_encoding,
    encode,
    measure,
    refining_dtype,
    stored_dtype,
    summed,
)
from posthoc_ema.errors import NonFiniteError
from posthoc_ema.places import Place
from posthoc_ema.profiles import Profile
from posthoc_ema.snapshot_file import (
    FORMAT_VERSION,
    PARTS_VERSION,
    AverageSource,
    CopySource,
    RunIdentity,
    Snapshot,
)
from posthoc_ema.tensorfile import TensorEntry, TensorFileWriter, header_digest
from posthoc_ema.workers import Workers

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_DIGEST = "0" * 32
"""Stands in for a digest that is not known yet."""

_PIECE = 1 << 18  # elements encoded at once, whole blocks


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
    terms: Sequence[tuple[float, Mapping[str, NDArray[np.float64]]]]
    names: frozenset[str]

    def at(self, name: str, start: int, stop: int) -> Terms:
        """Elements of one tensor, as what they are the sum of."""
        return [(factor, arrays[name][start:stop]) for factor, arrays in self.terms]


def write_snapshot(
    path: Place,
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
    decoded: dict[str, NDArray[np.float64]] | None = None,
    sizes: Mapping[str, Magnitude] | None = None,
) -> None:
    """Write one file, in two passes over the averages and without a copy of them.

    If a tensor is part of one, so is the file: :mod:`posthoc_ema.parts_writing` makes a snapshot
    of several.

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
        sizes: From :func:`magnitudes`, if they are known; for a part, of all parts together.

    Raises:
        NonFiniteError: If an average holds NaN or infinity.
        OSError: If the file cannot be written.
    """
    check_encoding(encoding)
    sizes = magnitudes(path, averages) if sizes is None else sizes
    count = sum(size.count for size in sizes.values())
    square = sum(size.square for size in sizes.values()) / max(count, 1)
    statistics = {"count": count, "mean_square": square}
    entries = _lay_out(averages, copies, encoding, prediction, refines, sizes)
    blocks = {e.name: list(e.shape) for e in entries if block_bits(e.dtype) is not None}
    # A refinement belongs to what it refines, even if no tensor of theirs fills a block.
    inputs = prediction.inputs if prediction and (blocks or refines) else ()
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
    everything: list[AverageSource | CopySource] = [*averages, *copies]
    boxes = {s.name: [s.part.offsets, s.part.whole] for s in everything if s.part}
    if boxes:
        identity = {**identity, "format_version": PARTS_VERSION, "boxes": boxes}
    empty = {"averages": NO_DIGEST, "copies": NO_DIGEST, "header": NO_DIGEST}
    # The digits of a float vary in number: reserve the longest.
    longest = {**statistics, "rounding_square": -1.2345678901234567e-300}
    sources = {source.name: source for source in averages}
    copied = {source.name: source for source in copies}
    lengths = {"averages": 0, "copies": 0}
    for entry in entries:
        lengths["copies" if entry.name in copied else "averages"] += entry.nbytes
    digests = {part: Digest(size) for part, size in lengths.items()}
    rounding = 0.0
    with (
        Workers() as pool,
        TensorFileWriter(
            path,
            entries,
            {**identity, "statistics": longest, "digest": empty},
            new=not boxes,  # a part may be left from an attempt that failed elsewhere
        ) as writer,
    ):
        for entry in entries:
            if entry.name in copied:
                digests["copies"].update(copied[entry.name].data)
                writer.write(copied[entry.name].data)
                continue
            task = partial(_encode, entry, prediction, _room(entry, decoded))
            for stored, lost in pool.in_order(
                task, _pieces(sources[entry.name].chunks(), entry.count)
            ):
                digests["averages"].update(stored)
                writer.write(stored)
                rounding += lost
        digest = {part: stream.hexdigest() for part, stream in digests.items()}
        metadata = {
            **identity,
            "statistics": {
                **statistics,
                "rounding_square": rounded_before + rounding / max(count, 1),
            },
            "digest": digest,
        }
        digest["header"] = header_digest(metadata, entries)
        writer.commit(metadata)


@dataclass(frozen=True)
class Magnitude:
    """How large the values of one tensor are.

    Attributes:
        count: Their number.
        square: Sum of their squares.
        largest: Largest magnitude.
    """

    count: int
    square: float
    largest: float

    @property
    def rms(self) -> float:
        """Root mean square."""
        return (self.square / max(self.count, 1)) ** 0.5


def magnitudes(path: Place, averages: Sequence[AverageSource]) -> dict[str, Magnitude]:
    """First pass over the values: are they finite, and how large.

    Raises:
        NonFiniteError: If an average holds NaN or infinity; ``path`` is what is not written.
    """
    found = {}
    for source in averages:
        square, largest, count, finite = 0.0, 0.0, 0, True
        for chunk in source.chunks():
            chunk_square, chunk_largest = measure(chunk)
            square, largest = square + chunk_square, max(largest, chunk_largest)
            # A finite sum of squares proves it at no cost; float64 can overflow all the same.
            finite &= bool(np.isfinite(square)) or bool(np.isfinite(chunk).all())
            count += len(chunk)
        if not finite:
            raise NonFiniteError(
                f"the average of {source.name!r} holds NaN or infinity, so {path} was not "
                "written. Resume from a checkpoint before the weights went bad; "
                'EMA(nonfinite="skip") leaves such steps out of the averages'
            )
        square = min(square, float(np.finfo(np.float64).max))
        found[source.name] = Magnitude(count, square, largest)
    return found


def _lay_out(
    averages: Sequence[AverageSource],
    copies: Sequence[CopySource],
    encoding: str,
    prediction: Prediction | None,
    refines: bool,
    sizes: Mapping[str, Magnitude],
) -> list[TensorEntry]:
    """In what type each tensor is stored, and in which order."""
    entries = []
    residuals = ENCODINGS[encoding].residuals
    for source in averages:
        size = sizes[source.name]
        dtype = stored_dtype(encoding, source.kept, size.count, size.largest, size.rms)
        predicted = prediction is not None and source.name in prediction.names
        if prediction is not None and predicted and residuals and size.count >= BLOCK:
            rest = _remaining(source, prediction)
            if refines:
                dtype = refining_dtype(rest, size.rms)
            elif rest < size.rms / 2 or block_bits(dtype) is not None:
                dtype = residuals[not prediction.first]
        elif refines or (prediction is not None and block_bits(dtype) is not None):
            dtype = source.kept  # small; or blocks would be read as residuals
        entries.append(TensorEntry(source.name, dtype, source.shape))
    entries += [TensorEntry(source.name, source.dtype, source.shape) for source in copies]
    # Larger elements first, so that every tensor is aligned to its own type.
    entries.sort(key=lambda entry: -alignment(entry.dtype))
    return entries


def _remaining(source: AverageSource, prediction: Prediction) -> float:
    """RMS of what a prediction leaves of a tensor, judged from a part of each chunk."""
    square, looked_at, place = 0.0, 0, 0
    for chunk in source.chunks():
        part = chunk[: max(len(chunk) // 16, BLOCK)]
        terms = prediction.at(source.name, place, place + len(part))
        square += measure((part - summed(terms, len(part))).astype(np.float32))[0]
        looked_at, place = looked_at + len(part), place + len(chunk)
    return (square / looked_at) ** 0.5


def _encode(
    entry: TensorEntry,
    prediction: Prediction | None,
    decoded: NDArray[Any] | None,
    piece: tuple[int, NDArray[Any]],
) -> tuple[NDArray[np.uint8], float]:
    """Bytes of one piece of a tensor, and its sum of squared rounding errors."""
    start, values = piece
    stop = start + len(values)
    predicted: Terms = ()
    if block_bits(entry.dtype) is not None and prediction is not None:
        predicted = prediction.at(entry.name, start, stop)
    part = None if decoded is None else decoded[start:stop]
    return encode(values, entry.dtype, predicted, part)


def _room(entry: TensorEntry, decoded: dict[str, NDArray[Any]] | None) -> NDArray[Any] | None:
    if decoded is None:
        return None
    if entry.name not in decoded:
        decoded[entry.name] = np.empty(entry.count)
    return decoded[entry.name]


def _pieces(chunks: Iterable[NDArray[Any]], count: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Cut or join chunks to pieces of whole blocks, but the last, each with its first element."""
    done, rest = 0, None
    for chunk in chunks:
        values = chunk if rest is None else np.concatenate([rest, chunk])
        last = done + len(values) == count
        whole = len(values) if last else len(values) // BLOCK * BLOCK
        for start in range(0, whole, _PIECE):
            piece = values[start : min(start + _PIECE, whole)]
            yield done, piece
            done += len(piece)
        rest = values[whole:] if whole < len(values) else None
