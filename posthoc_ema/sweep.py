"""Find the EMA length that serves best: the user's own metric over reconstructed lengths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log
from typing import Any

import numpy as np

from posthoc_ema.conversion import sigma_rel_to_gamma
from posthoc_ema.evaluations import Evaluate, Evaluations
from posthoc_ema.snapshots import SnapshotStore

MODES = ("min", "max")
MAX_BYTES = 4 << 30
"""Default bound on the weights that a sweep holds at a time."""


@dataclass(frozen=True, eq=False)
class SweepResult(Mapping[float, float]):
    """A metric by EMA length; a mapping from σ_rel to the metric, in order of length.

    Attributes:
        metrics: What ``evaluate`` returned, by σ_rel.
        predicted_errors: Predicted error of each reconstruction, relative to the weights' RMS:
            where it is large, the metric is not that of the true average.
        mode: ``"min"`` or ``"max"``: which metric is better.
    """

    metrics: Mapping[float, float]
    predicted_errors: Mapping[float, float]
    mode: str = "min"

    def __getitem__(self, sigma_rel: float) -> float:
        return self.metrics[sigma_rel]

    def __iter__(self) -> Iterator[float]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    @property
    def best(self) -> float:
        """The EMA length with the best metric.

        Raises:
            ValueError: If no metric is finite.
        """
        finite = [s for s, metric in self.metrics.items() if isfinite(metric)]
        if not finite:
            raise ValueError(
                f"none of the {len(self)} metrics is finite: check evaluate, or the weights"
            )
        return min(finite, key=lambda s: _loss(self.metrics[s], self.mode))

    @property
    def best_metric(self) -> float:
        """The metric at :attr:`best`."""
        return self.metrics[self.best]

    def table(self) -> str:
        """All lengths as text, the best marked."""
        best = self.best if any(isfinite(m) for m in self.metrics.values()) else None
        lines = [f"{'sigma_rel':>9}  {'metric':>12}  {'predicted error':>15}"]
        lines += [
            f"{s:9.5g}  {metric:12.6g}  {self.predicted_errors[s]:15.2e}"
            + ("  best" if s == best else "")
            for s, metric in self.metrics.items()
        ]
        return "\n".join(lines)

    __str__ = table


def sweep(
    snapshots: str | os.PathLike[str] | SnapshotStore,
    sigma_rels: Sequence[float],
    evaluate: Evaluate,
    *,
    mode: str = "min",
    t: float | None = None,
    method: str = "kriging",
    framework: str | None = None,
    names: str | Sequence[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    max_bytes: int = MAX_BYTES,
    progress: bool | None = None,
) -> SweepResult:
    """Evaluate a metric at several EMA lengths.

    The snapshots are read once for all lengths, or once for as many as fit into ``max_bytes``.

    Args:
        snapshots: The folder that ``EMA(snapshots=...)`` wrote, or a store.
        sigma_rels: EMA lengths as fractions of training time.
        evaluate: Takes a :class:`posthoc_ema.Reconstruction` and returns a number. NaN and
            infinity say that there is no verdict: such a length is never the best.
        mode: ``"min"`` if a smaller metric is better, or ``"max"``.
        t: Time of the averages; by default that of the last snapshot.
        method: As in :func:`posthoc_ema.reconstruct`.
        framework: As in :func:`posthoc_ema.reconstruct`.
        names: As in :func:`posthoc_ema.reconstruct`.
        cache: A JSON file that keeps each evaluation as soon as it is made: the same call,
            after an interruption, goes on from there. Use one file for one metric.
        max_bytes: Bound on the reconstructed weights held at a time; one length at least.
        progress: Show a progress bar; by default if standard error is a terminal.

    Returns:
        The metric at each length.

    Raises:
        ValueError: If an argument is outside its domain, or the cache belongs to other
            snapshots or another kind of reconstruction.
        SnapshotError: If a file is damaged or foreign; the message names it.

    Example:
        >>> def loss(weights):  # doctest: +SKIP
        ...     model.load_state_dict(weights.state_dict())
        ...     return validation_loss(model)
        >>> sweep("run/ema", [0.03, 0.05, 0.1, 0.2], loss).best  # doctest: +SKIP
        0.05
    """
    lengths = list(dict.fromkeys(float(s) for s in np.ravel(sigma_rels)))
    if not lengths:
        raise ValueError("sweep needs at least one sigma_rel (got none)")
    sigma_rel_to_gamma(lengths)  # raises outside the domain
    _check_mode(mode)
    evaluations = Evaluations(snapshots, evaluate, t, method, framework, names, cache, max_bytes)
    with _progress_bar(len(lengths), "sweep", progress) as bar:
        evaluations.make(lengths, bar)
    return _result(evaluations, lengths, mode)


def find_best(
    snapshots: str | os.PathLike[str] | SnapshotStore,
    evaluate: Evaluate,
    bounds: tuple[float, float] = (0.01, 0.25),
    budget: int = 12,
    *,
    mode: str = "min",
    tolerance: float = 0.02,
    t: float | None = None,
    method: str = "kriging",
    framework: str | None = None,
    names: str | Sequence[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    max_bytes: int = MAX_BYTES,
    progress: bool | None = None,
) -> SweepResult:
    """Find the EMA length with the best metric, in few evaluations.

    First a coarse grid, even in log σ_rel; then, one at a time, the minimum of the parabola
    through the best length and its neighbours, or the middle of the wider gap beside the best
    where that parabola says nothing new. A metric with noise makes the search stop early or
    near the best, but never lose it: the result is the best length that was evaluated.

    Args:
        snapshots: The folder that ``EMA(snapshots=...)`` wrote, or a store.
        evaluate: As in :func:`sweep`.
        bounds: Smallest and largest EMA length to consider; both are evaluated.
        budget: Most calls of ``evaluate``; those found in the cache from an interrupted search
            count, those from a :func:`sweep` are used and do not.
        mode: ``"min"`` if a smaller metric is better, or ``"max"``.
        tolerance: Stop when the neighbours of the best length are this near, relative to it.
        t: As in :func:`sweep`.
        method: As in :func:`sweep`.
        framework: As in :func:`sweep`.
        names: As in :func:`sweep`.
        cache: As in :func:`sweep`; the two may share a file.
        max_bytes: As in :func:`sweep`.
        progress: As in :func:`sweep`.

    Returns:
        All evaluations within the bounds; its ``best`` and ``best_metric`` are the answer.

    Raises:
        ValueError: If an argument is outside its domain, the cache belongs to other snapshots
            or another kind of reconstruction, or no metric is finite.
        SnapshotError: If a file is damaged or foreign; the message names it.

    Example:
        >>> found = find_best("run/ema", loss, cache="loss.json")  # doctest: +SKIP
        >>> found.best, found.best_metric  # doctest: +SKIP
        (0.0634, 2.107)
    """
    low, high = (float(b) for b in bounds)
    sigma_rel_to_gamma([low, high])  # raises outside the domain
    if not low < high:
        raise ValueError(f"bounds must rise (got {low}, {high})")
    if budget < 3:
        raise ValueError(f"budget must be at least 3 (got {budget})")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0 (got {tolerance})")
    _check_mode(mode)
    evaluations = Evaluations(snapshots, evaluate, t, method, framework, names, cache, max_bytes)

    def known() -> dict[float, float]:
        return {
            log(s): _loss(e.metric, mode) for s, e in evaluations.known.items() if low <= s <= high
        }

    def spent() -> int:
        return sum(e.searched for s, e in evaluations.known.items() if low <= s <= high)

    # The next length depends on what is known and nothing else, so that a search can go on where
    # it was interrupted. A grid point is left out where a sweep has been near.
    number = min(max(budget // 2, 3), 8)
    spacing = log(high / low) / (number - 1)
    inner = np.geomspace(low, high, number)[1:-1].tolist()
    missing = [s for s in inner if all(abs(log(s) - x) > spacing / 2 for x in known())]
    missing = [s for s in (low, *missing, high) if s not in evaluations.known]
    with _progress_bar(budget, "find_best", progress) as bar:
        bar.update(min(spent(), budget))
        evaluations.make(missing[: max(budget - spent(), 0)], bar, searched=True)
        while spent() < budget:
            proposal = _propose(known(), tolerance)
            if proposal is None:
                break
            evaluations.make([min(max(exp(proposal), low), high)], bar, searched=True)
    result = _result(evaluations, [s for s in evaluations.known if low <= s <= high], mode)
    result.best  # noqa: B018 - raises if no metric is finite
    return result


def _propose(losses: Mapping[float, float], tolerance: float) -> float | None:
    """Where to look next, in log σ_rel; None once the neighbours of the best are near enough."""
    places = sorted(losses)
    best = min(range(len(places)), key=lambda i: losses[places[i]])
    if losses[places[best]] == inf:
        return None
    x = places[best]
    left, right = places[max(best - 1, 0)], places[min(best + 1, len(places) - 1)]
    if max(x - left, right - x) <= tolerance:
        return None
    around = np.array([left, x, right]) - x
    values = np.array([losses[left], losses[x], losses[right]])
    if left < x < right and np.isfinite(values).all():
        slope_left, slope_right = np.diff(values) / np.diff(around)
        curvature = (slope_right - slope_left) / (around[2] - around[0])
        if curvature > 0:
            vertex = x + around[0] / 2 - slope_left / (2 * curvature)
            # Next to a known length it would tell nothing, and noise decides where it is.
            if min(abs(vertex - place) for place in places) >= tolerance / 2:
                return float(vertex)
    return (left + x) / 2 if x - left >= right - x else (x + right) / 2


def _result(evaluations: Evaluations, lengths: Sequence[float], mode: str) -> SweepResult:
    known = {s: evaluations.known[s] for s in sorted(lengths)}
    return SweepResult(
        {s: e.metric for s, e in known.items()},
        {s: e.predicted_error for s, e in known.items()},
        mode,
    )


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)} (got {mode!r})")


def _loss(metric: float, mode: str) -> float:
    """The metric as something to minimise; what is no verdict is worse than everything."""
    if not isfinite(metric):
        return inf
    return metric if mode == "min" else -metric


def _progress_bar(total: int, what: str, show: bool | None) -> Any:
    from tqdm import tqdm

    # disable=None: only on a terminal.
    return tqdm(total=total, desc=what, disable=None if show is None else not show)
