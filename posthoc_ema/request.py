"""What a reconstruction was asked for: which averages of which tensors, and where to put them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from posthoc_ema.errors import SnapshotError
from posthoc_ema.places import Place, as_place
from posthoc_ema.profiles import Custom, PowerFunction, Profile, as_profile
from posthoc_ema.snapshot_file import Snapshot

EVERYTHING = "*"

Goal = Mapping[str, Profile]
"""Name pattern to profile; the first pattern that matches decides about a tensor."""


def parse_goals(sigma_rel: Any, target: Any) -> tuple[list[Goal], bool]:
    """Each target as a mapping from pattern to profile, and whether a list was asked for."""
    if (sigma_rel is None) == (target is None):
        raise TypeError("reconstruct takes either sigma_rel or target")
    wanted = target if sigma_rel is None else sigma_rel
    if isinstance(wanted, Mapping):
        if not wanted:
            raise ValueError("the mapping from name patterns to sigma_rel is empty")
        return [{pattern: as_profile(value) for pattern, value in wanted.items()}], False
    if isinstance(wanted, Profile) or np.ndim(wanted) == 0:
        return [{EVERYTHING: as_profile(wanted)}], False
    goals: list[Goal] = [{EVERYTHING: as_profile(value)} for value in wanted]
    if not goals:
        raise ValueError("no targets: the sequence is empty")
    return goals, True


def select_names(snapshot: Snapshot, names: str | Sequence[str] | None) -> list[str]:
    """Averaged tensors that match a pattern; all of them for None."""
    if names is None:
        return list(snapshot.averages)
    patterns = [names] if isinstance(names, str) else list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in snapshot.averages):
            raise ValueError(
                f"names: nothing matches {pattern!r}; the snapshots hold "
                f"{_some(list(snapshot.averages))}"
            )
    return [n for n in snapshot.averages if any(fnmatchcase(n, p) for p in patterns)]


def assign(goals: Sequence[Goal], names: Sequence[str]) -> dict[tuple[str, ...], list[str]]:
    """Group tensors by the pattern that decides about them in each goal."""
    groups: dict[tuple[str, ...], list[str]] = {}
    unmatched = []
    for name in names:
        found = [[p for p in goal if fnmatchcase(name, p)] for goal in goals]
        if all(found):
            groups.setdefault(tuple(patterns[0] for patterns in found), []).append(name)
        else:
            unmatched.append(name)
    if unmatched:
        raise ValueError(
            f"no pattern matches {_some(unmatched)}; add '*' with a length for all the others"
        )
    return groups


def output_paths(
    out: str | Place | None, goals: Sequence[Goal], several: bool, snapshot: Snapshot
) -> list[Place]:
    """The file of each result; none if they stay in memory."""
    if out is None:
        return []
    out = as_place(out)
    is_file = out.name.endswith(".safetensors")
    folder = out.parent if is_file else out
    if folder.resolve() == snapshot.path.parent.resolve():
        raise SnapshotError(f"out={out} lies in the snapshot folder; give another folder")
    if is_file and several:
        raise ValueError(f"out={out} is one file for {len(goals)} results; give a folder")
    if is_file:
        return [out]
    if not several:
        return [out / "model.safetensors"]
    names = [f"{label(goal[EVERYTHING], k)}.safetensors" for k, goal in enumerate(goals)]
    if len(set(names)) < len(names):
        raise ValueError("with out= each target may be asked for once only")
    return [out / name for name in names]


def label(profile: Profile, number: int = 0) -> str:
    """File name of one of several results, without its ending."""
    if isinstance(profile, PowerFunction):
        return f"sigma_rel={profile.sigma_rel!r}"
    if isinstance(profile, Custom):
        return f"target={number}"
    fields = profile.to_dict()
    return "_".join([fields.pop("kind"), *(f"{key}={value}" for key, value in fields.items())])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
