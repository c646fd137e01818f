"""Which snapshots an average is made from, and how much of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

from posthoc_ema.chain import with_inputs
from posthoc_ema.evidence import Evidence
from posthoc_ema.profiles import Profile
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.snapshots import SnapshotStore, as_store
from posthoc_ema.solve import Solution, check_slack, solve

SLACK = 0.005
"""Share by which predicted errors may exceed the least, so that fewer files are read."""

_WORTH_CHOOSING = 256 << 20  # bytes: of less all is read, and checked, in a fraction of a second


def select_snapshots(
    snapshots: str | os.PathLike[str] | SnapshotStore, t: float | None
) -> tuple[Sequence[Snapshot], float]:
    """Snapshots that an average at ``t`` may use, in order of time, and ``t`` itself.

    Raises:
        ValueError: If ``t`` lies before the first or after the last snapshot.
    """
    store = as_store(snapshots)
    found = store.list()
    if t is None:
        t = found[-1].t
    usable = [s for s in found if s.t <= t]
    if not usable or t > found[-1].t:
        raise ValueError(
            f"t={t} is outside the snapshots of {store.path}, which reach from t={found[0].t} to "
            f"t={found[-1].t} {found[0].run.unit}"
        )
    return usable, t


def select_slack(slack: float | None, snapshots: Sequence[Snapshot], method: str) -> float:
    """The slack of a reconstruction from these snapshots; None leaves it to their size.

    Raises:
        ValueError: If it is no share, or the method knows none.
    """
    if slack is None:
        large = sum(s.nbytes for s in snapshots) > _WORTH_CHOOSING
        return SLACK if large and method == "kriging" else 0.0
    check_slack(slack)
    if slack and method != "kriging":
        raise ValueError(f'slack={slack} needs method="kriging" (got {method!r})')
    return slack


def solve_for(
    snapshots: Sequence[Snapshot],
    t: float,
    profiles: Sequence[Profile],
    method: str,
    evidence: Evidence,
    slack: float = 0.0,
) -> Solution:
    """Coefficients of averages at ``t``, ``[profiles, snapshots]``.

    Slack is taken where it spares a file: differences need those before them.
    """
    solved = partial(
        solve,
        [(s.t, s.profile) for s in snapshots],
        [(t, profile) for profile in profiles],
        method=method,
        movement=evidence.movement,
        noise=evidence.noise,
    )
    found = solved(slack=slack)
    if not slack:
        return found
    everything = len(with_inputs(snapshots))
    wasted = [
        not row.all()
        and len(with_inputs(s for s, x in zip(snapshots, row, strict=True) if x)) == everything
        for row in found.coefficients
    ]
    if any(wasted):
        best = solved()
        for part in fields(Solution):
            getattr(found, part.name)[wasted] = getattr(best, part.name)[wasted]
    return found
