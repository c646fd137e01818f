"""Precision and recall of generated images: how good they are, and how much they miss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

NEIGHBOURS = 3
"""k of the paper: an image stands for its surroundings up to the k-th nearest of its own set."""

BLOCK = 1024
"""Rows of the distance matrix that are in memory at once."""

Features = NDArray[np.float32]


class PrecisionRecall(NamedTuple):
    """Two fractions, from 0 to 1.

    Attributes:
        precision: Of generated images that lie where real ones are: quality.
        recall: Of real images that lie where generated ones are: diversity.
    """

    precision: float
    recall: float


def precision_recall(real: ArrayLike, generated: ArrayLike, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Compare two sets of feature vectors by their manifolds.

    A set's manifold is the union of balls around its vectors, each of which reaches to the k-th
    nearest other vector of the set. Distances are computed in float32, in blocks; the memory needed
    is that of 1,024 rows of the distance matrix.

    Both fractions depend on the numbers of images: compare only results of equal numbers.

    Args:
        real: Features of real images, ``[M, dim]``, M above k.
        generated: Features of generated ones, ``[N, dim]``, N above k.
        k: Which neighbour a ball reaches to, at least 1.

    Returns:
        Precision and recall.

    Raises:
        ValueError: If a set is too small, holds NaN or infinity, or the dimensions differ.

    Source:
        Kynkäänniemi et al. 2019, arXiv:1904.06991, Eq. 1 and 2; k = 3 as there.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1 (got {k})")
    sets = {"real": np.asarray(real), "generated": np.asarray(generated)}
    for name, features in sets.items():
        if features.ndim != 2 or not np.isfinite(features).all():
            raise ValueError(
                f"features of {name} images must be finite, of shape [N, dim] "
                f"(got shape {features.shape})"
            )
        if len(features) <= k:
            raise ValueError(
                f"precision and recall with k={k} need at least {k + 1} images in each set "
                f"(got {len(features)} {name} ones)"
            )
    first, second = sets.values()
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features differ: {first.shape[1]} against {second.shape[1]} dimensions")
    # Distances do not depend on the origin, but the digits that float32 leaves of them do.
    centre = np.mean(first, axis=0, dtype=np.float64)
    a, b = ((features - centre).astype(np.float32) for features in (first, second))
    return PrecisionRecall(
        precision=_fraction_inside(b, a, _radii(a, k)), recall=_fraction_inside(a, b, _radii(b, k))
    )


def _radii(features: Features, k: int) -> Features:
    """Squared distance of each vector to its k-th nearest other one, ``[N]``."""
    radii = np.empty(len(features), np.float32)
    for rows, distances in _distances(features, features):
        own = np.arange(rows.start, rows.stop)
        distances[own - rows.start, own] = np.inf  # no vector is its own neighbour
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def _fraction_inside(queries: Features, centres: Features, radii: Features) -> float:
    """Part of the queries that lie in at least one ball."""
    inside = sum(int((d <= radii).any(axis=1).sum()) for _, d in _distances(queries, centres))
    return inside / len(queries)


def _distances(first: Features, second: Features) -> Iterator[tuple[slice, Features]]:
    """Squared distances of some rows of `first` at a time to all of `second`."""
    squares = np.square(second).sum(axis=1)
    for start in range(0, len(first), BLOCK):
        rows = slice(start, min(start + BLOCK, len(first)))
        block = first[rows]
        products = block @ second.T
        yield rows, np.square(block).sum(axis=1)[:, None] + squares - 2 * products
