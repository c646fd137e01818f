"""What a sweep found, as one JSON file that is complete after every point."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from reference_model.checkpoint import RunDirError, write_atomically
from reference_model.metrics import mean_and_error
from reference_model.points import Point

try:
    import fcntl
except ImportError:  # elsewhere than on POSIX, one process at a time
    fcntl = None  # type: ignore[assignment]

SWEEP_FILE = "sweep.json"
LOCK_FILE = "sweep.lock"
VERSION = 2
OLD_VERSIONS = (1,)
DISTANCE = "distance"
"""Measure of images: Fréchet distance to the held-out ones."""
AGREEMENT = "agreement"
"""Measure of images: the fraction that is read as the class asked for."""


@dataclass(frozen=True)
class DirectCheck:
    """A reconstruction against the same average tracked during training.

    Attributes:
        error: RMS difference of the weights over the RMS of the tracked ones.
        paper_error: The same for the paper's least squares instead of kriging.
        pixel_difference: Mean absolute difference of images of the same noise, levels of 255.
    """

    error: float
    paper_error: float
    pixel_difference: float


@dataclass(frozen=True)
class Measurement:
    """Scores of one point.

    Attributes:
        point: What was measured.
        scores: Values by name of the measure, one for each repeat. `DISTANCE` is what sweeps
            minimise; a point of which only the loss was asked for has none.
        read_as: Class as which each of the shown images is read.
        seconds: Time taken.
        from_raw: RMS difference from the raw weights of the same time, relative to their RMS;
            `None` where these are not at hand.
        predicted_error: Relative RMS error that reconstruction predicted of itself; `None` for
            raw weights, or where it cannot tell.
        coefficients: Of the snapshots up to the point's time, in the order of `inputs_at`.
        direct: Comparison with the average tracked during training, where there is one.
    """

    point: Point
    scores: Mapping[str, tuple[float, ...]]
    read_as: tuple[int, ...] = ()
    seconds: float = 0.0
    from_raw: float | None = None
    predicted_error: float | None = None
    coefficients: tuple[float, ...] = ()
    direct: DirectCheck | None = None

    @property
    def sigma_rel(self) -> float | None:
        """EMA length; `None` for the raw weights."""
        return self.point.sigma_rel

    @property
    def distances(self) -> tuple[float, ...]:
        """Fréchet distance of each repeat; empty if not measured."""
        return self.scores.get(DISTANCE, ())

    @property
    def distance(self) -> float:
        """Mean distance over repeats; NaN if not measured."""
        return self.mean(DISTANCE)[0]

    @property
    def error(self) -> float:
        """Standard error of the mean distance; NaN for a single repeat."""
        return self.mean(DISTANCE)[1]

    def mean(self, measure: str) -> tuple[float, float]:
        """Mean over repeats and its standard error; NaN for what is not known."""
        values = self.scores.get(measure, ())
        return mean_and_error(values) if values else (nan, nan)


@dataclass
class SweepRecord:
    """All measurements of one run under one protocol.

    Attributes:
        settings: What makes measurements comparable: "protocol", "run_id", and "judge", which is
            `None` as long as nothing but losses was measured.
        unit: Unit of time, for people.
        shown: Class asked for in each of the images that sample sheets show.
        inputs: Time and EMA length of each snapshot, in order of time.
        snapshot_bytes: Size of those snapshots.
        real: Distances of real training images, one for each repeat.
        reconstruct_seconds: Time of the last reconstruction, and how many lengths it made.
        machine: Where it was measured.
        measurements: In the order of `Point.order`.
    """

    settings: dict[str, Any]
    unit: str = ""
    shown: tuple[int, ...] = ()
    inputs: tuple[tuple[float, float], ...] = ()
    snapshot_bytes: int = 0
    real: tuple[float, ...] = ()
    reconstruct_seconds: tuple[float, int] = (0.0, 0)
    machine: dict[str, Any] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)

    def find(self, point: Point) -> Measurement | None:
        """The measurement of a point, if there is one."""
        return next((m for m in self.measurements if m.point == point), None)

    def has(self, point: Point, measure: str) -> bool:
        """Whether a point was measured by this measure."""
        found = self.find(point)
        return found is not None and measure in found.scores

    def add(self, measurement: Measurement) -> Measurement:
        """Insert in order; scores of the same point by other measures are kept.

        Returns:
            What the record now holds of the point.
        """
        found = self.find(measurement.point)
        if found is not None:
            # Images tell more than the loss: what they told is kept.
            seen = measurement if DISTANCE in measurement.scores else found
            measurement = replace(
                seen,
                scores={**found.scores, **measurement.scores},
                seconds=found.seconds + measurement.seconds,
            )
            self.measurements.remove(found)
        self.measurements = sorted([*self.measurements, measurement], key=lambda m: m.point.order)
        return measurement

    @property
    def imaged(self) -> list[Measurement]:
        """What has a distance."""
        return [m for m in self.measurements if m.distances]

    @property
    def times(self) -> list[float]:
        """Times at which averages were measured, early first."""
        found = {m.point.t for m in self.imaged if m.point.plain and m.sigma_rel is not None}
        return sorted(found)

    @property
    def end(self) -> float:
        """The latest time at which averages were measured; NaN if none were."""
        return self.times[-1] if self.times else nan

    def curve(self, t: float) -> list[Measurement]:
        """Averages of one time without guidance, by EMA length."""
        plain = [m for m in self.imaged if m.point.plain and m.point.t == t]
        return [m for m in plain if m.sigma_rel is not None]

    @property
    def averages(self) -> list[Measurement]:
        """The curve of the latest time."""
        return self.curve(self.end)

    @property
    def raw(self) -> Measurement | None:
        """Of the raw weights at the latest time."""
        return self.find(Point(None, self.end))

    @property
    def best(self) -> Measurement | None:
        """The average with the lowest mean distance at the latest time, unguided."""
        return min(self.averages, key=lambda m: m.distance, default=None)

    @property
    def guided(self) -> list[Measurement]:
        """Guided averages of the latest time."""
        found = [m for m in self.imaged if m.point.guide is not None and not m.point.changed]
        return [m for m in found if m.point.t == self.end]

    @property
    def best_of_all(self) -> Measurement | None:
        """The lowest mean distance of the latest time, guided or not."""
        return min([*self.averages, *self.guided], key=lambda m: m.distance, default=None)

    @property
    def measures(self) -> list[str]:
        """Names of all measures that any point was measured by."""
        return list(dict.fromkeys(name for m in self.measurements for name in m.scores))

    def inputs_at(self, t: float) -> list[tuple[float, float]]:
        """Time and EMA length of each snapshot that an average at `t` is made from."""
        return [(time, sigma_rel) for time, sigma_rel in self.inputs if time <= t]

    def save(self, run_dir: str | os.PathLike[str]) -> None:
        """Replace the run's file; a crash leaves the old one or the new one."""
        data = {"version": VERSION, **asdict(self)}
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        write_atomically(Path(run_dir) / SWEEP_FILE, lambda file: file.write(text.encode()))


def paired_difference(
    a: Measurement, b: Measurement, measure: str = DISTANCE
) -> tuple[float, float]:
    """How much larger a's score is than b's, and the standard error of that.

    Both were measured with the same seeds, so differences within each repeat vary much less than
    the scores. The error is NaN for a single repeat.
    """
    return mean_and_error(np.subtract(a.scores[measure], b.scores[measure]))


def clearly_worse(a: Measurement, b: Measurement) -> bool:
    """Whether a's distance exceeds b's by more than two standard errors of the difference."""
    difference, error = paired_difference(a, b)
    return difference > 2 * error


def load_record(run_dir: str | os.PathLike[str]) -> SweepRecord | None:
    """Read a run's measurements, or return ``None`` where there are none yet.

    A record of an older format is set aside beside the run's other files, with a line that says
    so: it lacks what later ones hold.

    Raises:
        RunDirError: If the file cannot be understood.
    """
    path = Path(run_dir) / SWEEP_FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        version = data.pop("version")
        if version in OLD_VERSIONS:
            set_aside(path, f"format version {version}, now {VERSION}")
            return None
        if version != VERSION:
            raise ValueError(f"format version {version}, this package reads {VERSION}")
        data["measurements"] = [_measurement(m) for m in data["measurements"]]
        data["inputs"] = tuple((t, sigma_rel) for t, sigma_rel in data["inputs"])
        for name in ("shown", "real", "reconstruct_seconds"):
            data[name] = tuple(data[name])
        return SweepRecord(**data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirError(f"{path} cannot be read ({error}); remove it to measure again") from error


def save_together(record: SweepRecord, run_dir: str | os.PathLike[str]) -> None:
    """Save a record, with what other processes have measured of the same run meanwhile.

    Args:
        record: To save; it takes in what the file holds beyond it, under the same settings.
        run_dir: Directory of the run.
    """
    with (Path(run_dir) / LOCK_FILE).open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process ends
        theirs = load_record(run_dir)
        if theirs is not None and not differing_settings(theirs.settings, record.settings):
            if record.settings["judge"] is None:  # another process has judged images
                record.settings, record.shown = theirs.settings, theirs.shown
                record.real = theirs.real
            for m in theirs.measurements:
                own = record.find(m.point)
                # What is known of a point from both is the same, up to the time it took.
                if own is None or not set(m.scores) <= set(own.scores):
                    record.add(m)
        record.save(run_dir)


def set_aside(path: Path, reason: str) -> None:
    """Keep a record that cannot be continued, under a name that is free, and say so."""
    aside = path.with_suffix(".old.json")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_suffix(f".old{number}.json")
    os.replace(path, aside)
    print(f"Measuring anew: {reason}. The earlier record is {aside}.", file=sys.stderr)


def differing_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in which settings two records differ, as ``protocol.images 500, now 1000``.

    A record that has no judge yet differs by that from no other.
    """
    differences = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if key == "judge" and None in (before, after):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            differences += [f"{key}.{text}" for text in differing_settings(before, after)]
        elif before != after:
            differences.append(f"{key} {before}, now {after}")
    return differences


def _measurement(data: dict[str, Any]) -> Measurement:
    values = {f.name: data[f.name] for f in fields(Measurement)}
    for name in ("read_as", "coefficients"):
        values[name] = tuple(values[name])
    direct = values["direct"]
    return Measurement(
        **{
            **values,
            "point": Point.from_dict(values["point"]),
            "scores": {name: tuple(scores) for name, scores in values["scores"].items()},
            "direct": None if direct is None else DirectCheck(**direct),
        }
    )
