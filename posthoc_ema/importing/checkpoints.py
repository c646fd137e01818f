"""Plain checkpoints: listed in a CSV with their times and profiles, or numbered by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from posthoc_ema.errors import SnapshotError
from posthoc_ema.importing.foreign import ForeignRun, ForeignSnapshot, Options
from posthoc_ema.importing.state_dict import checkpoint_files, read_checkpoint
from posthoc_ema.profile_text import parse_profile
from posthoc_ema.profiles import PowerFunction, Profile

LISTED, NUMBERED = "list", "checkpoints"
_AFTER_STEP = re.compile(r"step[^0-9]*(\d+)", re.IGNORECASE)
_LAST_NUMBER = re.compile(r"(\d+)(?!.*\d)")


def read_numbered(checkpoints: Sequence[Path], options: Options) -> ForeignRun:
    """Checkpoints whose names hold their time: after ``step``, else the last number.

    Raises:
        SnapshotError: If a name holds none, or nothing says how they average.
    """
    if options.profile is None:
        raise SnapshotError(
            f"{checkpoints[0].parent} holds checkpoints that do not say how they average: give "
            "profile=, --profile raw (weights as they were trained), exponential:beta=0.9999 or "
            "power:sigma_rel=0.05; or list them in a CSV with the columns file, t, profile"
        )
    return ForeignRun(
        NUMBERED,
        options.unit or "steps",
        [_snapshot(path, _number(path), options.profile, options) for path in checkpoints],
    )


def read_list(table: Path, root: Path, options: Options) -> ForeignRun:
    """Checkpoints listed with the columns ``file``, ``t``, and ``profile`` or ``sigma_rel``.

    Args:
        table: The CSV file.
        root: What its file names are relative to.
        options: Its ``profile`` stands where the table has none.

    Raises:
        SnapshotError: If a row is not understood; the message names it.
    """
    import csv

    snapshots = []
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            missing = {"file", "t"} - set(rows.fieldnames or ())
            if missing:
                raise SnapshotError(
                    f"{table} lacks the column {', '.join(sorted(missing))}; its first line must "
                    "name the columns: file,t,profile"
                )
            for row in rows:
                where = f"{table}, line {rows.line_num}"
                try:
                    t, profile = _time(row["t"]), _profile(row, options)
                    snapshots.append(_snapshot(root / row["file"], t, profile, options))
                except (ValueError, TypeError) as error:
                    raise SnapshotError(f"{where}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SnapshotError(f"{table} cannot be read ({error})") from error
    return ForeignRun(LISTED, options.unit or "steps", snapshots)


def _snapshot(path: Path, t: float, profile: Profile, options: Options) -> ForeignSnapshot:
    read = partial(read_checkpoint, path, options.key, options.allow)
    return ForeignSnapshot(path, checkpoint_files(path), t, profile, read)


def _number(path: Path) -> int:
    name = path.name if path.is_dir() else path.stem
    found = _AFTER_STEP.search(name) or _LAST_NUMBER.search(name)
    if found is None:
        raise SnapshotError(
            f"{path} does not say its time; rename it (step-1000), or list checkpoints in a CSV "
            "with the columns file, t, profile"
        )
    return int(found[1])


def _time(text: str) -> float:
    t = float(text)
    if not 0 < t < float("inf"):
        raise ValueError(f"t must be a finite number > 0 (got {text})")
    return int(t) if t.is_integer() else t


def _profile(row: dict[str, str], options: Options) -> Profile:
    if text := (row.get("profile") or "").strip():
        return parse_profile(text)
    if text := (row.get("sigma_rel") or "").strip():
        return PowerFunction(sigma_rel=float(text))
    if options.profile is None:
        raise ValueError(
            "it does not say how the checkpoint averages; fill the column profile (raw, "
            "exponential:beta=0.9999, power:sigma_rel=0.05, ...) or sigma_rel"
        )
    return options.profile
