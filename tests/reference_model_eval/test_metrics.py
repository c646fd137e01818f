"""Fréchet distance: closed forms, what it must notice, merging, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from reference_model.metrics import FeatureStatistics, frechet_distance, mean_and_error


def statistics_of(features: NDArray[np.float64]) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def with_moments(
    rng: np.random.Generator, mean: NDArray[np.float64], root: NDArray[np.float64]
) -> FeatureStatistics:
    """Samples whose mean is exactly `mean` and whose covariance is exactly `root @ root.T`."""
    raw = rng.standard_normal((200, len(mean)))
    raw -= raw.mean(axis=0)
    whitener = np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False)))
    return statistics_of(raw @ whitener.T @ root.T + mean)


def assert_same_statistics(a: FeatureStatistics, b: FeatureStatistics) -> None:
    assert a.count == b.count
    # Both are sums of 1,000 float64 terms of size about 1 in another order: a few ulp each.
    np.testing.assert_allclose(a.mean, b.mean, rtol=0, atol=1e-13)
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=0, atol=1e-12)


def test_frechet_distance_of_diagonal_gaussians_has_its_closed_form():
    rng = np.random.default_rng(0)
    mean_1, mean_2 = rng.standard_normal((2, 8))
    std_1, std_2 = rng.uniform(0.2, 3.0, (2, 8))
    got = frechet_distance(
        with_moments(rng, mean_1, np.diag(std_1)), with_moments(rng, mean_2, np.diag(std_2))
    )
    expected = ((mean_1 - mean_2) ** 2).sum() + ((std_1 - std_2) ** 2).sum()
    # Square roots of eigenvalues turn 1e-15 relative rounding into at most about 1e-13 here.
    assert got == pytest.approx(expected, rel=1e-11)


def test_frechet_distance_of_correlated_gaussians_matches_the_matrix_square_root():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    rng = np.random.default_rng(1)
    root_1, root_2 = rng.standard_normal((2, 12, 12))
    a = with_moments(rng, np.zeros(12), root_1)
    b = with_moments(rng, np.ones(12), root_2)
    product_root = sqrtm(a.covariance @ b.covariance).real
    expected = 12 + np.trace(a.covariance + b.covariance - 2 * product_root)
    # sqrtm of a non-symmetric matrix is the less exact side: 1e-9 relative is its usual error.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_is_that_of_torchmetrics():
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Features(torch.nn.Module):  # type: ignore[misc]
        num_features = 6

        def forward(self, images):
            return images.float().flatten(1)

    rng = np.random.default_rng(8)
    real, made = rng.integers(0, 256, (120, 1, 2, 3)), rng.integers(0, 200, (90, 1, 2, 3))
    theirs = fid.FrechetInceptionDistance(feature=Features(), antialias=False)
    theirs.set_dtype(torch.float64)
    theirs.update(torch.tensor(real, dtype=torch.uint8), real=True)
    theirs.update(torch.tensor(made, dtype=torch.uint8), real=False)
    ours = frechet_distance(
        statistics_of(real.reshape(120, 6).astype(float)),
        statistics_of(made.reshape(90, 6).astype(float)),
    )
    # Theirs forms covariances from sums of squares, rounds to float32 at the end, and takes
    # eigenvalues of a matrix that is not symmetric.
    assert float(theirs.compute()) == pytest.approx(ours, rel=1e-5)


def test_frechet_distance_is_symmetric_and_zero_to_itself():
    rng = np.random.default_rng(2)
    a = statistics_of(rng.standard_normal((300, 16)) @ rng.standard_normal((16, 16)))
    b = statistics_of(rng.standard_normal((200, 16)))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    # Near zero two traces of size about 250 cancel: 1e-10 is a few hundred of their ulp.
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)


def test_frechet_distance_survives_features_that_are_constant():
    rng = np.random.default_rng(3)
    features = rng.standard_normal((100, 6))
    features[:, 4:] = 0.0  # dead units of the feature network
    shifted = features + np.array([1.0, 0, 0, 0, 0, 0])
    assert frechet_distance(statistics_of(features), statistics_of(shifted)) == pytest.approx(
        1.0, abs=1e-10
    )


@pytest.mark.parametrize("sizes", [(1000,), (1, 999), (400, 1, 599), (250, 250, 250, 250)])
def test_batches_give_the_statistics_of_one_pass(sizes: tuple[int, ...]):
    features = np.random.default_rng(4).standard_normal((1000, 5)) + 3.0
    batched = FeatureStatistics(5)
    for part in np.split(features, np.cumsum(sizes)[:-1]):
        batched.update(part)
    assert_same_statistics(batched, statistics_of(features))
    np.testing.assert_allclose(batched.covariance, np.cov(features, rowvar=False), atol=1e-12)


def test_merging_parts_gives_the_statistics_of_one_pass():
    features = np.random.default_rng(5).standard_normal((1000, 5)) * [1, 10, 1, 1, 1] - 7.0
    parts = [statistics_of(part) for part in np.split(features, [100, 101, 700])]
    merged = FeatureStatistics(5)
    for part in parts:
        merged.merge(part)
    np.testing.assert_allclose(merged.mean, features.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), atol=1e-10)
    assert [part.count for part in parts] == [100, 1, 599, 300], "merging changed its argument"


def test_a_large_common_offset_does_not_destroy_the_covariance():
    features = np.random.default_rng(6).standard_normal((500, 3))
    far = statistics_of(features + 1e6)
    # Adding 1e6 rounds each value to 1e-10; sums of raw squares would be wrong by about 1e-2.
    np.testing.assert_allclose(far.covariance, statistics_of(features).covariance, atol=1e-8)


def test_too_few_images_are_refused_with_the_number_needed():
    rng = np.random.default_rng(7)
    enough, short = (statistics_of(rng.standard_normal((n, 32))) for n in (33, 32))
    with pytest.raises(
        ValueError,
        match=r"second set has 32 images, but a Fréchet distance of 32 features .* at least 33",
    ):
        frechet_distance(enough, short)
    with pytest.raises(ValueError, match="first set has 32 images"):
        frechet_distance(short, enough)
    assert frechet_distance(enough, enough) == pytest.approx(0.0, abs=1e-10)  # the bound is sharp


def test_broken_features_are_refused():
    statistics = FeatureStatistics(2)
    with pytest.raises(ValueError, match=r"1 of 3 feature vectors hold NaN or infinity"):
        statistics.update(np.array([[0.0, 1.0], [np.nan, 0.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"features must have shape \[N, 2\] \(got \(4, 3\)\)"):
        statistics.update(np.zeros((4, 3)))
    assert statistics.count == 0


def test_mismatched_dimensions_are_refused():
    with pytest.raises(ValueError, match="cannot merge statistics of 3 features into 2"):
        FeatureStatistics(2).merge(FeatureStatistics(3))
    with pytest.raises(ValueError, match="features differ: 2 against 3 dimensions"):
        frechet_distance(FeatureStatistics(2), FeatureStatistics(3))
    with pytest.raises(ValueError, match="dim must be at least 1"):
        FeatureStatistics(0)


def test_a_covariance_needs_two_vectors():
    with pytest.raises(ValueError, match=r"at least 2 feature vectors \(got 1\)"):
        _ = statistics_of(np.zeros((1, 2))).covariance


def test_mean_and_error():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2, rel=1e-15)
    assert np.isnan(mean_and_error([1.0])[1])
    with pytest.raises(ValueError, match="non-empty list of measurements"):
        mean_and_error([])
