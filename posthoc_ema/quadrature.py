"""Gauss-Legendre nodes and weights for integrals over training time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def panel_quadrature(
    breaks: ArrayLike, end: float, order: int = 16
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights for ∫₀^end, on panels graded towards both ends and every break.

    Profiles are steep at their end (a short EMA) or at 0 (a flat one): halving panels down to
    2⁻³⁰ of the interval resolves both.
    """
    points = np.unique(np.concatenate([[0.0, end], np.asarray(breaks, np.float64).ravel()]))
    halving = 0.5 ** np.arange(1, 31)
    unit = np.unique(np.concatenate([[0.0, 1.0], halving, 1 - halving]))
    edges = np.unique((points[:-1, None] + np.diff(points)[:, None] * unit).ravel())
    x, w = np.polynomial.legendre.leggauss(order)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (x + 1)).ravel(), (half * w).ravel()


def interval_quadrature(
    breaks: Sequence[float], end: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss-Legendre between neighbouring breaks, graded towards 0 and towards the end.

    Between snapshot times profiles are smooth, and few nodes integrate them to rounding,
    except in the outer intervals and where there are few of them.
    """
    inner = np.unique([b for b in breaks if 0 < b < end])
    edges = np.concatenate([[0.0], inner, [end]])
    order = int(np.clip(1024 // len(edges), 4, 24))
    first, last = edges[1], end - edges[-2]
    # Late in a long run profiles vary little from one snapshot to the next; early they do.
    coarse_from, coarse_to = (inner[15], inner[-16]) if len(inner) > 32 else (end, end)
    halving = 0.5 ** np.arange(1, 13)
    edges = np.unique(np.concatenate([edges, first * halving, end - last * halving]))
    coarse = (edges[:-1] >= coarse_from) & (edges[1:] <= coarse_to)
    nodes, weights = [], []
    for chosen, number in ((coarse, order), (~coarse, max(order, 16))):
        x, w = np.polynomial.legendre.leggauss(number)
        half = np.diff(edges)[chosen][:, None] / 2
        nodes.append((edges[:-1][chosen][:, None] + half * (x + 1)).ravel())
        weights.append((half * w).ravel())
    rising = np.argsort(np.concatenate(nodes))
    return np.concatenate(nodes)[rising], np.concatenate(weights)[rising]
