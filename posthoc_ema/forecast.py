"""What reconstructions would be worth, without reconstructing: coefficients and their errors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.choice import select_slack, select_snapshots, solve_for
from posthoc_ema.evidence import Evidence, gather_evidence
from posthoc_ema.profiles import Profile, as_profile
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.snapshots import SnapshotStore, as_store
from posthoc_ema.solve import Solution

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Forecast:
    """Solved, but not carried out: ``k`` targets from ``n`` snapshots.

    Attributes:
        snapshots: ``n`` snapshots that a target at ``t`` may use, in order of time.
        t: Time of the targets, in the run's unit.
        profiles: ``k`` target profiles.
        method: As given to :func:`forecast`.
        solution: Coefficients ``[k, n]`` and their diagnostics.
        evidence: What the snapshots say about the run.
    """

    snapshots: Sequence[Snapshot]
    t: float
    profiles: Sequence[Profile]
    method: str
    solution: Solution
    evidence: Evidence

    @property
    def predicted_error(self) -> NDArray[np.float64]:
        """``[k]`` expected RMS error relative to the RMS of the weights; NaN where unknown."""
        return self.evidence.relative_error(self.solution.expected_square)

    def using(self, kept: Sequence[Snapshot]) -> Forecast:
        """The same targets from some of the snapshots.

        The movement stays the one estimated from all of them: what is left out of a solve does
        not change how the weights moved, and more snapshots know it better.
        """
        row_of = {snapshot.path: row for row, snapshot in enumerate(self.snapshots)}
        rows = [row_of[snapshot.path] for snapshot in kept]
        evidence = Evidence(
            self.evidence.movement,
            self.evidence.noise[rows],
            self.evidence.moving_share,
            self.evidence.mean_square,
            self.evidence.remarks,
        )
        return _solved(kept, self.t, self.profiles, self.method, evidence)


def forecast(
    snapshots: str | os.PathLike[str] | SnapshotStore,
    targets: Sequence[Profile | float],
    *,
    t: float | None = None,
    method: str = "kriging",
    slack: float | None = 0.0,
) -> Forecast:
    """Solve for reconstructions without carrying them out: a small sample is read.

    Args:
        snapshots: A folder or store.
        targets: Profiles, or numbers as σ_rel.
        t: Time of the averages; default: the last snapshot's.
        method: ``"kriging"`` or ``"paper"``, see :func:`posthoc_ema.solve`.
        slack: As in :func:`posthoc_ema.reconstruct`, but that by default all snapshots count.

    Raises:
        SnapshotError: If the folder holds anything but intact snapshots of one run.
        ValueError: If an argument is outside its domain.
    """
    store = as_store(snapshots)
    usable, t = select_snapshots(store, t)
    profiles = [as_profile(target) for target in targets]
    slack = select_slack(slack, usable, method)
    return _solved(usable, t, profiles, method, gather_evidence(usable), slack)


def predict_error(
    snapshots: str | os.PathLike[str] | SnapshotStore,
    sigma_rel: float | Sequence[float],
    t: float | None = None,
    *,
    method: str = "kriging",
    slack: float | None = None,
) -> Any:
    """Predicted error of reconstructions, without reconstructing: a small sample is read.

    Args:
        snapshots: A folder or store.
        sigma_rel: EMA length, or several.
        t: Time of the average; default: the last snapshot's.
        method: As in :func:`posthoc_ema.reconstruct`.
        slack: As in :func:`posthoc_ema.reconstruct`.

    Returns:
        Expected RMS error relative to the RMS of the weights: a float, or ``[k]`` float64 for a
        sequence. NaN where a single snapshot cannot tell.
    """
    several = np.ndim(sigma_rel) > 0
    listed: Any = sigma_rel if several else [sigma_rel]
    errors = forecast(snapshots, listed, t=t, method=method, slack=slack).predicted_error
    return errors if several else float(errors[0])


def _solved(
    snapshots: Sequence[Snapshot],
    t: float,
    profiles: Sequence[Profile],
    method: str,
    evidence: Evidence,
    slack: float = 0.0,
) -> Forecast:
    solution = solve_for(snapshots, t, profiles, method, evidence, slack)
    return Forecast(snapshots, t, profiles, method, solution, evidence)
