"""The best EMA length of a run with few measurements, by the library's own search."""

from __future__ import annotations

import hashlib
import json
from math import isfinite
from typing import Any

from posthoc_ema import Profile, Reconstruction, SweepResult
from posthoc_ema import find_best as search
from posthoc_ema import sweep as evaluate_all
from reference_model.averages import Averages
from reference_model.checkpoint import SNAPSHOTS
from reference_model.points import Point, PointGuide
from reference_model.sweep import Sweep

SEARCHES = "search"
"""Folder within the run's directory that keeps how far searches got."""


def find_best(
    run: Sweep,
    bounds: tuple[float, float] = (0.01, 0.28),
    budget: int = 10,
    *,
    t: float | None = None,
    guide: PointGuide | None = None,
) -> SweepResult:
    """Find the EMA length of the lowest Fréchet distance.

    Lengths that the record holds cost nothing; what the search measures is recorded like any other
    point. Interrupted, it goes on with the budget that was left.

    Args:
        run: Where to measure and record.
        bounds: Smallest and largest EMA length to consider.
        budget: Most lengths to measure.
        t: Time of the averages, in images; `None` for the last snapshot.
        guide: What guides all of them.

    Returns:
        Mean distance by EMA length, within the bounds.

    Raises:
        ValueError: If an argument is outside its domain.
        posthoc_ema.SnapshotError: If snapshots are missing or damaged.
    """
    t = run.end if t is None else t
    guides = [] if guide is None else run.needs(Point(bounds[0], t, guide))[1:]
    guide_averages = Averages(guides, run.max_bytes)
    of_guide = guide_averages.get(*guides)
    bar = run.bar(budget)

    def point(sigma_rel: float) -> Point:
        return Point(sigma_rel, t, guide)

    def distance(weights: Reconstruction) -> float:
        assert isinstance(weights.profile, Profile)  # one for all tensors
        wanted = point(weights.profile.sigma_rel)
        found = run.record.find(wanted)
        if found is None or not found.distances:
            found = run.measure_made(wanted, [weights, *of_guide], bar)
        return found.distance

    low, high = bounds
    known = [
        m.sigma_rel
        for m in run.record.imaged
        if m.sigma_rel is not None and m.point == point(m.sigma_rel) and low <= m.sigma_rel <= high
    ]
    # The search's own file knows which lengths counted against the budget; one for each question.
    question = [run.record.settings, run.record.inputs_at(t), point(0.0).label]
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]
    options: dict[str, Any] = {
        "t": t,
        "framework": "torch",
        "cache": run.run_dir / SEARCHES / f"{digest}.json",
        "max_bytes": run.max_bytes,
        "progress": False,
    }
    snapshots = run.run_dir / SNAPSHOTS
    with bar:
        if known:
            evaluate_all(snapshots, known, distance, **options)
        result = search(snapshots, distance, bounds, budget, **options)
    # The file may know what a record that was removed since does not.
    run.measure(point(sigma_rel) for sigma_rel in result if isfinite(result[sigma_rel]))
    return result
