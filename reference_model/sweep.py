"""The paper's central experiment: image quality against EMA length, after training."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from posthoc_ema import EMA, Reconstruction, SnapshotStore, reconstruct
from reference_model.checkpoint import (
    SNAPSHOTS,
    RunDirError,
    load_checkpoint,
    load_config,
    load_network,
)
from reference_model.generate import tile, to_pil
from reference_model.judge import Judge
from reference_model.protocol import Protocol
from reference_model.sampler import generate_images
from reference_model.sweep_record import (
    SWEEP_FILE,
    DirectCheck,
    Measurement,
    SweepRecord,
    differing_settings,
    load_record,
)

SAMPLES = "samples"
REAL = "real"
SHOWN_IMAGES = 60
SHEET_COLUMNS = 10


def sweep(
    run_dir: str | os.PathLike[str],
    sigma_rels: Sequence[float],
    protocol: Protocol | None = None,
    *,
    progress: bool = True,
) -> SweepRecord:
    """Reconstruct EMA lengths of a run in one pass, measure each, and the raw weights.

    Results go to ``run_dir/sweep.json`` after each length and sheets of samples to
    ``run_dir/samples``. Lengths measured there under the same protocol are not measured again.

    Args:
        run_dir: Directory of the run.
        sigma_rels: EMA lengths.
        protocol: What is generated and how.
        progress: Whether to show progress.

    Returns:
        All measurements of the run under this protocol, those of earlier calls included.

    Raises:
        RunDirError: If there is no run, or not yet a checkpoint.
        ValueError: If the protocol asks for too few images.
        posthoc_ema.SnapshotError: If snapshots are missing or damaged.
    """
    run_dir, protocol = Path(run_dir), protocol or Protocol()
    config = load_config(run_dir)
    checkpoint = load_checkpoint(run_dir)
    if checkpoint is None:
        raise RunDirError(f"{run_dir} has no checkpoint yet; train first")
    judge = Judge(config, protocol, run_dir, progress=progress)
    record = _open_record(run_dir, judge, protocol)

    wanted: list[float | None] = [None, *sorted({float(s) for s in sigma_rels})]
    missing = [s for s in wanted if record.find(s) is None]
    lengths = [s for s in missing if s is not None]
    weights: dict[float | None, Reconstruction] = {}
    direct: dict[float, DirectCheck] = {}
    if lengths:
        started = time.monotonic()
        made = reconstruct(run_dir / SNAPSHOTS, lengths, framework="torch", progress=progress)
        weights = dict(zip(lengths, made, strict=True))
        record.reconstruct_seconds = (round(time.monotonic() - started, 3), len(lengths))
        record.inputs = tuple((t, profile.sigma_rel) for t, profile in made[0].inputs)
        tracked = direct_averages(checkpoint, config.direct_sigma_rel)
        checks = {s: r for s, r in weights.items() if s in tracked}
        direct = _check_directly(run_dir, judge, checks, tracked, progress)
    if not record.real:
        record.real = judge.score_real().distances
        _save_sheet(run_dir, REAL, judge.real_images(record.shown))

    total = len(missing) * protocol.repeats * protocol.images
    with tqdm(total=total, desc="measure", unit="img", disable=not progress) as bar:
        for sigma_rel in missing:
            bar.set_postfix_str(label(sigma_rel))
            measurement = _measure(
                run_dir, judge, sigma_rel, weights.get(sigma_rel), checkpoint["net"], direct, bar
            )
            record.add(measurement)
            record.save(run_dir)
            if progress:
                bar.write(_line(measurement), file=sys.stderr)  # stdout is for results
    return record


def label(sigma_rel: float | None) -> str:
    """Name of a set of weights, for people and file names: ``raw`` or ``sigma_rel=0.1``."""
    return "raw" if sigma_rel is None else f"sigma_rel={sigma_rel:g}"


def direct_averages(
    checkpoint: Mapping[str, Any], sigma_rels: Sequence[float]
) -> dict[float, dict[str, Tensor]]:
    """State dicts of the averages that training kept beside the snapshots.

    Args:
        checkpoint: As `load_checkpoint` gives it.
        sigma_rels: `TrainConfig.direct_sigma_rel` of the run.

    Returns:
        Weights by EMA length; what is not averaged is that of the raw weights.
    """
    if not sigma_rels:
        return {}
    ema = EMA(sigma_rels, unit="images")
    ema.load_state_dict(checkpoint["direct"])
    return {s: {**checkpoint["net"], **ema.average(s)} for s in sigma_rels}


def relative_error(weights: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """RMS difference of floating-point tensors of the same names, over the RMS of the truth."""
    names = [name for name, tensor in truth.items() if tensor.is_floating_point()]
    difference = sum(float((weights[n].double() - truth[n].double()).square().sum()) for n in names)
    size = sum(float(truth[n].double().square().sum()) for n in names)
    return float((difference / size) ** 0.5)


def _open_record(run_dir: Path, judge: Judge, protocol: Protocol) -> SweepRecord:
    """Continue the run's record if it was measured under the same settings, else a new one."""
    snapshots = SnapshotStore(run_dir / SNAPSHOTS).list()
    last = snapshots[-1]
    settings = {
        "protocol": asdict(protocol),
        "judge": judge.describe(),
        "t": last.t,
        "snapshots": len(snapshots),
        "run_id": last.run.run_id,
    }
    record = load_record(run_dir)
    if record is not None and record.settings != settings:
        aside = (run_dir / SWEEP_FILE).with_suffix(".old.json")
        os.replace(run_dir / SWEEP_FILE, aside)
        differences = ", ".join(differing_settings(record.settings, settings))
        print(f"Measuring anew: {differences}. The earlier record is {aside}.", file=sys.stderr)
        record = None
    if record is None:
        record = SweepRecord(settings)
    shown = min(SHOWN_IMAGES, protocol.images)
    record.shown = tuple(judge.classes[:shown].tolist())
    record.unit = last.run.unit
    record.snapshot_bytes = sum(s.nbytes for s in snapshots)
    record.machine = describe_machine()
    return record


def _measure(
    run_dir: Path,
    judge: Judge,
    sigma_rel: float | None,
    weights: Reconstruction | None,
    raw: Mapping[str, Tensor],
    direct: Mapping[float, DirectCheck],
    bar: Any,
) -> Measurement:
    net = load_network(run_dir, None if weights is None else weights.state_dict())
    shown: list[tuple[Tensor, Tensor]] = []

    def on_repeat(images: Tensor, read_as: Tensor) -> None:
        if not shown:  # those of the first repeat
            shown.append((images[:SHOWN_IMAGES], read_as[:SHOWN_IMAGES]))
        bar.update(len(images))

    started = time.monotonic()
    score = judge.score(net, on_repeat)
    images, read_as = shown[0]
    _save_sheet(run_dir, label(sigma_rel), images)
    predicted = None if weights is None else weights.predicted_error
    return Measurement(
        sigma_rel,
        score.distances,
        score.agreement,
        tuple(read_as.tolist()),
        seconds=round(time.monotonic() - started, 3),
        from_raw=None if weights is None else relative_error(weights.state_dict(), raw),
        predicted_error=predicted if predicted == predicted else None,  # NaN: cannot tell
        coefficients=() if weights is None else tuple(np.asarray(weights.coefficients).tolist()),
        direct=None if sigma_rel is None else direct.get(sigma_rel),
    )


def _check_directly(
    run_dir: Path,
    judge: Judge,
    made: Mapping[float, Reconstruction],
    tracked: Mapping[float, Mapping[str, Tensor]],
    progress: bool,
) -> dict[float, DirectCheck]:
    """Compare reconstructions with the same averages tracked during training."""
    if not made:
        return {}
    lengths = list(made)
    by_paper = reconstruct(run_dir / SNAPSHOTS, lengths, framework="torch", method="paper")
    seeds = judge.protocol.seeds(0)[:SHOWN_IMAGES]
    options: dict[str, Any] = {"num_steps": judge.protocol.num_steps, "encoder": judge.encoder}
    checks: dict[float, DirectCheck] = {}
    pairs = zip(lengths, by_paper, strict=True)
    bar = tqdm(pairs, desc="compare with tracked averages", total=len(made), disable=not progress)
    for sigma_rel, paper in bar:
        truth = tracked[sigma_rel]
        images = []
        for weights in (made[sigma_rel].state_dict(), truth):
            net = load_network(run_dir, weights)
            classes = torch.arange(len(seeds)) % max(net.config.label_dim, 1)
            labels = classes if net.config.label_dim else None
            images.append(generate_images(net, seeds, labels, **options))
        _save_sheet(run_dir, f"direct_{label(sigma_rel)}", images[1])
        difference = (images[0].double() - images[1].double()).abs().mean()
        checks[sigma_rel] = DirectCheck(
            error=relative_error(made[sigma_rel].state_dict(), truth),
            paper_error=relative_error(paper.state_dict(), truth),
            pixel_difference=float(difference),
        )
    return checks


def _save_sheet(run_dir: Path, name: str, images: Tensor) -> None:
    """Write images side by side without margins, so that a reader can cut them apart again."""
    folder = run_dir / SAMPLES
    folder.mkdir(exist_ok=True)
    to_pil(tile(images, columns=SHEET_COLUMNS, margin=0)).save(folder / f"{name}.png")


def _line(measurement: Measurement) -> str:
    agreement = 100 * sum(measurement.agreement) / len(measurement.agreement)
    return (
        f"  {label(measurement.sigma_rel):<16} distance {measurement.distance:7.3f} "
        f"± {measurement.error:.3f}   read as intended {agreement:5.1f} %"
    )


def describe_machine() -> dict[str, Any]:
    """Processor, threads and versions, for the record."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("posthoc-ema", "torch", "numpy")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
