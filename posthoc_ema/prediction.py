"""What a snapshot will be, from those before it: the part that need not be stored.

Predicted by kriging from the decoded snapshots on disk (so that rounding errors do not add up),
with coefficients that depend on times and profiles alone. After some times a snapshot is stored
whole again: one lost file costs few others, and no chain grows long to read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from posthoc_ema.errors import PosthocEMAError
from posthoc_ema.movement import Movement
from posthoc_ema.profiles import Profile
from posthoc_ema.sinks import MemorySink
from posthoc_ema.snapshot_file import AverageSource, Prediction, Snapshot
from posthoc_ema.solve import solve
from posthoc_ema.streaming import Group, stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

WHOLE_EVERY = 16
"""Times from one whole snapshot to the next."""

INPUTS = 6
"""Snapshots that a prediction takes in; more say no more."""

_RIDGE = 1e-4  # storage noise of the inputs, relative to the movement in one interval


def predict(
    earlier: Sequence[Snapshot], t: float, profile: Profile, averages: Sequence[AverageSource]
) -> Prediction | None:
    """Predict the snapshot of a run at ``t``; None where it shall be stored whole.

    Args:
        earlier: All snapshots of the run on disk.
        t: Time of the new one.
        profile: Its profile.
        averages: Its tensors.
    """
    inputs = _choose(earlier, t)
    if not inputs:
        return None
    coefficients = _coefficients(inputs, t, profile)
    names = [
        source.name
        for source in averages
        if all(
            source.name in s.averages and s.entries[source.name].shape == source.shape
            for s in inputs
        )
    ]
    sink = MemorySink(1)
    try:
        groups = [Group(names, coefficients[None])] if names else []
        everything = all(len(names) == len(s.averages) for s in inputs)
        stream(inputs, groups, sink, check=everything, progress=lambda nbytes: None)
    except (PosthocEMAError, OSError) as error:
        warnings.warn(f"a snapshot is stored whole, for {error}", stacklevel=2)
        return None
    return Prediction(
        list(zip(coefficients.tolist(), inputs, strict=True)),
        {name: values.reshape(-1) for name, values in sink.arrays[0].items()},
        first=all(s.t < t for s in inputs),
    )


def _choose(earlier: Sequence[Snapshot], t: float) -> list[Snapshot]:
    """The nearest snapshots, not beyond the last one that is stored whole."""
    same = [s for s in earlier if s.t == t]
    if any(not s.links for s in same):
        return same
    chain: list[list[Snapshot]] = []
    for time in sorted({s.t for s in earlier if s.t < t}, reverse=True):
        chain.append([s for s in earlier if s.t == time])
        if any(not s.links for s in chain[-1]):
            break
    if not same and len(chain) >= WHOLE_EVERY:
        return []
    return [*same, *(s for group in chain for s in group)][:INPUTS]


def _coefficients(inputs: Sequence[Snapshot], t: float, profile: Profile) -> NDArray[np.float64]:
    known = [(s.t, s.profile) for s in inputs]
    times = sorted({*(s.t for s in inputs), t})
    interval = times[-1] - times[-2] if len(times) > 1 else t
    noise = np.full(len(inputs), _RIDGE * interval)
    return solve(
        known, (t, profile), movement=Movement.constant(times[-1]), noise=noise
    ).coefficients
