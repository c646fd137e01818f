"""``plan``: which tracks to follow and when to keep snapshots, for a budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from posthoc_ema.encoding import check_encoding
from posthoc_ema.movement import Movement
from posthoc_ema.planning import Task, candidate_times, possible_movements
from posthoc_ema.profiles import PowerFunction
from posthoc_ema.schedule import AtTimes, Schedule
from posthoc_ema.snapshots import SnapshotStore
from posthoc_ema.thinning import Thinning, simulate

_TARGETS = 24
# Estimates that suffice here: variance of rounding relative to the mean square of the weights (of
# deltas, where snapshots differ by a twentieth of that), and bytes of one weight.
_ROUNDING = {
    "float32": 2.0**-50, "float16": 4e-8, "bfloat16": 2.6e-6,
    "delta16": 1e-11, "delta8": 2e-7, "delta6": 3e-6, "delta4": 5e-5,
}  # fmt: skip
_BYTES = {
    "float32": 4.0, "float16": 2.0, "bfloat16": 2.0,
    "delta16": 2.0, "delta8": 1.0, "delta6": 0.75, "delta4": 0.65,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Tracks and times, and what they are worth.

    ``EMA(plan.sigma_rel, snapshots=folder, schedule=plan.schedule)`` carries it out.

    Attributes:
        sigma_rel: Tracks.
        times: When snapshots are kept, rising, in units of ``t_end``'s; with an open end, what
            is kept of a long run, as fractions of the time reached.
        t_end: End of training; None if it is open.
        targets: EMA lengths over the range, from short to long.
        errors: Predicted RMS error of each when reconstructed at the end (at the worst moment,
            if the end is open), relative to the RMS distance that the weights travel in the
            run; planned like an earlier run, relative to the RMS of its weights.
        even_errors: The same from the same number of evenly spaced times, for comparison; empty
            with an open end.
        schedule: For ``EMA(schedule=...)``.
    """

    sigma_rel: tuple[float, ...]
    times: tuple[float, ...]
    t_end: float | None
    targets: tuple[float, ...]
    errors: tuple[float, ...]
    even_errors: tuple[float, ...]
    schedule: Schedule

    @property
    def worst_error(self) -> float:
        """Largest predicted error over the range."""
        return max(self.errors)

    @property
    def snapshots(self) -> int:
        """Number of files kept: one for each time and track."""
        return len(self.times) * len(self.sigma_rel)


def plan(
    budget: float,
    sigma_rel_range: tuple[float, float],
    tracks: Sequence[float] | float | None = None,
    *,
    t_end: float | None = None,
    every: float | None = None,
    movement: str | Movement = "unknown",
    like: str | os.PathLike[str] | SnapshotStore | None = None,
    encoding: str = "float32",
    snapshot_bytes: float | None = None,
    parameters: float | None = None,
    candidates: int = 256,
) -> Plan:
    """Choose tracks and times that keep the worst error over a range of EMA lengths low.

    With the end of training known, times are chosen for reconstructions at the end. With an
    open end the schedule writes at times in geometric progression and deletes what has become
    dispensable, so that what is kept serves at every moment.

    Args:
        budget: Number of snapshots to keep, one for each time and track; or, with
            ``snapshot_bytes`` or ``parameters``, their bytes. With an open end the newest time
            comes on top while it is being written.
        sigma_rel_range: Shortest and longest σ_rel to be reconstructed.
        tracks: σ_rel to follow, or (a whole number) how many to choose; default: two. Each costs
            one copy of the model in memory while training.
        t_end: When training ends, in units of t. If it then ends at another time, call
            ``ema.snapshot()`` there. None: the end is open.
        every: Known end: times are multiples of it (default: 1 if ``t_end`` is a whole number).
            Open end: shortest interval between snapshots, in units of t; by default they are
            frequent early in the run.
        movement: How fast the weights move, with a known end: by the shape of the learning rate
            (``"constant"``, ``"inverse-sqrt"``, ``"linear"`` or ``"cosine"`` down to 0),
            ``"unknown"`` for what serves both a constant and a decaying one, or a measured
            :class:`posthoc_ema.movement.Movement`.
        like: Folder or store of an earlier run of the same kind, from which the movement is
            measured; its time is stretched to ``t_end``.
        encoding: Storage precision of the snapshots.
        snapshot_bytes: Size of one snapshot, for a budget in bytes; or
        parameters: number of averaged weights, of which the size follows.
        candidates: Number of times to choose from, denser towards the end; no more are kept.

    Returns:
        A :class:`Plan`.

    Raises:
        ValueError: If an argument is outside its domain, or the budget below one time.
        SnapshotError: If ``like`` holds no intact run.

    Example:
        >>> chosen = plan(32, (0.01, 0.25), t_end=100_000)
        >>> chosen.snapshots, chosen.times[-1]
        (32, 100000.0)
        >>> chosen.worst_error < 0.1 * max(chosen.even_errors)
        True

    Source:
        Expected error: Karras et al. 2024, arXiv:2312.02696, section 3, with the error metric
        of :func:`posthoc_ema.solve`.
    """
    targets = _targets(sigma_rel_range)
    affordable = _affordable(budget, snapshot_bytes, parameters, check_encoding(encoding))
    if t_end is None and (movement != "unknown" or like is not None):
        raise ValueError("movement and like need t_end: with an open end the rate is not known")
    if like is not None and movement != "unknown":
        raise ValueError("give either movement or like, not both")
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2 (got {candidates})")
    task = Task(targets, *possible_movements(movement, like), _ROUNDING[encoding])

    followed = task.tracks(tracks)
    number = affordable // len(followed)
    if number < 1:
        raise ValueError(
            f"{affordable} snapshots are less than one time of {len(followed)} tracks; give "
            "a larger budget or fewer tracks"
        )
    if t_end is None:
        return _open_end(task, followed, number, every, candidates)
    if not 0 < t_end < inf:
        raise ValueError(f"t_end must be finite and > 0 (got {t_end})")
    grid = candidate_times(targets[0], candidates, t_end, every)
    places = task.places(followed, number, grid / t_end)
    even = np.arange(1, number + 1) / number
    times = tuple(grid[places].tolist())
    return Plan(
        sigma_rel=followed,
        times=times,
        t_end=t_end,
        targets=targets,
        errors=tuple(task.errors(followed, grid[places] / t_end).tolist()),
        even_errors=tuple(task.errors(followed, even).tolist()),
        schedule=AtTimes(times),
    )


def _open_end(
    task: Task, tracks: tuple[float, ...], number: int, every: float | None, candidates: int
) -> Plan:
    """Thinning at the interval that does best in the long run, the longest of nearly equals."""
    grid = candidate_times(task.targets[0], candidates, 1.0, None)
    start = grid[task.places(tracks, number, grid)]
    best: Plan | None = None
    for ratio in task.targets[0] * np.array([4.0, 2.0, 1.0, 0.5]):
        schedule = Thinning(number, tracks, task.targets, float(ratio), every, task.noise)
        fractions, errors = simulate(schedule, start.tolist())
        if best is not None and errors.max() > 0.9 * best.worst_error:
            break
        best = Plan(
            sigma_rel=tracks,
            times=tuple(fractions),
            t_end=None,
            targets=task.targets,
            errors=tuple(errors.tolist()),
            even_errors=(),
            schedule=schedule,
        )
    assert best is not None  # the first of them, at least
    return best


def _affordable(
    budget: float, snapshot_bytes: float | None, parameters: float | None, encoding: str
) -> int:
    """Number of snapshots that the budget pays for."""
    if snapshot_bytes is not None and parameters is not None:
        raise ValueError("give either snapshot_bytes or parameters, not both")
    if parameters is not None:
        snapshot_bytes = parameters * _BYTES[encoding]
    if snapshot_bytes is not None and not 0 < snapshot_bytes < inf:
        raise ValueError(f"the size of a snapshot must be > 0 (got {snapshot_bytes:g} bytes)")
    affordable = budget if snapshot_bytes is None else budget / snapshot_bytes
    if not 1 <= affordable < inf:
        raise ValueError(f"the budget must pay for at least one snapshot (got {affordable:g})")
    return int(affordable)


def _targets(sigma_rel_range: tuple[float, float]) -> tuple[float, ...]:
    try:
        low, high = (float(sigma_rel) for sigma_rel in sigma_rel_range)
    except (TypeError, ValueError):
        raise ValueError(
            f"sigma_rel_range must be the shortest and the longest length (got {sigma_rel_range})"
        ) from None
    PowerFunction(low), PowerFunction(high)  # raise outside the domain
    if low > high:
        raise ValueError(f"sigma_rel_range must rise (got {sigma_rel_range})")
    middle = np.geomspace(low, high, _TARGETS)[1:-1].tolist() if high > low else []
    return tuple(dict.fromkeys([low, *middle, high]))
