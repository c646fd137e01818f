"""Grids of a run: which times it offers, which guides, and which tensors to vary."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from posthoc_ema import SnapshotStore
from reference_model.checkpoint import SNAPSHOTS
from reference_model.points import Point, PointGuide, grid, group_tensors, sensitivity
from reference_model.sweep import Sweep

LONGEST = 0.28
"""Longest EMA length worth trying: at 0.2887 the power function gives way to a uniform average."""


def even_times(run: Sweep, count: int) -> list[float]:
    """Times of snapshots nearest to 1/count, 2/count, ... of the training that was planned.

    A run that is not finished has the first of them only: the same call later adds the others.

    Args:
        run: The run.
        count: How many, at the end of training.
    """
    offered = sorted({t for t, _ in run.record.inputs})
    total = run.config.total_nimg
    wanted = (total * (k + 1) / count for k in range(count))
    # Never the same time twice, and not the last snapshot for one still far ahead.
    reached = [t for t in wanted if t <= run.end + total / (2 * count)]
    nearest = (min((abs(o - t), o) for o in offered)[1] for t in reached)
    return list(dict.fromkeys(nearest))


def given_times(run: Sweep, times: Iterable[float]) -> list[float]:
    """Times in images from times in images or, up to 1, fractions of the training planned.

    Times that the run has not reached are left out, with a line that says so.

    Args:
        run: The run.
        times: As the user gave them.

    Raises:
        ValueError: If none of them is reached.
    """
    images = [t * run.config.total_nimg if t <= 1 else t for t in times]
    reached = [t for t in images if t <= run.end]
    ahead = [t for t in images if t > run.end]
    if not reached:
        raise ValueError(
            f"the run has snapshots up to {run.end:,.0f} images; give a time that it has reached"
        )
    if ahead:
        print(
            f"Not reached yet, left out: {', '.join(f'{t:,.0f}' for t in ahead)} images (the last "
            f"snapshot is at {run.end:,.0f}). Run the same command again later.",
            file=sys.stderr,
        )
    return reached


@dataclass(frozen=True)
class Guides:
    """Which guides, of which strength.

    Attributes:
        strengths: w; 1 is no guidance.
        sigma_rels: EMA lengths of guides; none: that of the average guided.
        run_dir: Run of the guides; `None`: the one that is swept.
        times: Times of guides, in images or, up to 1, fractions of what the guide's run has
            trained; none: that of the average guided, or the last of another run.
        interval: Noise levels at which guides act.
    """

    strengths: Sequence[float]
    sigma_rels: Sequence[float] = ()
    run_dir: Path | None = None
    times: Sequence[float] = ()
    interval: tuple[float, float] | None = None

    def of(self, run: Sweep, t: float, sigma_rel: float) -> list[PointGuide]:
        """All guides of one average.

        Raises:
            posthoc_ema.SnapshotError: If another run has no snapshots.
        """
        last = SnapshotStore((self.run_dir or run.run_dir) / SNAPSHOTS).list()[-1]
        # The same run under another name is still the same run.
        elsewhere = last.run.run_id != run.record.settings["run_id"]
        where = str(self.run_dir) if elsewhere else ""
        times = [last.t * time if time <= 1 else time for time in self.times]
        return [
            PointGuide(w, length, float(time), last.run.run_id, self.interval, where)
            for length in self.sigma_rels or [sigma_rel]
            for time in times or [last.t if elsewhere else t]
            for w in self.strengths
        ]


def guided_grid(
    run: Sweep, sigma_rels: Sequence[float], times: Sequence[float], guides: Guides
) -> list[Point]:
    """Strength of guidance × EMA length × length and time of the guide.

    Args:
        run: The run whose averages are guided.
        sigma_rels: Their EMA lengths.
        times: Their times, in images.
        guides: What guides them.

    Returns:
        Points, without those that would guide themselves.

    Raises:
        ValueError: If no guide differs from what it guides.
        posthoc_ema.SnapshotError: If the guides' run has no snapshots.
    """
    points = [
        p for t in times for s in sorted(sigma_rels) for p in grid([s], [t], guides.of(run, t, s))
    ]
    if all(p.guide is None for p in points) and any(w != 1 for w in guides.strengths):
        raise ValueError(
            "every guide is the network that it is to guide; give guides another EMA length, time "
            "or run"
        )
    return list(dict.fromkeys(points))


def sensitivity_grid(
    run: Sweep,
    sigma_rel: float | None,
    others: Sequence[float] = (),
    *,
    by: str = "block",
    patterns: Sequence[str] = (),
) -> list[Point]:
    """The last average, and the same with one group of tensors of another length at a time.

    Args:
        run: The run.
        sigma_rel: EMA length of all other tensors; `None`: the best that was measured.
        others: Lengths for one group at a time; none: half and double of it.
        by: Groups, as of `points.group_tensors`.
        patterns: Only tensors whose names match one of these.

    Raises:
        ValueError: If no length was measured to be the best, or no tensor matches a pattern.
    """
    best = run.record.best
    if sigma_rel is None and (best is None or best.point.t != run.end):
        raise ValueError(
            "which EMA length shall all other tensors have? Give one --sigma-rel, or sweep first: "
            "then it is the best"
        )
    base = best.sigma_rel if sigma_rel is None and best is not None else sigma_rel
    assert base is not None  # a best average has a length
    names = list(SnapshotStore(run.run_dir / SNAPSHOTS).list()[-1].averages)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no tensor matches {pattern!r}; names are like {names[0]!r}")
    kept = [n for n in names if not patterns or any(fnmatchcase(n, p) for p in patterns)]
    lengths = others or (round(base / 2, 4), min(round(2 * base, 4), LONGEST))
    return sensitivity(Point(base, run.end), group_tensors(kept, by), lengths)
