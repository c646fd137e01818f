"""Post-hoc reconstruction: any average of a run, from its snapshots, in one pass."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.arrays import check_framework
from posthoc_ema.choice import select_slack, select_snapshots, solve_for
from posthoc_ema.evidence import Evidence, gather_evidence
from posthoc_ema.export import ModelFolder, is_torch_file, save_torch
from posthoc_ema.loading import load_files, loaded, stamps_of
from posthoc_ema.partition import Partition
from posthoc_ema.places import Place, as_place
from posthoc_ema.profiles import Profile
from posthoc_ema.request import (
    EVERYTHING,
    Goal,
    assign,
    output_paths,
    parse_goals,
    select_names,
)
from posthoc_ema.sinks import FileSink, MemorySink
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.snapshots import SnapshotStore
from posthoc_ema.solve import METHODS, Solution
from posthoc_ema.streaming import Group, files_needed, stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_SHARD_BYTES = 5 * 10**9
_LITTLE_GAIN = 0.25  # a larger share of the error of the nearest snapshot is worth a warning


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One averaged set of weights.

    Attributes:
        t: Its time, in the run's unit.
        profile: Its profile; by name pattern, where lengths differ between tensors.
        inputs: ``n`` (t, profile) of the snapshots it was made from.
        coefficients: ``[n]`` float64, aligned with ``inputs``, summing to one; by name pattern
            likewise.
        predicted_error: Expected RMS difference from the true average, relative to the RMS of
            the weights. NaN where a single snapshot cannot tell.
        diagnostics: ``profile_error``, ``condition_number``, ``l1_norm`` and ``l2_norm`` of the
            coefficients (by pattern likewise), ``nearest_error``, the predicted error of the best
            single snapshot in the same units, ``movement`` and ``noise`` as estimated, and
            ``remarks`` about what the snapshots could not support.
        aliases: Tied names, each with the name that holds the values.
        files: Where the weights were written, if they were; they are read back, once, when
            asked for.
    """

    t: float
    profile: Profile | Goal
    inputs: Sequence[tuple[float, Profile]]
    coefficients: NDArray[np.float64] | Mapping[str, NDArray[np.float64]]
    predicted_error: float
    diagnostics: Mapping[str, Any]
    aliases: Mapping[str, str]
    files: Sequence[Place]
    _load: Callable[[], tuple[dict[str, Any], dict[str, Any]]] = field(repr=False)

    @property
    def params(self) -> dict[str, Any]:
        """Averaged tensors by name, float32 (float64 where the weights were)."""
        return self._load()[0]

    @property
    def buffers(self) -> dict[str, Any]:
        """Buffers and integer tensors by name, copied from the last snapshot used."""
        return self._load()[1]

    def state_dict(self) -> dict[str, Any]:
        """Everything by name, tied names included: ``model.load_state_dict`` takes it."""
        params, buffers = self._load()
        state = {**params, **buffers}
        state.update({alias: state[name] for alias, name in self.aliases.items() if name in state})
        return state


def reconstruct(
    snapshots: str | os.PathLike[str] | SnapshotStore,
    sigma_rel: float | Sequence[float] | Mapping[str, float | Profile] | None = None,
    *,
    target: Profile | Sequence[Profile] | None = None,
    t: float | None = None,
    method: str = "kriging",
    out: str | os.PathLike[str] | Place | None = None,
    framework: str | None = None,
    names: str | Sequence[str] | None = None,
    progress: bool | None = None,
    overwrite: bool = True,
    verify: bool = True,
    part: tuple[int, int] | None = None,
    like: str | Path | None = None,
    slack: float | None = None,
) -> Any:
    """Reconstruct averages of a finished or running training run from its snapshots.

    One streaming pass over the files serves all targets. Beside the results themselves it needs
    less than 256 MB, whatever the number of snapshots and the size of the model.

    Args:
        snapshots: The folder that ``EMA(snapshots=...)`` wrote, or its URL, or a store.
        sigma_rel: EMA length as a fraction of training time; several for several results; or a
            mapping from name pattern (``"decoder.*"``) to length, the first match deciding,
            for a different length in different tensors.
        target: Instead of ``sigma_rel``, any profile, or several.
        t: Time of the average, up to that of the last snapshot; by default that. Snapshots
            after ``t`` are not used.
        method: ``"kriging"``, ``"paper"`` or ``"plain"``, see :func:`posthoc_ema.solve`.
        out: Write safetensors instead of holding the result, at a local path or URL: a file
            ``name.safetensors`` for one target, else a folder. Above 5 GB a file is sharded with
            an index, as Hugging Face does. A name that ends in ``.pt`` is a file for
            ``torch.load``, of one target, which is in memory before.
        framework: ``"numpy"``, ``"torch"`` or ``"jax"``; by default whichever wrote the
            snapshots.
        names: Only averaged tensors whose names match one of these patterns, and no buffers.
            Files are then read in part, and their digests not checked.
        progress: Show a progress bar; by default if standard error is a terminal.
        overwrite: Whether ``out`` may replace files that are there, which happens at the end and
            at once; else they are an error before anything is read.
        verify: Compare the digests of all files that are read. Without, a pass is a little
            faster, and damaged files give wrong weights.
        part: ``(i, n)``: the i-th of n parts, from 1 on, of about equal size, for as many
            processes or machines; needs ``out``. Each writes a file, and
            the last to end the index that makes them one result. Snapshots are then read
            in part, and their digests not checked.
        like: Folder of a model as ``save_pretrained`` of transformers, diffusers or PEFT wrote
            it: ``out`` becomes such a folder, with its configuration and these weights.
        slack: By how much the predicted error may exceed the least, relative to it, so that
            fewer snapshots are read, often a third or less: those that hardly count get
            coefficients of exactly 0, and are not checked. By default 0.005, half a percent, if
            the snapshots take more than 256 MB, else 0. For ``method="kriging"``.

    Returns:
        A :class:`Reconstruction`, or a list of them if several targets were asked for.

    Raises:
        SnapshotError: If a file is damaged or foreign; the message names it.
        StructureError: If the model in ``like`` holds other tensors.
        FileExistsError: If ``out`` exists and ``overwrite`` is false.
        ValueError: If an argument is outside its domain.

    Example:
        >>> weights = reconstruct("run/ema", sigma_rel=0.07)  # doctest: +SKIP
        >>> model.load_state_dict(weights.state_dict())  # doctest: +SKIP

    Source:
        Karras et al. 2024, arXiv:2312.02696, section 3.2 and Algorithm 3.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)} (got {method!r})")
    out = None if out is None else as_place(out)
    goals, several = parse_goals(sigma_rel, target)
    usable, t = select_snapshots(snapshots, t)
    slack = select_slack(slack, usable, method)
    framework = check_framework(framework or usable[0].run.framework)
    chosen = select_names(usable[0], names)
    assignment = assign(goals, chosen)
    model = None if like is None else ModelFolder(like)
    single = is_torch_file(out) or model is not None
    if single and (several or out is None):
        raise ValueError("a .pt file, and a folder like=, hold one result: give one sigma_rel")
    if single and part is not None:
        raise ValueError("a .pt file, and a folder like=, are made in one piece: leave part= out")
    if model is not None:
        if names is not None:
            raise ValueError("like= needs all tensors of the model; leave names= out")
        model.check({*usable[-1].averages, *usable[-1].copies})
        out = None if out is None else model.weights(out)
    torch_file = out if is_torch_file(out) else None
    if torch_file is not None:
        framework = check_framework("torch")
    paths = [] if torch_file else output_paths(out, goals, several, usable[0])
    if torch_file is not None and torch_file.exists() and not overwrite:
        raise FileExistsError(f"{torch_file} exists; delete it or give another out=")
    division = None
    if part is not None:
        division = Partition.of_request(part, usable, chosen, (t, method, names, slack), paths)
        assignment = division.own(assignment)
        paths = division.paths
    for path in () if overwrite else paths:
        shards = path.parent.glob(f"{path.name.removesuffix('.safetensors')}-*-of-*.safetensors")
        for existing in (path, *shards):
            if existing.exists():
                raise FileExistsError(f"{existing} exists; delete it or give another out=")

    evidence = gather_evidence(usable)
    solutions = []
    for goal in goals:
        solved = solve_for(usable, t, list(goal.values()), method, evidence, slack)
        solutions.append({pattern: solved[k] for k, pattern in enumerate(goal)})
    groups = [
        Group(members, np.stack([s[p].coefficients for s, p in zip(solutions, key, strict=True)]))
        for key, members in assignment.items()
    ]
    sparse = slack > 0
    copies = usable[-1].copy_sources() if names is None and (not part or part[0] == 1) else []
    whole = verify and names is None and part is None

    memory = MemorySink(len(goals))
    files: list[list[Place]] = [[] for _ in goals]
    with _progress_bar(files_needed(usable, groups, sparse), progress) as advance:
        if paths:
            metadata = [
                {"t": t, "profile": _by_pattern({p: repr(q) for p, q in goal.items()})}
                for goal in goals
            ]
            limit: float = MAX_SHARD_BYTES
            if division is not None:
                metadata, limit = division.metadata(metadata), inf
            with FileSink(paths, copies, metadata, limit) as sink:
                stream(usable, groups, sink, check=whole, sparse=sparse, progress=advance)
                if division is not None:
                    division.withdraw()
                sink.commit()
                files = [sink.files(k) for k in range(len(goals))]
            if division is not None:
                division.join()
        else:
            stream(usable, groups, memory, check=whole, sparse=sparse, progress=advance)

    results = []
    for k, (goal, solution) in enumerate(zip(goals, solutions, strict=True)):
        load: Callable[[], tuple[dict[str, Any], dict[str, Any]]]
        if paths:
            load = cache(partial(load_files, stamps_of(files[k]), usable[-1], framework))
        else:
            load = loaded(memory.arrays[k], copies, usable[-1], framework)
        share = {
            pattern: sum(
                usable[0].entries[name].count
                for key, members in assignment.items()
                if key[k] == pattern
                for name in members
            )
            for pattern in goal
        }
        results.append(_result(goal, solution, share, usable, t, evidence, files[k], load))
    if model is not None:
        model.copy_to(paths[0].parent)
    if torch_file is not None:
        save_torch(results[0].state_dict(), torch_file)
        results[0] = replace(results[0], files=[torch_file])
    return results if several else results[0]


def _by_pattern(values: Mapping[str, Any]) -> Any:
    """One value where one profile serves all tensors, else the mapping."""
    return values[EVERYTHING] if list(values) == [EVERYTHING] else values


def _result(
    goal: Goal,
    solution: Mapping[str, Solution],
    share: Mapping[str, int],
    usable: Sequence[Snapshot],
    t: float,
    evidence: Evidence,
    files: Sequence[Place],
    load: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
) -> Reconstruction:
    total = sum(share.values()) or 1
    square = sum(share[p] * float(s.expected_square) for p, s in solution.items()) / total
    nearest = sum(share[p] * float(s.nearest_square) for p, s in solution.items()) / total
    error, nearest_error = map(float, evidence.relative_error(np.array([square, nearest])))
    remarks = list(evidence.remarks)
    if _is_beyond(solution, evidence):
        remarks.append(_beyond(goal, t, error, nearest_error, usable))
        warnings.warn(remarks[-1], stacklevel=3)
    per_pattern = {
        name: _by_pattern({p: float(getattr(s, name)) for p, s in solution.items()})
        for name in ("profile_error", "condition_number", "l1_norm", "l2_norm")
    }
    return Reconstruction(
        t=t,
        profile=_by_pattern(dict(goal)),
        inputs=[(s.t, s.profile) for s in usable],
        coefficients=_by_pattern({p: s.coefficients for p, s in solution.items()}),
        predicted_error=error,
        diagnostics={
            **per_pattern,
            "nearest_error": nearest_error,
            "movement": evidence.movement,
            "noise": evidence.noise,
            "remarks": tuple(remarks),
        },
        aliases=usable[-1].aliases,
        files=files,
        _load=load,
    )


def _is_beyond(solution: Mapping[str, Solution], evidence: Evidence) -> bool:
    """Whether combining snapshots gains little over taking the best one, but for rounding."""
    return any(
        s.expected_square > max(_LITTLE_GAIN**2 * s.nearest_square, 4 * evidence.noise.max())
        for s in solution.values()
    )


def _beyond(
    goal: Goal, t: float, error: float, nearest_error: float, usable: Sequence[Snapshot]
) -> str:
    shortest = min(profile.relative_moments(t)[1] for profile in goal.values())
    last = [s.profile.relative_moments(s.t)[1] for s in usable if s.t == usable[-1].t]
    tracked = sorted(float(f"{width:.3g}") for width in last)
    times = sorted({s.t for s in usable})
    interval = times[-1] - times[-2] if len(times) > 1 else t
    return (
        f"an average of sigma_rel={shortest:.3g} at t={t} is beyond what these snapshots "
        f"support: the predicted error is {error:.2g} of the weights' RMS, and the nearest "
        f"snapshot is off by {nearest_error:.2g}. It would have needed a track near it (kept: "
        f"{', '.join(map(str, tracked))}), or snapshots no further apart than "
        f"{shortest * t:.3g} towards the end (they are {interval:.3g} apart)"
    )


@contextmanager
def _progress_bar(
    snapshots: Sequence[Snapshot], show: bool | None
) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    total = sum(s.nbytes for s in snapshots)
    # disable=None: only on a terminal.
    disable = None if show is None else not show
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="reconstruct", disable=disable, delay=1
    ) as bar:
        yield bar.update
