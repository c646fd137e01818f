"""What a sweep over EMA lengths found, as one JSON file that is complete after every length."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from reference_model.checkpoint import RunDirError, write_atomically
from reference_model.metrics import mean_and_error

SWEEP_FILE = "sweep.json"
VERSION = 1


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
    """Scores of one set of weights.

    Attributes:
        sigma_rel: EMA length; ``None`` for the raw weights.
        distances: Fréchet distance of each repeat.
        agreement: Fraction of images of each repeat read as the class asked for.
        read_as: Class as which each of the shown images is read.
        seconds: Time taken.
        from_raw: RMS difference from the raw weights, relative to their RMS; ``None`` for these.
        predicted_error: Relative RMS error that reconstruction predicted of itself; ``None`` for
            raw weights, or where it cannot tell.
        coefficients: Of the snapshots, in the order of the record's ``inputs``.
        direct: Comparison with the average tracked during training, where there is one.
    """

    sigma_rel: float | None
    distances: tuple[float, ...]
    agreement: tuple[float, ...]
    read_as: tuple[int, ...]
    seconds: float
    from_raw: float | None = None
    predicted_error: float | None = None
    coefficients: tuple[float, ...] = ()
    direct: DirectCheck | None = None

    @property
    def distance(self) -> float:
        """Mean distance over repeats."""
        return mean_and_error(self.distances)[0]

    @property
    def error(self) -> float:
        """Standard error of the mean distance; NaN for a single repeat."""
        return mean_and_error(self.distances)[1]


@dataclass
class SweepRecord:
    """All measurements of one run under one protocol.

    Attributes:
        settings: What makes measurements comparable: protocol, judge, time, run.
        unit: Unit of time, for people.
        shown: Class asked for in each of the images that sample sheets show.
        inputs: Time and EMA length of each snapshot used.
        snapshot_bytes: Size of those snapshots.
        real: Distances of real training images, one for each repeat.
        reconstruct_seconds: Time of the last reconstruction, and how many lengths it made.
        machine: Where it was measured.
        measurements: Raw weights first, then by EMA length.
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

    def find(self, sigma_rel: float | None) -> Measurement | None:
        """The measurement of one EMA length (``None``: raw weights), if made already."""
        return next((m for m in self.measurements if m.sigma_rel == sigma_rel), None)

    def add(self, measurement: Measurement) -> None:
        """Insert in order, replacing an earlier one of the same length."""
        others = [m for m in self.measurements if m.sigma_rel != measurement.sigma_rel]
        self.measurements = sorted([*others, measurement], key=lambda m: m.sigma_rel or 0.0)

    @property
    def raw(self) -> Measurement | None:
        """Of the raw weights."""
        return self.find(None)

    @property
    def averages(self) -> list[Measurement]:
        """Of the averages, by EMA length."""
        return [m for m in self.measurements if m.sigma_rel is not None]

    @property
    def best(self) -> Measurement | None:
        """The average with the lowest mean distance."""
        return min(self.averages, key=lambda m: m.distance, default=None)

    def save(self, run_dir: str | os.PathLike[str]) -> None:
        """Replace the run's file; a crash leaves the old one or the new one."""
        data = {"version": VERSION, **asdict(self)}
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        write_atomically(Path(run_dir) / SWEEP_FILE, lambda file: file.write(text.encode()))


def paired_difference(a: Measurement, b: Measurement) -> tuple[float, float]:
    """How much larger a's distance is than b's, and the standard error of that.

    Both were measured with the same seeds, so differences within each repeat vary much less than
    the distances. The error is NaN for a single repeat.
    """
    return mean_and_error(np.subtract(a.distances, b.distances))


def clearly_worse(a: Measurement, b: Measurement) -> bool:
    """Whether a's distance exceeds b's by more than two standard errors of the difference."""
    difference, error = paired_difference(a, b)
    return difference > 2 * error


def load_record(run_dir: str | os.PathLike[str]) -> SweepRecord | None:
    """Read a run's measurements, or return ``None`` where there are none yet.

    Raises:
        RunDirError: If the file cannot be understood.
    """
    path = Path(run_dir) / SWEEP_FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        version = data.pop("version")
        if version != VERSION:
            raise ValueError(f"format version {version}, this package reads {VERSION}")
        data["measurements"] = [_measurement(m) for m in data["measurements"]]
        data["inputs"] = tuple((t, sigma_rel) for t, sigma_rel in data["inputs"])
        for name in ("shown", "real", "reconstruct_seconds"):
            data[name] = tuple(data[name])
        return SweepRecord(**data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirError(f"{path} cannot be read ({error}); remove it to measure again") from error


def differing_settings(old: dict[str, Any], new: dict[str, Any]) -> Sequence[str]:
    """Say in which settings two records differ, as ``protocol.images 500, now 1000``."""
    differences = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            differences += [f"{key}.{text}" for text in differing_settings(before, after)]
        elif before != after:
            differences.append(f"{key} {before}, now {after}")
    return differences


def _measurement(data: dict[str, Any]) -> Measurement:
    direct = data.pop("direct")
    values = {f.name: data[f.name] for f in fields(Measurement) if f.name != "direct"}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    return Measurement(**values, direct=None if direct is None else DirectCheck(**direct))
