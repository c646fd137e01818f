"""Small stores to damage, and a hand that rewrites snapshot files by their documented format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from posthoc_ema import EMA, Snapshot, SnapshotStore

KEY = "posthoc_ema"


def small_store(folder: Path, encoding: str = "float32", seed: int = 0) -> Path:
    """Four times of two tracks; averaged and copied tensors of several sizes."""
    rng = np.random.default_rng(seed)
    w, v = rng.normal(size=(9, 5)), rng.normal(size=300)
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=folder, every=3, encoding=encoding)
    for step in range(1, 13):
        w, v = w + 0.1 * rng.normal(size=w.shape), v + 0.1 * rng.normal(size=v.shape)
        ema.update(
            {
                "v": v.astype(np.float32),
                "w": w.astype(np.float32),
                "step": np.array([step]),
                "mask": np.array([True, False, True]),
            }
        )
    return folder


@dataclass
class Contents:
    """A snapshot file taken apart: metadata, and tensors in the order of their bytes."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[str, list[int], bytes]] = field(default_factory=dict)


def take_apart(path: Path) -> Contents:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = json.loads(header.pop("__metadata__")[KEY])
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = {}
    for name, entry in entries:
        first, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], raw[start + first : start + end])
    return Contents(metadata, tensors)


def put_together(path: Path, contents: Contents) -> None:
    """Write a file whose digests are right, whatever it holds."""
    averages = {name for name, _ in contents.metadata["averages"]}
    parts = {"averages": b"", "copies": b""}
    table: dict[str, Any] = {}
    offset, data = 0, b""
    for name, (dtype, shape, payload) in contents.tensors.items():
        part = "averages" if name in averages else "copies"
        parts[part] += payload
        end = offset + len(payload)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset, data = end, data + payload
    digest = {part: piece_digest(payload) for part, payload in parts.items()}
    metadata = {**contents.metadata, "digest": digest}
    rows = [[name, dtype, *shape] for name, (dtype, shape, _) in contents.tensors.items()]
    digest["header"] = xxhash.xxh3_128_hexdigest(canonical([metadata, rows]).encode())
    header = json.dumps({"__metadata__": {KEY: canonical(metadata)}, **table}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def piece_digest(data: bytes) -> str:
    """As the format describes it."""
    pieces = [data[k : k + 2**19] for k in range(0, len(data), 2**19)]
    numbers = [*(xxhash.xxh3_64_intdigest(piece) for piece in pieces), len(data)]
    return xxhash.xxh3_128_hexdigest(b"".join(n.to_bytes(8, "little") for n in numbers))


def canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def rewrite(path: Path, change: Callable[[Contents], None]) -> None:
    """Change a file so that its digests agree with what it holds now."""
    contents = take_apart(path)
    change(contents)
    put_together(path, contents)


def set_tensor(contents: Contents, name: str, values: NDArray[Any]) -> None:
    """Replace the values of a tensor, keeping its stored type."""
    dtype, _, _ = contents.tensors[name]
    kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]
    contents.tensors[name] = (dtype, list(values.shape), values.astype(kind).tobytes())


def payload_start(snapshot: Snapshot) -> int:
    return min(entry.offset for entry in snapshot.entries.values())


def damage(path: Path, position: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def last_of(folder: Path) -> Snapshot:
    return SnapshotStore(folder).list()[-1]
