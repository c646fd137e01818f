"""How does the small linear problem behave as snapshots and tracks grow in number?

For each number of times (evenly spaced) and of tracks, and for both methods: the condition
number of the system, the worst error of the combined profile over a range of targets, the
largest sum of magnitudes of the coefficients (it bounds how rounding is amplified), and the time
of a solve. No files, no weights.

    python -m benchmarks.solve_conditioning [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from benchmarks import harness
from posthoc_ema import solve

METHODS = ("kriging", "paper")
TIMES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
TRACKS = {1: (0.10,), 2: (0.05, 0.10), 3: (0.05, 0.10, 0.15)}
TARGETS = tuple(np.linspace(0.05, 0.15, 11))


def measure(times: int, sigma_rels: tuple[float, ...], method: str, repeats: int) -> dict[str, Any]:
    """One cell of the table."""
    inputs = [(k + 1, sigma_rel) for k in range(times) for sigma_rel in sigma_rels]
    targets = [(times, sigma_rel) for sigma_rel in TARGETS]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        solution = solve(inputs, targets, method=method)
        seconds.append(time.perf_counter() - start)
    return {
        "times": times,
        "tracks": len(sigma_rels),
        "method": method,
        "condition_number": float(solution.condition_number.max()),
        "profile_error": float(solution.profile_error.max()),
        "l1_norm": float(solution.l1_norm.max()),
        "sum_error": float(np.abs(solution.coefficients.sum(-1) - 1).max()),
        "seconds": statistics.median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few snapshots, to see that it runs")
    arguments = parser.parse_args()
    started = harness.machine()
    counts = TIMES[:3] if arguments.quick else TIMES
    record = [
        measure(times, sigma_rels, method, arguments.repeats)
        for sigma_rels in TRACKS.values()
        for times in counts
        for method in METHODS
    ]
    head = ["tracks", "times", "method", "condition", "profile error", "Σ|x|", "|Σx - 1|", "ms"]
    rows = [
        [
            r["tracks"],
            r["times"],
            r["method"],
            f"{r['condition_number']:.1e}",
            f"{r['profile_error']:.1e}",
            f"{r['l1_norm']:.2f}",
            f"{r['sum_error']:.0e}",
            f"{1e3 * r['seconds']:.1f}",
        ]
        for r in record
    ]
    print(
        f"targets: σ_rel {TARGETS[0]:g} … {TARGETS[-1]:g} at the last time; worst of them shown\n"
    )
    print(harness.table(head, rows))
    if not arguments.quick:
        settings = {"targets": TARGETS, "repeats": arguments.repeats}
        print(f"\nraw numbers: {harness.save('solve_conditioning', settings, started, record)}")


if __name__ == "__main__":
    main()
