"""Pictures: what averages weight, what each snapshot contributes, how exact a result will be.

Each function draws on the matplotlib axes it is given, or on a figure of its own that needs no
display and no pyplot, and returns the axes: ``plot_error("run/ema").figure.savefig("a.png")``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.forecast import forecast
from posthoc_ema.profiles import Exponential, PowerFunction, Profile, Uniform
from posthoc_ema.reconstruct import Reconstruction
from posthoc_ema.snapshots import SnapshotStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

Store = str | os.PathLike[str] | SnapshotStore
Targets = Profile | float | Sequence[Profile | float]

TRUSTED_ERROR = 0.01
"""Default limit of the predicted error up to which :func:`plot_error` shades a range: a hundredth
of the weights' RMS. A convention, not a guarantee."""

_INK, _GREY = "0.2", "0.5"
_SIGMA_REL = r"$\sigma_\mathrm{rel}$"
_MARKERS, _DASHES = "osD^", ("-", "--", ":", "-.")
_FINE = 2000  # points of a curve
_TAIL = 0.05  # a profile is drawn up to this fraction of its width before its end
_PAD = 24  # of the title, with room for a caption below it


def plot_profiles(
    source: Store | Reconstruction | Sequence[Reconstruction],
    targets: Targets | None = None,
    *,
    t: float | None = None,
    method: str = "kriging",
    axes: Axes | None = None,
) -> Axes:
    """Draw how averages weight the training history: as wanted, and as the snapshots give it.

    Args:
        source: A folder or store of snapshots, or results of :func:`posthoc_ema.reconstruct`.
        targets: For a folder or store: EMA lengths or profiles, one or several; default
            0.03, 0.07 and 0.15.
        t: Time of the averages; default: the last snapshot's.
        method: As in :func:`posthoc_ema.reconstruct`.
        axes: Where to draw; default: a new figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    axes = _axes(axes)
    averages = _averages(source, targets, t, method)
    shortest = min(a.profile.relative_moments(a.t)[1] for a in averages)
    start = float(np.clip(_TAIL * shortest, 1e-6, 0.1))
    for average, colour in zip(averages, _colours(len(averages)), strict=True):
        age = _ages(average, start)
        tau = average.t * (1 - age)
        wanted = average.profile.density(tau, average.t)
        given = np.zeros_like(tau)
        for x, (s, profile) in zip(average.coefficients, average.inputs, strict=True):
            if x:
                given += x * profile.density(tau, s)
        # On a logarithmic axis areas are weights if densities are those of the logarithm.
        scale = average.t * age
        label = f"{average.label}: profile error {_percent(average.profile_error)}"
        axes.fill_between(age, scale * wanted, color=colour, alpha=0.25, linewidth=0)
        axes.plot(age, scale * given, color=colour, linewidth=1.6, label=label)
    times = np.unique([1 - s / a.t for a in averages for s, _ in a.inputs])
    shown = times[times >= start]
    axes.plot(shown, 0 * shown, "|", color=_INK, markersize=9, zorder=5, label="snapshot times")
    axes.axhline(0, color=_INK, linewidth=0.8, zorder=1)
    axes.set_title("Which part of training each average sees", loc="left", pad=_PAD)
    _caption(axes, "filled: wanted; line: combined from the snapshots; equal areas, equal weight")
    axes.set_xscale("log")
    axes.set_xlim(1, start)
    _round_ticks(axes, start, 1, (1, 3))
    axes.set_xlabel("time before the average (fraction of training so far)")
    axes.set_ylabel("weight per unit of log time")
    axes.legend(frameon=False)
    return axes


def plot_coefficients(
    source: Store | Reconstruction | Sequence[Reconstruction],
    targets: Targets | None = None,
    *,
    t: float | None = None,
    method: str = "kriging",
    axes: Axes | None = None,
) -> Axes:
    """Draw what each snapshot contributes to each average.

    Args:
        source: A folder or store of snapshots, or results of :func:`posthoc_ema.reconstruct`.
        targets: For a folder or store: EMA lengths or profiles, one or several; default
            0.03, 0.07 and 0.15.
        t: Time of the averages; default: the last snapshot's.
        method: As in :func:`posthoc_ema.reconstruct`.
        axes: Where to draw; default: a new figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    axes = _axes(axes)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.margins(y=0.06)
    averages = _averages(source, targets, t, method)
    tracks = list(dict.fromkeys(profile for a in averages for _, profile in a.inputs))
    styles = dict(zip(tracks, cycle(zip(_MARKERS, _DASHES, strict=True)), strict=False))
    for average, colour in zip(averages, _colours(len(averages)), strict=True):
        for track, (marker, dashes) in styles.items():
            points = [
                (s, x)
                for x, (s, profile) in zip(average.coefficients, average.inputs, strict=True)
                if profile == track
            ]
            axes.plot(
                *np.transpose(points), dashes, color=colour, marker=marker, markersize=4.5,
                linewidth=1, markeredgewidth=0,
            )  # fmt: skip
        l1 = np.abs(average.coefficients).sum()
        axes.plot([], [], color=colour, linewidth=4, label=f"{average.label}: Σ|x| = {l1:.3g}")
    for track, (marker, dashes) in styles.items():
        label = f"snapshots of {_label(track)}"
        axes.plot([], [], dashes, marker=marker, color=_INK, linewidth=1, label=label)
    axes.axhline(0, color=_INK, linewidth=0.8, zorder=1)
    axes.set_title("What each snapshot contributes to each average", loc="left", pad=_PAD)
    _caption(axes, "coefficients x sum to one; a large Σ|x| amplifies rounding in the snapshots")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_xlabel("time of the snapshot" + (f" ({averages[0].unit})" if averages[0].unit else ""))
    axes.set_ylabel("coefficient x (linear within ±0.01)")
    axes.legend(frameon=False)
    return axes


def plot_error(
    source: Store,
    sigma_rel: Sequence[float] | None = None,
    *,
    t: float | None = None,
    method: str = "kriging",
    max_error: float | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw the predicted error against the EMA length, and shade the range to be trusted.

    Args:
        source: A folder or store of snapshots.
        sigma_rel: Two or more EMA lengths: the curve reaches from the smallest to the largest;
            default 0.01 to 0.25.
        t: Time of the averages; default: the last snapshot's.
        method: As in :func:`posthoc_ema.reconstruct`.
        max_error: Lengths with at most this error are shaded; default
            :data:`TRUSTED_ERROR`.
        axes: Where to draw; default: a new figure.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    axes = _axes(axes)
    limit = TRUSTED_ERROR if max_error is None else max_error
    wanted = np.array((0.01, 0.25) if sigma_rel is None else sigma_rel, dtype=np.float64)
    low, high = wanted.min(), wanted.max()
    if not low < high:
        raise ValueError(f"the error is a curve over EMA lengths: give two or more (got {low:g})")
    lengths = np.clip(np.geomspace(low, high, 200), low, high)  # against rounding at the ends
    result = forecast(source, lengths.tolist(), t=t, method=method)
    unit = result.snapshots[0].run.unit
    (colour,) = _colours(1)

    trusted = result.predicted_error <= limit
    axes.fill_between(
        lengths, 0, 1, where=trusted, transform=axes.get_xaxis_transform(), color=colour,
        alpha=0.13, linewidth=0, label=f"trusted: at most {limit:g}",
    )  # fmt: skip
    axes.axhline(limit, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(lengths, result.predicted_error, color=colour, linewidth=2)
    tracks = dict.fromkeys(s.profile for s in result.snapshots)
    stored = [p.sigma_rel for p in tracks if isinstance(p, PowerFunction)]
    tracked = [s for s in stored if lengths[0] <= s <= lengths[-1]]
    axes.plot(
        tracked, np.zeros(len(tracked)), "^", transform=axes.get_xaxis_transform(), color=_INK,
        markersize=8, clip_on=False, zorder=5, label="tracked lengths",
    )  # fmt: skip
    axes.set_title("How exactly each EMA length can be reconstructed", loc="left", pad=_PAD)
    _caption(
        axes,
        f"at t = {result.t:,} {unit}, from {len(result.snapshots)} snapshots"
        if np.isfinite(result.predicted_error).all()
        else f"unknown at t = {result.t:,} {unit}: a single snapshot cannot tell",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(lengths[0], lengths[-1])
    _round_ticks(axes, lengths[0], lengths[-1], (1, 1.5, 2, 3, 5), extra=(0.25,))
    axes.grid(axis="y", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"EMA length {_SIGMA_REL} (fraction of training time)")
    axes.set_ylabel("predicted error (fraction of the weights' RMS)")
    axes.legend(frameon=False)
    return axes


@dataclass(frozen=True, eq=False)
class _Average:
    """One combination of snapshots, wherever it came from."""

    label: str
    profile: Profile
    t: float
    inputs: Sequence[tuple[float, Profile]]
    coefficients: NDArray[np.float64]
    profile_error: float
    unit: str | None = None


def _averages(source: Any, targets: Any, t: float | None, method: str) -> list[_Average]:
    results = [source] if isinstance(source, Reconstruction) else source
    if isinstance(results, (list, tuple)):
        if targets is not None or t is not None:
            raise TypeError("targets and t are for a folder or store; a result has its own")
        return [average for result in results for average in _of_result(result)]
    if targets is None:
        targets = (0.03, 0.07, 0.15)
    elif isinstance(targets, Profile) or np.ndim(targets) == 0:
        targets = [targets]
    found = forecast(source, targets, t=t, method=method)
    inputs, unit = [(s.t, s.profile) for s in found.snapshots], found.snapshots[0].run.unit
    solved = zip(
        found.profiles, found.solution.coefficients, found.solution.profile_error, strict=True
    )
    return [_Average(_label(p), p, found.t, inputs, x, float(e), unit) for p, x, e in solved]


def _of_result(result: Reconstruction) -> list[_Average]:
    found: list[tuple[str, Profile, str | None]]
    if not isinstance(result.profile, Mapping):
        found = [(_label(result.profile), result.profile, None)]
    else:
        found = [(f"{key}: {_label(p)}", p, key) for key, p in result.profile.items()]

    def part(values: Any, key: str | None) -> Any:
        return values if key is None else values[key]

    return [
        _Average(
            label,
            profile,
            result.t,
            result.inputs,
            part(result.coefficients, key),
            part(result.diagnostics["profile_error"], key),
        )
        for label, profile, key in found
    ]


def _label(profile: Profile) -> str:
    if isinstance(profile, PowerFunction):
        return f"{_SIGMA_REL} {profile.sigma_rel:.4g}"
    if isinstance(profile, Exponential):
        return f"exponential, half-life {profile.halflife:,.6g}"
    if isinstance(profile, Uniform):
        return f"uniform, window {profile.window:,.6g}"
    return "custom profile"


def _percent(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{100 * value:.{0 if value >= 0.1 else 1}f} %"


def _ages(average: _Average, start: float) -> NDArray[np.float64]:
    """Ages 1 - τ/t for a curve; both sides of each snapshot time, where combinations jump."""
    jumps = [*(s for s, _ in average.inputs), *average.profile.breakpoints(average.t)]
    after = 1 - np.array(jumps) / average.t
    ages = np.concatenate([np.geomspace(start, 1, _FINE), after - 1e-9, after + 1e-9])
    return np.unique(ages[(ages >= start) & (ages < 1)])


def _colours(number: int) -> list[Any]:
    """Colours in the order of viridis, told apart by the colour-blind and in grey."""
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0.12, 0.82, number) if number > 1 else [0.35]))


def _axes(axes: Axes | None) -> Axes:
    """The axes given, or those of a new figure, in one plain style."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "plots need matplotlib, which is not installed: pip install 'posthoc-ema[plots]'"
        ) from None
    if axes is None:
        axes = Figure(figsize=(8, 4.8), dpi=150, layout="constrained").add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _caption(axes: Axes, text: str) -> None:
    """A line in small print between title and picture."""
    axes.annotate(
        text, (0, 1), (0, 8), "axes fraction", textcoords="offset points", color=_GREY,
        fontsize="small",
    )  # fmt: skip


def _round_ticks(
    axes: Axes, low: float, high: float, digits: Sequence[float], extra: Sequence[float] = ()
) -> None:
    """Ticks at round numbers, written out, on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks = [digit * 10.0**k for k in range(-7, 1) for digit in digits] + list(extra)
    shown = [x for x in ticks if low * (1 - 1e-9) <= x <= high * (1 + 1e-9)]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.4g}")
