"""Fréchet distance between two sets of images, from running statistics of their features."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray


class FeatureStatistics:
    """Mean and covariance of feature vectors, accumulated batch by batch in float64.

    Batches may have any sizes and parts may be merged in any order (other processes, other files):
    up to rounding the result is that of one pass over everything.

    Args:
        dim: Length of a feature vector.

    Attributes:
        count: Number of vectors seen.
        mean: Their mean ``[dim]``, float64.

    Source:
        Pairwise update of centred moments, Chan, Golub and LeVeque 1979. Sums of raw squares would
        lose half of the digits to cancellation when the mean is large.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"FeatureStatistics: dim must be at least 1 (got {dim})")
        self.dim = dim
        self.count = 0
        self.mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))  # sum of outer products of centred vectors

    def update(self, features: ArrayLike) -> None:
        """Add a batch of feature vectors.

        Args:
            features: Finite values, shape ``[N, dim]``, any float dtype.

        Raises:
            ValueError: If the shape is wrong or a value is not finite.
        """
        batch = np.asarray(features, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise ValueError(f"features must have shape [N, {self.dim}] (got {batch.shape})")
        if not np.isfinite(batch).all():
            bad = int((~np.isfinite(batch).all(axis=1)).sum())
            raise ValueError(
                f"{bad} of {len(batch)} feature vectors hold NaN or infinity; "
                "the images that gave them are broken, and a distance would hide it"
            )
        if len(batch):
            mean = batch.mean(axis=0)
            centred = batch - mean
            self._absorb(len(batch), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add everything that another accumulator has seen; it stays unchanged.

        Args:
            other: Statistics of the same feature dimension.

        Raises:
            ValueError: If the dimensions differ.
        """
        if other.dim != self.dim:
            raise ValueError(f"cannot merge statistics of {other.dim} features into {self.dim}")
        if other.count:
            self._absorb(other.count, other.mean, other._scatter)

    def _absorb(self, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> None:
        total = self.count + count
        if total == 0:
            return
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        between = np.outer(delta, delta) * (self.count * count / total)
        self._scatter = self._scatter + scatter + between
        self.count = total

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased covariance ``[dim, dim]``.

        Raises:
            ValueError: If fewer than two vectors were seen.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors (got {self.count})")
        return self._scatter / (self.count - 1)

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """Return what the statistics consist of, to be stored: float64 arrays by name."""
        return {"count": np.array(float(self.count)), "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float64]]) -> FeatureStatistics:
        """Rebuild what `to_arrays` returned.

        Raises:
            KeyError: If an array is missing.
            ValueError: If the shapes do not fit together.
        """
        mean, scatter = np.asarray(arrays["mean"]), np.asarray(arrays["scatter"])
        statistics = cls(len(np.atleast_1d(mean)))
        if mean.ndim != 1 or scatter.shape != (statistics.dim, statistics.dim):
            raise ValueError(f"a mean of shape {mean.shape} with a scatter of {scatter.shape}")
        statistics._absorb(int(arrays["count"]), mean, scatter)
        return statistics


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians fitted to features: lower is closer.

    ``|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)``. The trace of the square root is the sum of the square
    roots of the eigenvalues of ``Σ₁^½ Σ₂ Σ₁^½``, which is symmetric: two symmetric eigenvalue
    problems replace a general matrix square root, tens of times faster and always real.

    Finite samples bias the distance upwards, the more the fewer there are: compare only distances
    that were measured with the same numbers of images.

    Args:
        first: Statistics of one set of images, at least ``dim + 1`` of them.
        second: Statistics of the other set, same features, at least ``dim + 1`` images.

    Returns:
        The distance, at least zero up to rounding.

    Raises:
        ValueError: If the dimensions differ, or a set is too small for its covariance to have
            full rank.

    Source:
        Heusel et al. 2017, arXiv:1706.08500, Eq. 6 (FID, there with Inception features).
    """
    if first.dim != second.dim:
        raise ValueError(f"features differ: {first.dim} against {second.dim} dimensions")
    needed = first.dim + 1
    for place, statistics in (("first", first), ("second", second)):
        if statistics.count < needed:
            raise ValueError(
                f"the {place} set has {statistics.count} images, but a Fréchet distance of "
                f"{first.dim} features needs at least {needed}: with fewer, the covariance is "
                "singular; generate more images or use a narrower feature network"
            )

    covariance_1, covariance_2 = first.covariance, second.covariance
    values, vectors = np.linalg.eigh(covariance_1)
    root_1 = vectors * np.sqrt(np.maximum(values, 0.0))  # root_1 @ root_1.T is covariance_1
    # Rounding can leave eigenvalues that should be zero slightly below it.
    product_values = np.linalg.eigvalsh(root_1.T @ covariance_2 @ root_1)
    cross = np.sqrt(np.maximum(product_values, 0.0)).sum()
    shift = first.mean - second.mean
    spread = np.trace(covariance_1) + np.trace(covariance_2) - 2.0 * cross
    return float(shift @ shift + spread)


def mean_and_error(values: ArrayLike) -> tuple[float, float]:
    """Mean of repeated measurements and the standard error of that mean.

    Args:
        values: Measurements ``[N]``, N ≥ 1.

    Returns:
        The mean, and its standard error (NaN for a single measurement: the spread is unknown).

    Raises:
        ValueError: If there is none.
    """
    repeats = np.asarray(values, dtype=np.float64)
    if repeats.ndim != 1 or repeats.size == 0:
        raise ValueError(f"need a non-empty list of measurements (got shape {repeats.shape})")
    if repeats.size == 1:
        return float(repeats[0]), float("nan")
    return float(repeats.mean()), float(repeats.std(ddof=1) / np.sqrt(repeats.size))
