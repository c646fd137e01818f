"""Plain checkpoints: listed in a CSV with their times and profiles, or numbered by their names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from posthoc_ema.errors import SnapshotError
from posthoc_ema.importing.foreign import ForeignRun, ForeignSnapshot, Options
from posthoc_ema.importing.layout import checkpoint_files, sets_of_weights, stem
from posthoc_ema.importing.state_dict import read_checkpoint
from posthoc_ema.profile_text import parse_profile
from posthoc_ema.profiles import PowerFunction, Profile

LISTED, NUMBERED = "list", "checkpoints"
_LABELS = ("step", "iter", "epoch")
_LABELLED = {
    label: re.compile(rf"{label}[^0-9]*(\d+)(?![\d.]*\d)", re.IGNORECASE) for label in _LABELS
}
_NUMBER = re.compile(r"\d+(?:\.\d+)*")
_VERSION = re.compile(r"-v\d+$")


def read_numbered(
    checkpoints: Sequence[Path], options: Options, from_parents: bool = False
) -> ForeignRun:
    """Checkpoints whose names hold their time: of steps, iterations, epochs, else the last number.

    Args:
        checkpoints: Files and folders.
        options: What they do not say themselves.
        from_parents: Whether the folder around a file may say the time that its name does not.

    Raises:
        SnapshotError: If none says its time, nothing says how they average, or a folder has
            several sets of weights.
    """
    times = {path: _number(path) for path in checkpoints}
    if from_parents:
        times = {p: n if n is not None else _number(p.parent) for p, n in times.items()}
    numbered = {path: time for path, time in times.items() if time}
    if not numbered:
        raise SnapshotError(
            f"{checkpoints[0]} does not say its time; rename it (step-1000), give the folder that "
            "holds folders such as checkpoint-1000, or list checkpoints in a CSV with the columns "
            "file, t, profile"
        )
    files = _chosen(list(numbered), options.subfolder)
    if options.profile is None:
        raise SnapshotError(
            f"{checkpoints[0].parent} holds checkpoints that do not say how they average: give "
            "profile=, --profile raw (weights as they were trained), exponential:beta=0.9999 or "
            "power:sigma_rel=0.05; or list them in a CSV with the columns file, t, profile"
            + _noted_decay(next(iter(files.values()))[0].parent)
        )
    found = [
        _snapshot(path, held, int(numbered[path] or 0), options.profile, options)
        for path, held in files.items()
    ]
    remarks = []
    if left_out := [path.name for path in times if path not in files]:
        remarks.append(
            f"left out, for want of a time > 0 or of weights: {', '.join(left_out[:5])}"
            + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
        )
    unit = "epochs" if all(_label(path) == "epoch" for path in files) else "steps"
    return ForeignRun(NUMBERED, options.unit or unit, found, tuple(remarks))


def _chosen(checkpoints: Sequence[Path], subfolder: str | None) -> dict[Path, tuple[Path, ...]]:
    """The files of each checkpoint, of the same set of weights in all.

    Raises:
        SnapshotError: If there are several sets, and none is named.
    """
    folders = {path: sets_of_weights(path) for path in checkpoints if path.is_dir()}
    if subfolder is not None:
        named = {p: (p / subfolder).exists() for p in folders}
        if not any(named.values()):
            sets = [*dict.fromkeys(name for held in folders.values() for name in held)]
            raise SnapshotError(
                f"no checkpoint in {checkpoints[0].parent} holds {subfolder!r}; their sets of "
                f"weights are {', '.join(sets[:8]) or 'files, not folders'}"
            )
        return {path: checkpoint_files(path, subfolder) for path in folders}
    files = {
        path: checkpoint_files(path) for path in checkpoints if path not in folders or folders[path]
    }
    # Of different names, if nested: the weights of one model in one, of another in the next.
    nested = {next(iter(held)) for path, held in folders.items() if held and _is_nested(path, held)}
    if len(nested) > 1:
        raise SnapshotError(
            f"the checkpoints in {checkpoints[0].parent} hold different sets of weights "
            f"({', '.join(sorted(nested))}); say which with subfolder=, --subfolder"
        )
    return files


def _is_nested(folder: Path, held: dict[str, Path]) -> bool:
    return next(iter(held.values())).parent != folder


def _noted_decay(folder: Path) -> str:
    """What diffusers' EMAModel notes in its configuration, as advice."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        decay, step = float(config["decay"]), int(config["optimization_step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return (
        f". {folder}/config.json notes a decay of {decay} at step {step}: exponential:beta={decay}"
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
                    path = root / row["file"]
                    files = checkpoint_files(path, options.subfolder)
                    snapshots.append(_snapshot(path, files, t, profile, options))
                except (ValueError, TypeError) as error:
                    raise SnapshotError(f"{where}: {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SnapshotError(f"{table} cannot be read ({error})") from error
    return ForeignRun(LISTED, options.unit or "steps", snapshots)


def _snapshot(
    path: Path, files: tuple[Path, ...], t: float, profile: Profile, options: Options
) -> ForeignSnapshot:
    read = partial(read_checkpoint, path, options.key, options.allow, options.subfolder)
    return ForeignSnapshot(path, files, t, profile, read)


def _label(path: Path) -> str | None:
    """What the number in a name counts, if it says so."""
    return next((k for k in _LABELS if _LABELLED[k].search(stem(path))), None)


def _number(path: Path) -> int | None:
    """The time in a name, if there is one: a decimal such as a loss or a decay is none."""
    name = _VERSION.sub("", stem(path))
    if label := _label(path):
        return int(_LABELLED[label].findall(name)[0])
    found = [number for number in _NUMBER.findall(name) if "." not in number]
    return int(found[-1]) if found else None


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
