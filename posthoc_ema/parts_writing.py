"""Writing a snapshot by several processes: a file of each, then an index that makes it visible.

``docs/snapshot_format.md`` is the contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posthoc_ema.boxes import Box
from posthoc_ema.digests import Digest
from posthoc_ema.draft import sync_directory
from posthoc_ema.encoding import ENCODINGS, alignment, check_encoding
from posthoc_ema.errors import SnapshotWriteError, StructureError
from posthoc_ema.parts import FOLDER, Part, covers
from posthoc_ema.places import Place, looked_at
from posthoc_ema.profiles import Profile
from posthoc_ema.snapshot_file import PARTS_VERSION, AverageSource, CopySource, RunIdentity
from posthoc_ema.snapshot_writing import NO_DIGEST, Magnitude, magnitudes, write_snapshot
from posthoc_ema.tensorfile import (
    SUFFIX,
    TensorEntry,
    TensorFileWriter,
    header_digest,
    read_header,
)


@dataclass(frozen=True)
class WrittenPart:
    """A file of one process, on disk but in no index yet.

    Attributes:
        part: What the index shall say of it.
        tensors: By name: stored type, box, and shape of the whole tensor.
        copies: Which of them are no averages.
        rounding_square: Its share of the mean squared rounding error.
    """

    part: Part
    tensors: Mapping[str, tuple[str, Box, tuple[int, ...]]]
    copies: frozenset[str]
    rounding_square: float


def part_name(stem: str, number: int, of: int) -> str:
    """File name of the part of process ``number``, from 0 on."""
    return f"{stem}-{number + 1:05d}-of-{of:05d}{SUFFIX}"


def write_part(
    path: Place,
    run: RunIdentity,
    t: float,
    profile: Profile,
    averages: Sequence[AverageSource],
    copies: Sequence[CopySource],
    encoding: str,
    sizes: Mapping[str, Magnitude],
) -> WrittenPart | None:
    """Write what one process holds, durably; None if it holds nothing.

    Args:
        path: In the folder ``parts`` of the store.
        run: As in :func:`write_snapshot`; so are
        t: its time,
        profile: its profile,
        encoding: and how it is stored.
        averages: Boxes of averaged tensors.
        copies: Boxes of others.
        sizes: Magnitudes of the whole tensors, so that all processes choose the same types.
    """
    if not averages and not copies:
        return None
    path.parent.mkdir(exist_ok=True)
    write_snapshot(path, run, t, profile, averages, copies, None, encoding, sizes=sizes)
    header = read_header(path)
    everything: list[AverageSource | CopySource] = [*averages, *copies]
    tensors = {
        s.name: (header.entries[s.name].dtype, Box(s.part.offsets, s.shape), s.part.whole)
        for s in everything
        if s.part is not None
    }
    return WrittenPart(
        Part(path.name, path.stat().st_size, header.metadata["digest"]["header"]),
        tensors,
        frozenset(source.name for source in copies),
        header.metadata["statistics"]["rounding_square"],
    )


@dataclass(frozen=True)
class Holding:
    """What one process would write.

    Attributes:
        sizes: Magnitudes of its boxes of averaged tensors.
        boxes: (name, offsets, shape) of all its boxes.
        names: Name and type of each averaged tensor of the model.
    """

    sizes: Mapping[str, Magnitude]
    boxes: frozenset[tuple[str, tuple[int, ...], tuple[int, ...]]]
    names: Sequence[tuple[str, str]]

    @classmethod
    def of(
        cls,
        folder: Place,
        averages: Sequence[AverageSource],
        copies: Sequence[CopySource],
        names: Sequence[tuple[str, str]],
    ) -> Holding:
        """Of the process that calls it.

        Raises:
            NonFiniteError: If an average holds NaN or infinity.
        """
        everything: list[AverageSource | CopySource] = [*averages, *copies]
        boxes = frozenset((s.name, s.part.offsets, s.shape) for s in everything if s.part)
        return cls(magnitudes(folder, averages), boxes, names)


@dataclass(frozen=True)
class Division:
    """What all processes together write.

    Attributes:
        sizes: Magnitudes of whole tensors.
        dropped: (process, name) of boxes that a process before it writes.
    """

    sizes: Mapping[str, Magnitude]
    dropped: frozenset[tuple[int, str]]

    @classmethod
    def of(cls, holdings: Sequence[Holding]) -> Division:
        """Of processes in their order.

        Raises:
            StructureError: If they do not mean the same tensors.
        """
        sizes: dict[str, Magnitude] = {}
        seen, dropped = set(), set()
        for number, holding in enumerate(holdings):
            different = sorted(set(holding.names) ^ set(holdings[0].names))
            if different:
                raise StructureError(
                    f"process {number} of the group tracks other tensors than the first one: "
                    f"{different[0][0]!r} in one of them only ({len(different)} such). Give models "
                    "that differ, as stages of a pipeline do, snapshot folders of their own"
                )
            for box in sorted(holding.boxes):
                name = box[0]
                if box in seen:
                    dropped.add((number, name))
                elif name in holding.sizes:
                    size, known = holding.sizes[name], sizes.get(name, Magnitude(0, 0.0, 0.0))
                    sizes[name] = Magnitude(
                        known.count + size.count,
                        known.square + size.square,
                        max(known.largest, size.largest),
                    )
                seen.add(box)
        return cls(sizes, frozenset(dropped))


def write_index(
    path: Place,
    run: RunIdentity,
    t: float,
    profile: Profile,
    averages: Sequence[tuple[str, str]],
    copies: Sequence[CopySource],
    aliases: Mapping[str, str],
    encoding: str,
    written: Sequence[WrittenPart],
    sizes: Mapping[str, Magnitude],
) -> None:
    """Write the file that makes a snapshot of its parts, which are on disk.

    Args:
        path: Where; the snapshot is visible and complete when this returns.
        run: As in :func:`write_snapshot`; so are
        t: its time,
        profile: its profile,
        aliases: tied names,
        encoding: and how it is stored.
        averages: Name and type of each averaged tensor of the model, in its order.
        copies: Buffers that no process holds a part of; they lie in the index itself.
        written: The parts of all processes.
        sizes: Magnitudes of the whole tensors.

    Raises:
        StructureError: If the parts do not make up the tensors.
        SnapshotWriteError: If a part is not where this process can see it.
        OSError: If the file cannot be written.
    """
    folder = looked_at(path.parent)
    for part in (w.part for w in written):
        place = folder / FOLDER / part.name
        if not place.exists() or place.stat().st_size != part.nbytes:
            raise SnapshotWriteError(
                f"{place} was written by another process, but cannot be seen by the one that "
                "writes the index: the snapshot folder must lie on a file system that all "
                "machines share"
            )
    if written:
        sync_directory(path.parent / FOLDER)
    tensors = _joined(written, [name for name, _ in averages])
    entries = [TensorEntry(c.name, c.dtype, c.shape) for c in copies]
    entries.sort(key=lambda entry: -alignment(entry.dtype))
    data = {c.name: c.data for c in copies}
    digest = Digest(sum(entry.nbytes for entry in entries))
    for entry in entries:
        digest.update(data[entry.name])
    count = sum(size.count for size in sizes.values())
    digests = {"averages": Digest(0).hexdigest(), "copies": digest.hexdigest()}
    metadata = {
        "format_version": PARTS_VERSION,
        "run_id": run.run_id,
        "t": t,
        "t_first": run.t_first,
        "unit": run.unit,
        "framework": run.framework,
        "profile": profile.to_dict(),
        "encoding": encoding,
        "averages": [list(pair) for pair in averages],
        "aliases": dict(aliases),
        "rewrites": 0,
        "refines": False,
        "blocks": {},
        "prediction": [],
        "tensors": tensors,
        "parts": [[w.part.name, w.part.nbytes, w.part.header] for w in written],
        "statistics": {
            "count": count,
            "mean_square": sum(size.square for size in sizes.values()) / max(count, 1),
            "rounding_square": sum(w.rounding_square for w in written),
        },
        "digest": {**digests, "header": NO_DIGEST},
    }
    digests["header"] = header_digest(metadata, entries)
    metadata["digest"] = digests
    with TensorFileWriter(path, entries, metadata, new=True) as writer:
        for entry in entries:
            writer.write(data[entry.name])
        writer.commit(metadata)


def _joined(
    written: Sequence[WrittenPart], averages: Sequence[str]
) -> list[tuple[str, str, list[int]]]:
    """Name, type and shape of each tensor of the parts: averages first, larger elements first."""
    boxes: dict[str, list[Box]] = {name: [] for name in averages}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part in written:
        for name, (dtype, box, whole) in part.tensors.items():
            if kinds.setdefault(name, (dtype, whole)) != (dtype, whole):
                raise StructureError(
                    f"{part.part.name} holds {name} as {dtype} {box} of {whole}, others hold "
                    f"{kinds[name][0]} of {kinds[name][1]}"
                )
            boxes.setdefault(name, []).append(box)
    for name, found in boxes.items():
        if name not in kinds or not covers(found, kinds[name][1]):
            raise StructureError(
                f"the parts that the processes hold of {name} do not make up the tensor: "
                f"{', '.join(map(str, found)) or 'none'} of "
                f"{kinds[name][1] if name in kinds else 'unknown shape'}. All processes of the "
                "group must update one EMA of one model"
            )
    copies = frozenset[str]().union(*(part.copies for part in written))
    order = sorted(boxes, key=lambda name: (name in copies, -alignment(kinds[name][0])))
    return [(name, kinds[name][0], list(kinds[name][1])) for name in order]


def check_parts_encoding(encoding: str) -> None:
    """Blocks of numbers cannot be cut where processes cut tensors.

    Raises:
        ValueError: If the encoding stores blocks.
    """
    if ENCODINGS[check_encoding(encoding)].residuals:
        raise ValueError(
            f"encoding={encoding!r} is not for sharded weights; use float32, float16 or bfloat16, "
            "and make smaller files after the run with posthoc_ema.convert"
        )
