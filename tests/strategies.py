"""Hypothesis strategies for times, profiles and sets of stored averages."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from posthoc_ema import Exponential, PowerFunction, Profile, Uniform

SIGMA_REL_MAX = 12**-0.5

sigma_rels = st.floats(0.01, 0.28)
"""EMA lengths of practical interest."""

all_sigma_rels = st.floats(1e-4, SIGMA_REL_MAX)
"""The whole domain in which accuracy is promised."""

power_functions = sigma_rels.map(PowerFunction)


def profiles(t: float = 1.0) -> st.SearchStrategy[Profile]:
    """Any built-in profile whose width fits a history of length ``t``."""
    return st.one_of(
        power_functions,
        st.floats(0.01, 5).map(lambda fraction: Exponential(fraction * t)),
        st.floats(0.01, 1).map(Uniform),
        st.floats(0.1, 2).map(lambda amount: Uniform(amount * t, relative=False)),
    )


@st.composite
def update_times(draw: st.DrawFn, max_size: int = 40) -> np.ndarray[Any, Any]:
    """Irregular positive increasing times, from steps of very different lengths."""
    steps = draw(st.lists(st.floats(-3, 2), min_size=1, max_size=max_size))
    return np.cumsum(10 ** np.array(steps))


@st.composite
def stored_averages(
    draw: st.DrawFn, min_times: int = 1, max_times: int = 6
) -> list[tuple[float, float]]:
    """(t, σ_rel) of snapshots: up to four tracks at uneven times, none nearly the same.

    Times at least a tenth apart and tracks at least a third keep the condition number below
    about 1e7, so that rounding leaves eight digits of the coefficients.
    """
    steps = draw(st.lists(st.floats(0.3, 3), min_size=min_times, max_size=max_times))
    tracks = draw(st.lists(st.sampled_from([0.03, 0.05, 0.1, 0.2]), min_size=1, unique=True))
    return [(float(t), s) for t in np.cumsum(steps) for s in tracks]


noise_levels = st.floats(-10, -4).map(lambda exponent: 10**exponent)
"""Variance of storage rounding, relative to the movement in one unit of t."""
