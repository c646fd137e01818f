"""How long does writing one snapshot take, and what memory, beside plain ways to save tensors?

Every contender makes its file durable (fsync), as a snapshot is. The floor is writing as many
bytes from memory, in pieces of 1 MiB. Then all encodings of this library side by side: two tracks
at one time of a moving model, so that the delta encodings predict from what they wrote before.

    python -m benchmarks.snapshot_writing [--dir FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks import harness
from posthoc_ema import EMA
from posthoc_ema.encoding import ENCODINGS

PLAIN = ("float32", "float16", "bfloat16")
REFERENCE = "float16"
FLOOR, OURS = "floor: the same bytes", "posthoc_ema"


def make_model(parameters: int, tensors: int) -> torch.nn.Module:
    size = parameters // tensors
    return torch.nn.ParameterList(
        [torch.nn.Parameter(0.05 * torch.randn(size)) for _ in range(tensors)]
    )


def write_bytes(path: Path, total: int) -> None:
    piece = memoryview(bytearray(os.urandom(1 << 20)))
    with open(path, "wb", buffering=0) as file:
        for start in range(0, total, len(piece)):
            file.write(piece[: total - start])
        os.fsync(file.fileno())


def save_with(
    save: Callable[[dict[str, torch.Tensor], Path], object],
    averages: dict[str, torch.Tensor],
    encoding: str,
    path: Path,
) -> None:
    dtype = getattr(torch, encoding)
    save({name: value.to(dtype) for name, value in averages.items()}, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


class Snapshots:
    """This library; a later time for each call, the file of the last one deleted."""

    def __init__(self, model: torch.nn.Module, encoding: str, folder: Path) -> None:
        self.ema = EMA(0.10, snapshots=folder, encoding=encoding)
        self.model = model

    def prepare(self) -> None:
        self.ema.update(self.model)

    def __call__(self) -> None:
        self.ema.snapshot()

    def clean(self) -> int:
        assert self.ema.store is not None
        return self.ema.store.delete(self.ema.store.list())


def measure(
    model: torch.nn.Module, encoding: str, folder: Path, rounds: int
) -> dict[str, dict[str, Any]]:
    """All contenders in turns; a file is deleted before the next one is written."""
    averages = {name: value.detach().clone() for name, value in model.named_parameters()}
    total = sum(value.numel() for value in averages.values()) * getattr(torch, encoding).itemsize
    snapshots = Snapshots(model, encoding, folder / "snapshots")
    file = folder / "file"
    plain: dict[str, Callable[[], object]] = {
        FLOOR: partial(write_bytes, file, total),
        "torch.save": partial(save_with, torch.save, averages, encoding, file),
        "safetensors.torch.save_file": partial(
            save_with, safetensors.torch.save_file, averages, encoding, file
        ),
    }
    results: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "extra_bytes": []} for name in (FLOOR, OURS, *list(plain)[1:])
    }
    for _ in range(rounds):
        for name, result in results.items():
            call = snapshots if name == OURS else plain[name]
            snapshots.prepare()
            seconds: list[float] = []
            extra = harness.extra_memory(
                lambda call=call, seconds=seconds: seconds.extend(
                    harness.interleave({"call": call}, 1)["call"]
                )
            )
            result["seconds"] += seconds
            result["extra_bytes"].append(extra)
            if name == OURS:
                result["file_bytes"] = snapshots.clean()
            else:
                result["file_bytes"] = file.stat().st_size
                file.unlink()
    return results


def report(encoding: str, results: dict[str, dict[str, Any]]) -> str:
    floor = results[FLOOR]["seconds"]
    rows = [
        [
            name,
            f"{statistics.median(r['seconds']):.2f}",
            f"{r['file_bytes'] / 1e6 / statistics.median(r['seconds']):.0f}",
            f"{harness.ratio(r['seconds'], floor):.2f}",
            f"{max(r['extra_bytes']) / harness.MB:.0f}",
        ]
        for name, r in results.items()
    ]
    size = results[OURS]["file_bytes"] / 1e6
    head = ["contender", "s", "MB/s", "× floor", "MB of memory during"]
    return f"\n{encoding}: one file of {size:.0f} MB\n\n{harness.table(head, rows)}"


@torch.no_grad()
def measure_encodings(
    model: torch.nn.Module, folder: Path, rounds: int
) -> dict[str, dict[str, Any]]:
    """A snapshot of two tracks in each encoding, in turns, at as many times as there are rounds."""
    trackers = {
        encoding: EMA((0.05, 0.10), snapshots=folder / encoding, encoding=encoding)
        for encoding in ENCODINGS
    }
    seconds: dict[str, list[float]] = {encoding: [] for encoding in trackers}
    for round in range(rounds + 2):
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.002)
        for ema in trackers.values():
            ema.update(model, t=1000 * (round + 10))
        calls = {encoding: ema.snapshot for encoding, ema in trackers.items()}
        for encoding, took in harness.interleave(calls, 1, seed=round).items():
            if round >= 2:  # the first are stored whole, or predicted from less
                seconds[encoding] += took
    size = {
        encoding: sum(path.stat().st_size for path in (folder / encoding).glob("*.safetensors"))
        for encoding in trackers
    }
    return {
        encoding: {
            "seconds": took,
            "times_reference": harness.ratio(took, seconds[REFERENCE]),
            "bytes": size[encoding] / (rounds + 2) / sum(p.numel() for p in model.parameters()),
        }
        for encoding, took in seconds.items()
    }


def report_encodings(results: dict[str, dict[str, Any]], bars: bool) -> str:
    rows = [
        [
            encoding,
            f"{statistics.median(r['seconds']):.2f}",
            f"{r['times_reference']:.2f}",
            f"{r['bytes']:.2f}",
        ]
        for encoding, r in results.items()
    ]
    head = ["encoding", "s", f"× {REFERENCE}", "bytes a weight and time"]
    lines = ["\nTwo tracks at one time\n", harness.table(head, rows)]
    if bars:
        slowest = max(r["times_reference"] for r in results.values())
        lines.append(harness.bar(f"slowest encoding × {REFERENCE}", slowest, 3))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    started = harness.machine()
    model = make_model(60_000 if arguments.quick else 50_000_000, 6 if arguments.quick else 300)
    rounds = 1 if arguments.quick else arguments.rounds
    record = {}
    for encoding in PLAIN:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            record[encoding] = measure(model, encoding, Path(folder), rounds)
        print(report(encoding, record[encoding]), flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        record["encodings"] = measure_encodings(model, Path(folder), rounds)
    print(report_encodings(record["encodings"], bars=not arguments.quick))
    if not arguments.quick:
        settings = {"rounds": rounds, "threads": arguments.threads, "seed": 0}
        print(f"\nraw numbers: {harness.save('snapshot_writing', settings, started, record)}")


if __name__ == "__main__":
    main()
