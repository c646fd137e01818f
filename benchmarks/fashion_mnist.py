"""What does the EMA length decide on real data?

Measures a trained run of the reference model on Fashion-MNIST: Fréchet distance against EMA length,
the same at earlier times in training, guidance by another average of the same run, and single
groups of tensors of another length; all from the snapshots of one training run.

    python -m reference_model train --preset fashion --data FOLDER --run-dir runs/fashion
    python -m benchmarks.fashion_mnist --run-dir runs/fashion [--part curve ...] [--quick]

About three quarters of an hour on two cores after training, in proportion to --num-steps.
Interrupt at will: the same command goes on. What it measures is in the run's own sweep.json, so
that `python -m reference_model report` shows it too.
The figures are drawn by `python -m benchmarks.fashion_figures --run-dir runs/fashion`.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# Before torch loads, as `python -m reference_model` does: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks import harness
from reference_model.held_out_loss import LOSS
from reference_model.points import grid
from reference_model.protocol import Protocol
from reference_model.report import write_report
from reference_model.sweep import Sweep
from reference_model.sweep_grids import Guides, given_times, guided_grid, sensitivity_grid
from reference_model.sweep_record import DISTANCE, SweepRecord

PROTOCOL = Protocol()
"""That of `python -m reference_model sweep`, which can so go on with the same record."""
LENGTHS = (0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.09, 0.11, 0.13, 0.16, 0.20, 0.25, 0.28)
FEWER = (0.02, 0.05, 0.09, 0.16, 0.25)
EARLIER = (0.25, 0.5)
"""Times, as fractions of training."""
MAINS, STRENGTHS, GUIDE = (0.03, 0.07, 0.13), (1.0, 1.5, 2.0), 0.25
"""EMA lengths that are guided, how much, and the length of the guide."""
PARTS = ("curve", "times", "guidance", "tensors")


def measure(run: Sweep, parts: tuple[str, ...], quick: bool) -> SweepRecord:
    """Measure the parts asked for; what the run's record holds is not measured again."""
    lengths, fewer, mains = (FEWER[1:4], FEWER[1:4], MAINS[1:2]) if quick else (
        LENGTHS, FEWER, MAINS)  # fmt: skip
    if "curve" in parts:
        run.measure([run.raw, *grid(lengths, [run.end])])
    if "times" in parts:
        run.measure(grid(fewer, [*given_times(run, EARLIER), run.end]))
    if "guidance" in parts:
        run.measure(guided_grid(run, mains, [run.end], Guides(STRENGTHS, (GUIDE,))))
    if "tensors" in parts:
        run.measure(sensitivity_grid(run, None), by=LOSS)
    return run.record


def rows(record: SweepRecord) -> list[dict[str, Any]]:
    """Everything measured, as plain data."""
    return [
        {
            "sigma_rel": m.sigma_rel,
            "t": round(m.point.t),
            "guide": m.point.guide
            and {
                "guidance": m.point.guide.guidance,
                "sigma_rel": m.point.guide.sigma_rel,
                "t": round(m.point.guide.t),
            },
            "changed": dict(m.point.changed),
            "scores": m.scores,
            "predicted_error": m.predicted_error,
            "seconds": m.seconds,
        }
        for m in record.measurements
    ]


def report(record: SweepRecord) -> str:
    """The curve as a table."""
    raw = [] if record.raw is None else [record.raw]
    cells = [
        [
            "raw" if m.sigma_rel is None else f"{m.sigma_rel:g}",
            f"{m.distance:.3f} ± {m.error:.3f}",
            "–" if m.predicted_error is None else f"{100 * m.predicted_error:.2g} %",
            "best" if m is record.best else "",
        ]
        for m in [*raw, *record.averages]
    ]
    return harness.table(["σ_rel", "Fréchet distance", "predicted error", ""], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="a trained run")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--num-steps", type=int, default=PROTOCOL.num_steps, help="of the solver")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    arguments = parser.parse_args()
    started = harness.machine()
    protocol = replace(PROTOCOL, num_steps=arguments.num_steps)
    if arguments.quick:
        protocol = Protocol(images=40, repeats=2, num_steps=2)
    run = Sweep(arguments.run_dir, protocol)
    record = measure(run, tuple(arguments.part), arguments.quick)
    print(report(record))
    print(f"\nWrote {write_report(arguments.run_dir)}")
    if not arguments.quick:
        settings = {
            "protocol": asdict(protocol),
            "train": run.config.to_dict(),
            "judge": record.settings["judge"],
            "snapshots": len(record.inputs),
            "snapshot_bytes": record.snapshot_bytes,
        }
        results = {"real": {DISTANCE: record.real}, "rows": rows(record)}
        print(f"Wrote {harness.save('fashion_mnist', settings, started, results)}")


if __name__ == "__main__":
    main()
