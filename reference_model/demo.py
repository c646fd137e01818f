"""The demo: train on the embedded digits, choose the EMA length afterwards, write the report."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reference_model.checkpoint import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    SHARDS,
    SNAPSHOTS,
    STATS_FILE,
    RunDirError,
    start_run,
)
from reference_model.magnitude_log import MAGNITUDES_FILE
from reference_model.presets import preset
from reference_model.protocol import Protocol
from reference_model.report import REPORT_FILE, write_report
from reference_model.run_record import DATA_FILE, STARTS_FILE
from reference_model.sheets import SAMPLES
from reference_model.stats import TENSORBOARD
from reference_model.sweep import sweep
from reference_model.sweep_record import LOCK_FILE, SWEEP_FILE, SweepRecord
from reference_model.sweep_search import SEARCHES
from reference_model.train import train


@dataclass(frozen=True)
class DemoPlan:
    """What a demo trains and measures.

    Attributes:
        preset: Training config by name.
        sigma_rels: EMA lengths; each is also tracked during training, as the truth to compare
            reconstructions with.
        protocol: How each is measured.
    """

    preset: str
    sigma_rels: tuple[float, ...]
    protocol: Protocol


FULL = DemoPlan(
    "digits",
    (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.10, 0.13, 0.16, 0.20, 0.25, 0.28),
    Protocol(images=1000, repeats=4, num_steps=8),
)
QUICK = DemoPlan(
    "digits-tiny",
    (0.03, 0.07, 0.10, 0.20),
    Protocol(images=40, repeats=2, num_steps=2, batch_size=40),
)


def demo(
    run_dir: str | os.PathLike[str],
    *,
    quick: bool = False,
    fresh: bool = False,
    progress: bool = True,
) -> Path:
    """Train, reconstruct, measure and report; continue where an earlier call stopped.

    Args:
        run_dir: Directory of the run.
        quick: A tiny version, in seconds: it shows that everything works, not good images.
        fresh: Remove what an earlier call left in ``run_dir`` first.
        progress: Whether to show progress.

    Returns:
        Path of the report.

    Raises:
        RunDirError: If ``run_dir`` holds another run, or training was interrupted.
    """
    run_dir, plan = Path(run_dir), QUICK if quick else FULL
    if fresh:
        remove_run(run_dir)
    config = replace(preset(plan.preset), direct_sigma_rel=plan.sigma_rels)
    started = time.monotonic()

    def say(text: str) -> None:
        if progress:
            print(text, flush=True)

    steps = config.total_nimg // config.batch_size
    say(f"1/3  Training config G on 8×8 handwritten digits: {steps} steps of {config.batch_size}.")
    try:
        start_run(run_dir, config)
    except RunDirError as error:
        raise RunDirError(f"{error}; or start this one over with --fresh") from error
    nimg = train(config, run_dir, progress=progress)
    if nimg < config.total_nimg:
        raise RunDirError(
            f"training stopped at {nimg:,} of {config.total_nimg:,} images; "
            "run the same command again to go on from there"
        )

    say(
        f"\n2/3  Reconstructing {len(plan.sigma_rels)} EMA lengths from the snapshots, and "
        f"measuring each with {plan.protocol.repeats} × {plan.protocol.images} images."
    )
    record = sweep(run_dir, plan.sigma_rels, plan.protocol, progress=progress)

    say("\n3/3  Writing the report.")
    path = write_report(run_dir)
    for line in closing_words(run_dir, record, path, time.monotonic() - started):
        say(line)
    return path


def closing_words(
    run_dir: Path, record: SweepRecord, report: Path, seconds: float
) -> Sequence[str]:
    """What was found, where it is, and what to type next."""
    best, raw = record.best, record.raw
    assert best is not None  # a sweep measures averages ...
    assert raw is not None  # ... and the raw weights
    minutes, rest = divmod(round(seconds), 60)
    return [
        "",
        f"Best EMA length: σ_rel {best.sigma_rel:g} of training, Fréchet distance "
        f"{best.distance:.3f} ± {best.error:.3f}",
        f"Raw weights:     {raw.distance:.3f} ± {raw.error:.3f}, "
        f"{raw.distance / best.distance:.1f} times as far from real images",
        "",
        f"Open in a browser: {report.resolve()}",
        f"(made in {minutes} min {rest} s)",
        "",
        "Next:",
        f"  python -m reference_model generate --run-dir {run_dir} --sigma-rel {best.sigma_rel:g} "
        f"--classes 0-9 --out {run_dir}/best",
        f"  posthoc-ema error {run_dir}/ema --sigma-rel 0.01,0.02,...,0.25",
        "  and README.md: twelve lines that put this into your own training loop",
    ]


def remove_run(run_dir: Path) -> None:
    """Remove the files of a run, and nothing else that may be in its directory."""
    of_training = (
        CONFIG_FILE,
        DATA_FILE,
        STARTS_FILE,
        CHECKPOINT_FILE,
        STATS_FILE,
        MAGNITUDES_FILE,
    )
    for name in (*of_training, SWEEP_FILE, LOCK_FILE, REPORT_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for pattern in ("classifier-*.safetensors", "reference-*.npz"):
        for path in run_dir.glob(pattern):
            path.unlink()
    for folder in (*(run_dir / n for n in (SNAPSHOTS, SAMPLES, SEARCHES, TENSORBOARD)),
                   *run_dir.glob(f"{SHARDS}*")):  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
