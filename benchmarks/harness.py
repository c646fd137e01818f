"""What all benchmarks share: interleaved timing, memory of a process, and a record of the run."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MB = 2**20

_PACKAGES = ("posthoc-ema", "numpy", "scipy", "torch", "safetensors")
_ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round.

    Every round calls each contender once, in a new order: what else the machine does meets all
    of them alike, and none always finds the cache as the same other one left it.
    """
    order = list(contenders)
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            start = clock()
            contenders[name]()
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of one contender's time by the reference's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def anonymous_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is not a file's: what it would need without any page cache."""
    return _status(pid, "RssAnon")


def extra_memory(call: Callable[[], object]) -> int:
    """Largest growth of this process's resident memory during a call, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = _status("self", "VmRSS")
    call()
    return max(_status("self", "VmHWM") - before, 0)


def _status(pid: int | str, key: str) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0  # a process that has ended


def machine() -> dict[str, Any]:
    """What the numbers depend on, as far as the machine can tell."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpus = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = int(file.readline().split()[1]) * 1024
    return {
        "cpu": cpus[0] if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "environment": {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def save(name: str, settings: Mapping[str, Any], started: Mapping[str, Any], results: Any) -> Path:
    """Write raw numbers to ``results/<name>.json``; ``started`` is :func:`machine` at the start."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    record = {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": {**started, "load_average_at_end": os.getloadavg()},
        "settings": dict(settings),
        "results": results,
    }
    text = json.dumps(_rounded(record), indent=1)
    # Lists of numbers on one line each.
    text = re.sub(r"\[\s+([-\d.e,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, columns aligned."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def bar(text: str, value: float, limit: float, *, at_least: bool = False) -> str:
    """One line that compares a figure with the bar set for it."""
    met = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    return f"{'met   ' if met else 'MISSED'}  {text}: {value:.2f} (bar: {sign} {limit:g})"
