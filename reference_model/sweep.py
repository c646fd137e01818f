"""The paper's central experiment: image quality against EMA length, after training."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from posthoc_ema import Reconstruction, SnapshotStore
from reference_model.averages import MAX_BYTES, Averages, Weights, check_guide
from reference_model.checkpoint import (
    SNAPSHOTS,
    RunDirError,
    load_checkpoint,
    load_config,
    load_network,
)
from reference_model.direct_check import check_directly, direct_averages, relative_error
from reference_model.held_out_loss import LOSS, LossMeter
from reference_model.judge import Judge
from reference_model.machine import describe_machine
from reference_model.points import Point, grid
from reference_model.protocol import Protocol
from reference_model.sheets import REAL, SHOWN_IMAGES, save_sheet
from reference_model.sweep_record import (
    AGREEMENT,
    DISTANCE,
    SWEEP_FILE,
    DirectCheck,
    Measurement,
    SweepRecord,
    differing_settings,
    load_record,
    save_together,
    set_aside,
)


def sweep(
    run_dir: str | os.PathLike[str],
    sigma_rels: Sequence[float],
    protocol: Protocol | None = None,
    *,
    progress: bool = True,
) -> SweepRecord:
    """Measure EMA lengths of a run at its end, and the raw weights.

    Args:
        run_dir: Directory of the run.
        sigma_rels: EMA lengths.
        protocol: What is generated and how.
        progress: Whether to show progress.

    Returns:
        All measurements of the run under this protocol, those of earlier calls included.

    Raises:
        RunDirError: As :class:`Sweep`, like further errors.
    """
    run = Sweep(run_dir, protocol, progress=progress)
    return run.measure([run.raw, *grid(sigma_rels, [run.end])])


class Sweep:
    """Points of one run, measured one by one and recorded as they come.

    Results go to ``run_dir/sweep.json`` after each point and sheets of samples to
    ``run_dir/samples``. What is recorded there under the same protocol is not measured again,
    whichever call measured it; a kill loses the point that was being measured. Several processes
    may measure one run at the same time.

    Args:
        run_dir: Directory of a finished or running run.
        protocol: What is generated and how.
        max_bytes: Bound on the averages held at a time.
        progress: Whether to show progress.
        images: Whether images will be measured; `False`: losses alone, for which nothing that
            judges images is made or needed.

    Attributes:
        record: All measurements of the run under this protocol.
        raw: The raw weights of the latest checkpoint.
        end: Time of the last snapshot.

    Raises:
        RunDirError: If there is no run, or not yet a checkpoint.
        ValueError: If the protocol asks for too few images.
        posthoc_ema.SnapshotError: If snapshots are missing or damaged.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        protocol: Protocol | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        progress: bool = True,
        images: bool = True,
    ) -> None:
        self.run_dir, self.protocol = Path(run_dir), protocol or Protocol()
        self.max_bytes, self.progress = max_bytes, progress
        self.config = load_config(run_dir)
        checkpoint = load_checkpoint(run_dir)
        if checkpoint is None:
            raise RunDirError(f"{run_dir} has no checkpoint yet; train first")
        # Of one reading: a run that goes on replaces the file.
        self._raw_weights: Mapping[str, Tensor] = checkpoint["net"]
        self.raw = Point(None, checkpoint["nimg"])
        self._judge: Judge | None = None
        self._tracked: dict[float, dict[str, Tensor]] = {}
        if images:
            self._judge = Judge(self.config, self.protocol, self.run_dir, progress=progress)
            self._tracked = direct_averages(checkpoint, self.config.direct_sigma_rel)
        self.record = _open_record(self.run_dir, self.protocol, self._judge)
        self.end = self.record.inputs[-1][0]
        tracked = [Weights(self.run_dir, s, self.end) for s in self._tracked]
        self._by_paper = Averages(tracked, max_bytes, method="paper")

    @cached_property
    def _loss(self) -> LossMeter:
        return LossMeter(self.config, self.protocol)

    def measure(self, points: Iterable[Point], *, by: str = DISTANCE) -> SweepRecord:
        """Measure what the record does not hold yet.

        Args:
            points: What to measure.
            by: `DISTANCE`: images, by everything that the judge looks at; or `LOSS`: the
                denoising error on held-out images, which needs no sampling.

        Returns:
            The record, complete.

        Raises:
            ValueError: If a point lies outside the snapshots, a guide does not fit, raw weights of
                another time than the checkpoint's are asked for, or images of a sweep of losses.
        """
        if by == DISTANCE and self._judge is None:
            raise ValueError("this sweep was opened for losses alone (images=False)")
        missing = [p for p in dict.fromkeys(points) if not self.record.has(p, by)]
        for point in missing:
            self._check(point)
            if by == LOSS and point.guide is not None:
                raise ValueError("guidance changes samples, not the loss; measure the distance")
        if missing and by == LOSS:
            _ = self._loss  # refuses what cannot be measured, before averages are made
        upcoming = [w for p in missing for w in self.needs(p)]
        averages = Averages(upcoming, self.max_bytes, progress=self.progress)
        with self.bar(len(missing)) as bar:
            for point in missing:
                made = averages.get(*self.needs(point))
                if self.record.has(point, by):  # by another process, meanwhile
                    continue
                if made and point.plain:
                    self.record.reconstruct_seconds = averages.last_pass
                self.measure_made(point, made, bar, by=by)
        return self.record

    def measure_made(
        self, point: Point, made: Sequence[Reconstruction], bar: Any, *, by: str = DISTANCE
    ) -> Measurement:
        """Measure and record one point whose averages are at hand.

        Args:
            point: What to measure.
            made: Its averages, as :meth:`needs` lists them.
            bar: Progress, counted in images.
            by: As for :meth:`measure`.
        """
        bar.set_postfix_str(point.describe(self.end))
        started = time.monotonic()
        read_as: tuple[int, ...] = ()
        direct = None
        if by == DISTANCE and self._judge is not None:
            if not self.record.real:
                self.record.real = self._judge.score_real().distances
                save_sheet(self.run_dir, REAL, self._judge.real_images(self.record.shown))
            scores, read_as = self._score_images(self._judge, point, made, bar)
            direct = self._check_directly(self._judge, point, made)
        else:
            net = load_network(self.run_dir, self._weights(point, made))
            scores = {LOSS: self._loss.measure(net, bar.update)}
        # Of weights that differ in some tensors, or are guided, these say nothing new.
        weights = made[0] if made and point.plain else None
        predicted = None if weights is None else weights.predicted_error
        measurement = Measurement(
            point,
            scores,
            read_as,
            seconds=round(time.monotonic() - started, 3),
            from_raw=relative_error(weights.state_dict(), self._raw_weights)
            if weights is not None and point.t == self.raw.t
            else None,
            predicted_error=predicted if predicted == predicted else None,  # NaN: cannot tell
            coefficients=()
            if weights is None
            else tuple(np.asarray(weights.coefficients).tolist()),
            direct=direct,
        )
        recorded = self.record.add(measurement)
        save_together(self.record, self.run_dir)
        if self.progress:  # stdout is for results
            bar.write(f"  {_line(recorded, by, self.end)}", file=sys.stderr)
        return recorded

    def needs(self, point: Point) -> list[Weights]:
        """What a point is made from: its own average, those of changed tensors, the guide's."""
        lengths = [length for _, length in point.changed]
        own = [] if point.sigma_rel is None else [point.sigma_rel, *lengths]
        needed = [Weights(self.run_dir, s, point.t) for s in own]
        if point.guide is not None:
            guide = point.guide
            needed.append(Weights(Path(guide.run_dir or self.run_dir), guide.sigma_rel, guide.t))
        return needed

    def bar(self, points: int) -> Any:
        """A progress bar for measuring so many points."""
        total = points * self.protocol.repeats * self.protocol.images
        return tqdm(total=total, desc="measure", unit="img", disable=not (self.progress and points))

    def _check(self, point: Point) -> None:
        if point.sigma_rel is None and point.t != self.raw.t:
            raise ValueError(
                f"raw weights are kept at the last checkpoint alone, after {self.raw.t:,.0f} "
                f"images (asked for: {point.t:,.0f})"
            )
        first = self.record.inputs[0][0]
        if point.sigma_rel is not None and not first <= point.t <= self.end:
            raise ValueError(
                f"there are snapshots from {first:,.0f} to {self.end:,.0f} images (asked for an "
                f"average after {point.t:,.0f})"
            )
        if point.guide is not None:
            check_guide(self.needs(point)[-1], self.config)

    def _weights(self, point: Point, made: Sequence[Reconstruction]) -> Mapping[str, Tensor]:
        """State dict of a point."""
        if point.sigma_rel is None:
            return self._raw_weights
        weights = made[0].state_dict()
        changes = zip(point.changed, made[1:], strict=False)  # a guide may follow
        # The first match decides, so it is written last.
        for (pattern, _), other in reversed(list(changes)):
            weights |= {n: w for n, w in other.state_dict().items() if fnmatchcase(n, pattern)}
        return weights

    def _score_images(
        self, judge: Judge, point: Point, made: Sequence[Reconstruction], bar: Any
    ) -> tuple[dict[str, tuple[float, ...]], tuple[int, ...]]:
        """Scores of a point's images, and how the shown ones are read; their sheet is saved."""
        shown: list[tuple[Tensor, Tensor]] = []

        def on_repeat(images: Tensor, read_as: Tensor) -> None:
            if not shown:  # those of the first repeat
                shown.append((images[:SHOWN_IMAGES], read_as[:SHOWN_IMAGES]))
            bar.update(len(images))

        net = load_network(self.run_dir, self._weights(point, made))
        options: dict[str, Any] = {}
        if point.guide is not None:
            gnet = load_network(self.needs(point)[-1].run_dir, made[-1].state_dict())
            options = {
                "gnet": gnet,
                "guidance": point.guide.guidance,
                "guidance_interval": point.guide.interval,
            }
        score = judge.score(net, on_repeat, **options)
        images, read_as = shown[0]
        save_sheet(self.run_dir, point.label, images)
        scores = {DISTANCE: score.distances, AGREEMENT: score.agreement}
        known = {name: values for name, values in {**scores, **score.more}.items() if values}
        return known, tuple(read_as.tolist())

    def _check_directly(
        self, judge: Judge, point: Point, made: Sequence[Reconstruction]
    ) -> DirectCheck | None:
        """Compare with the average that training tracked, if it did and this is of its time."""
        kept = point.t == self.end == self.raw.t and point.sigma_rel in self._tracked
        if not (point.plain and kept and point.sigma_rel is not None):
            return None
        (paper,) = self._by_paper.get(Weights(self.run_dir, point.sigma_rel, point.t))
        check, images = check_directly(
            self.run_dir,
            judge,
            made[0].state_dict(),
            paper.state_dict(),
            self._tracked[point.sigma_rel],
            SHOWN_IMAGES,
        )
        save_sheet(self.run_dir, f"direct_{point.label}", images)
        return check


def _open_record(run_dir: Path, protocol: Protocol, judge: Judge | None) -> SweepRecord:
    """Continue the run's record if it was measured under the same settings, else a new one."""
    snapshots = SnapshotStore(run_dir / SNAPSHOTS).list()
    last = snapshots[-1]
    settings = {
        "protocol": asdict(protocol),
        "judge": None if judge is None else judge.describe(),
        "run_id": last.run.run_id,
    }
    inputs = tuple((float(s.t), s.profile.sigma_rel) for s in snapshots)
    record = load_record(run_dir)
    if record is not None:
        differences = list(differing_settings(record.settings, settings))
        # A run that went on has more snapshots; others mean that averages are made otherwise.
        if record.inputs != inputs[: len(record.inputs)]:
            differences.append(f"snapshots {len(record.inputs)}, now others of {len(inputs)}")
        if differences:
            set_aside(run_dir / SWEEP_FILE, ", ".join(differences))
            record = None
    if record is None:
        record = SweepRecord(settings)
    if judge is not None:
        record.settings = settings
        record.shown = tuple(judge.classes[: min(SHOWN_IMAGES, protocol.images)].tolist())
    record.unit = last.run.unit
    record.inputs = inputs
    record.snapshot_bytes = sum(s.nbytes for s in snapshots)
    record.machine = describe_machine()
    return record


def _line(measurement: Measurement, by: str, end: float) -> str:
    mean, error = measurement.mean(by)
    known = f" ± {error:.4f}" if error == error else ""  # NaN: of a single repeat
    return f"{measurement.point.describe(end):<28} {by} {mean:8.4f}{known}"
