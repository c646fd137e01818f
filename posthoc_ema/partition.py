"""A reconstruction in parts: which tensors each process makes, and the index of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Any

from posthoc_ema.digests import bytes_digest
from posthoc_ema.draft import write_text_atomically
from posthoc_ema.errors import CorruptSnapshotError
from posthoc_ema.places import Place
from posthoc_ema.sinks import index_path, index_text, shard_path
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.tensorfile import Header, canonical_json, read_header


@dataclass(frozen=True)
class Partition:
    """One part.

    Attributes:
        number: Of this part, from 1 on.
        of: How many there are.
        names: Averaged tensors of this part.
        request: Digest of what all parts must agree on: snapshots, time, method.
        results: The file that each result would be, were it one.
    """

    number: int
    of: int
    names: frozenset[str]
    request: str
    results: Sequence[Place]

    @classmethod
    def of_request(
        cls,
        part: tuple[int, int],
        snapshots: Sequence[Snapshot],
        names: Sequence[str],
        request: Any,
        results: Sequence[Place],
    ) -> Partition:
        """The part ``(i, n)`` of a request.

        Raises:
            ValueError: If there is no such part, or nowhere to write it.
        """
        number, of = part
        if not 1 <= number <= of:
            raise ValueError(f"part must be (i, n) with 1 <= i <= n (got {part})")
        if not results:
            raise ValueError("part= needs out=, the place where all parts write their files")
        if of > len(names):
            raise ValueError(f"part={part}: there are only {len(names)} tensors to divide")
        sizes = {name: snapshots[0].entries[name].count for name in names}
        told = [request, [s.digests["header"] for s in snapshots]]
        digest = bytes_digest(canonical_json(told).encode())
        return cls(number, of, _share(sizes, number, of), digest, results)

    @property
    def paths(self) -> list[Place]:
        """The file of this part of each result."""
        return [shard_path(path, self.number, self.of) for path in self.results]

    def own(self, assignment: Mapping[Any, Sequence[str]]) -> dict[Any, list[str]]:
        """Of groups of tensors, what this part makes."""
        mine = {key: [n for n in names if n in self.names] for key, names in assignment.items()}
        return {key: names for key, names in mine.items() if names}

    def metadata(self, metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the files say of themselves, so that only those of one request are joined."""
        return [{**m, "part": [self.number, self.of], "request": self.request} for m in metadata]

    def withdraw(self) -> None:
        """Take back the indices: files of theirs are about to be replaced."""
        for path in self.results:
            index_path(path).unlink(missing_ok=True)

    def join(self) -> None:
        """Write the index of each result of which all parts are there; the last to end does."""
        for path in self.results:
            shards = {shard_path(path, k, self.of): k for k in range(1, self.of + 1)}
            headers = {shard: _header(shard) for shard in shards}
            own = headers[shard_path(path, self.number, self.of)]
            complete = all(
                header is not None
                and own is not None
                and header.metadata == {**own.metadata, "part": [shards[shard], self.of]}
                for shard, header in headers.items()
            )
            if complete:
                entries = {s: list(h.entries.values()) for s, h in headers.items() if h}
                write_text_atomically(index_path(path), index_text(entries))
                path.unlink(missing_ok=True)  # an earlier result under the other name


def _header(path: Place) -> Header | None:
    try:
        return read_header(path)
    except (FileNotFoundError, CorruptSnapshotError):
        return None


def _share(sizes: Mapping[str, int], number: int, of: int) -> frozenset[str]:
    """Names of one part: the largest first, each to the part that is the smallest yet."""
    parts = [(0, k) for k in range(1, of + 1)]
    heapify(parts)
    mine = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        total, k = parts[0]
        heapreplace(parts, (total + max(size, 1), k))
        if k == number:
            mine.append(name)
    return frozenset(mine)
