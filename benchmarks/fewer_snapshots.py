"""How many snapshots make up an average, and what does it cost to leave out the others?

The training runs of ``reconstruct_accuracy``, of which the true averages are known. Each is
reconstructed from all snapshots, and with the slack that large runs have by default. Printed: how
many snapshots then count, how many files are read for them (differences need those before), and
the true error over that of using all.

    python -m benchmarks.fewer_snapshots --dir FOLDER [--quick]

The folder keeps what was recorded while training (1 GB), so that a second call does not train.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.reconstruct_accuracy import UNSTORED, relative_error
from benchmarks.trajectories import TARGETS, Recording, of_each_run
from posthoc_ema import SnapshotStore, reconstruct
from posthoc_ema.chain import with_inputs
from posthoc_ema.choice import SLACK

TIMES = (8, 16, 32)
ENCODINGS = ("float16", "delta8")


@dataclass(frozen=True)
class Choice:
    """One average of one run.

    Attributes:
        run: Name of the run.
        times: Number of snapshot times, of two snapshots each.
        encoding: Of the store.
        sigma_rel: EMA length.
        count: How many snapshots have a coefficient.
        read: How many files are read.
        ratio: True error over that of using all snapshots.
    """

    run: str
    times: int
    encoding: str
    sigma_rel: float
    count: int
    read: int
    ratio: float


def measure_run(name: str, folder: Path, numbers: Sequence[int], steps: int | None) -> list[Choice]:
    """All of one run; trains it first if the folder does not hold it."""
    from benchmarks.training_runs import RUNS

    recording = Recording.of(
        RUNS[name] if steps is None else replace(RUNS[name], steps=steps), folder
    )
    found = []
    for number in numbers:
        for encoding in ENCODINGS:
            with tempfile.TemporaryDirectory() as path:
                found += _choices(name, recording, recording.write(Path(path), number, encoding))
    return found


def _choices(name: str, recording: Recording, store: SnapshotStore) -> list[Choice]:
    snapshots = store.list()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some lengths are beyond what so few snapshots support
        every, fewer = (
            reconstruct(store, UNSTORED, slack=slack, framework="numpy", progress=False)
            for slack in (0, SLACK)
        )
    found = []
    for sigma_rel, a, b in zip(UNSTORED, every, fewer, strict=True):
        true = recording.true[-1, TARGETS.index(sigma_rel)]
        errors = [relative_error(recording.join(r.params), true) for r in (a, b)]
        used = [s for s, x in zip(snapshots, b.coefficients, strict=True) if x]
        found.append(
            Choice(
                name,
                len(snapshots) // 2,
                snapshots[0].encoding,
                sigma_rel,
                len(used),
                len(with_inputs(used)),
                errors[1] / errors[0],
            )
        )
    return found


def report(choices: Sequence[Choice]) -> str:
    """Means over the runs by length, and the ratios over everything."""
    rows = []
    for encoding in ENCODINGS:
        for times in sorted({c.times for c in choices}):
            chosen = [c for c in choices if (c.encoding, c.times) == (encoding, times)]
            cells = []
            for sigma_rel in UNSTORED:
                of_length = [c for c in chosen if c.sigma_rel == sigma_rel]
                count, read = (
                    np.mean([getattr(c, key) for c in of_length]) for key in ("count", "read")
                )
                cells.append(f"{count:.0f}" if count == read else f"{count:.0f} ({read:.0f})")
            ratios = [c.ratio for c in chosen]
            spread = [f"{np.mean(ratios):.4f}", f"{min(ratios):.3f} … {max(ratios):.3f}"]
            rows.append([encoding, 2 * times, *cells, *spread])
    lengths = [f"{s:g}" for s in UNSTORED]
    head = ["encoding", "snapshots", *lengths, "error ÷ that of all", "smallest … largest"]
    return (
        f"Snapshots that count (files read, where more) within a slack of {SLACK:g}, mean over "
        f"{len({c.run for c in choices})} runs, by EMA length\n\n{harness.table(head, rows)}"
    )


def main() -> None:
    from benchmarks.training_runs import RUNS

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, help="where recordings are kept (default: nowhere)")
    parser.add_argument("--quick", action="store_true", help="two short runs, to see that it works")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    started = harness.machine()
    runs, numbers = (list(RUNS)[:2], TIMES[:1]) if arguments.quick else (list(RUNS), TIMES)
    steps = 64 if arguments.quick else None
    one = partial(measure_run, numbers=numbers)
    measured = of_each_run(one, runs, arguments.dir, steps, arguments.workers)
    choices = [c for of_run in measured for c in of_run]
    print(report(choices))
    if not arguments.quick:
        record = {
            f"{c.run} {c.times} {c.encoding} {c.sigma_rel:g}": [c.count, c.read, c.ratio]
            for c in choices
        }
        path = harness.save("fewer_snapshots", {"slack": SLACK, "runs": runs}, started, record)
        print(f"\nraw numbers: {path}")


if __name__ == "__main__":
    main()
