"""Features of a set of images: merging in any order, storing, and refusing other networks."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from reference_model import feature_set as module
from reference_model.feature_set import FeatureSet
from reference_model.metrics import FeatureStatistics, frechet_distance


def made_of(features: NDArray[np.float64], digest: str = "abc") -> FeatureSet:
    made = FeatureSet(features.shape[1], "network", digest)
    made.update(features)
    return made


def assert_same(a: FeatureSet, b: FeatureSet) -> None:
    assert len(a) == len(b)
    # Sums of a few hundred float64 terms of size about 10 in another order.
    np.testing.assert_allclose(a.statistics.mean, b.statistics.mean, rtol=0, atol=1e-13)
    np.testing.assert_allclose(a.statistics.covariance, b.statistics.covariance, rtol=1e-12)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_parts_of_processes_merge_in_any_order(order: tuple[int, ...], tmp_path: Path):
    features = np.random.default_rng(0).standard_normal((300, 4)) + np.array([5, 0, 0, -3])
    for i in range(3):
        made_of(features[i::3]).save(tmp_path / f"part{i}.npz")
    merged = FeatureSet(4, "network", "abc")
    for i in order:
        merged.merge(FeatureSet.load(tmp_path / f"part{i}.npz"))
    whole = made_of(features)
    assert_same(merged, whole)
    other = made_of(np.random.default_rng(1).standard_normal((200, 4))).statistics
    assert frechet_distance(merged.statistics, other) == pytest.approx(
        frechet_distance(whole.statistics, other), rel=1e-11
    )
    np.testing.assert_array_equal(
        np.sort(merged.sample, axis=0), np.sort(features.astype(np.float32), axis=0)
    )


def test_a_stored_set_is_the_same_to_the_last_bit(tmp_path: Path):
    features = np.random.default_rng(2).standard_normal((50, 3))
    stored = made_of(features)
    stored.save(tmp_path / "deep" / "set.npz")
    found = FeatureSet.load(tmp_path / "deep" / "set.npz")
    assert (found.network, found.digest, len(found)) == ("network", "abc", 50)
    np.testing.assert_array_equal(found.statistics.covariance, stored.statistics.covariance)
    np.testing.assert_array_equal(found.statistics.mean, stored.statistics.mean)
    np.testing.assert_array_equal(found.sample, stored.sample)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["set.npz"]


def test_an_empty_part_changes_nothing(tmp_path: Path):
    FeatureSet(3, "network", "abc").save(tmp_path / "empty.npz")
    empty = FeatureSet.load(tmp_path / "empty.npz")
    full = made_of(np.ones((2, 3)))
    full.merge(empty)
    assert len(full) == 2
    empty.merge(full)
    assert_same(empty, full)


def test_the_sample_is_bounded_and_the_moments_are_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SAMPLE", 25)
    features = np.random.default_rng(3).standard_normal((60, 2))
    made = FeatureSet(2, "network", "abc")
    for batch in np.split(features, 6):
        made.update(batch)
    np.testing.assert_array_equal(made.sample, features[:25].astype(np.float32))
    assert len(made) == 60


def test_features_of_another_network_are_not_mixed_in():
    features = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"features of network \(abc\), and those of network \(x"):
        made_of(features).merge(made_of(features, "xyz"))


@pytest.mark.parametrize("damage", ["missing", "truncated", "other arrays", "version", "pickle"])
def test_a_file_that_cannot_be_understood_is_named(tmp_path: Path, damage: str):
    path = tmp_path / "set.npz"
    made_of(np.ones((4, 2))).save(path)
    assert FeatureSet.is_file(path)
    arrays = dict(np.load(path))
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "other arrays":
        np.savez(path, images=np.zeros((2, 1, 8, 8)))
        assert not FeatureSet.is_file(path)
    elif damage == "version":
        np.savez(path, **{**arrays, "about": np.array('{"version": 99}')})
    else:
        np.savez(path, **{**arrays, "mean": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match=r"set\.npz cannot be read as statistics of features"):
        FeatureSet.load(path)


def test_arrays_that_do_not_fit_are_refused():
    arrays = FeatureStatistics(3).to_arrays()
    with pytest.raises(ValueError, match=r"mean of shape \(3,\) with a scatter of \(2, 2\)"):
        FeatureStatistics.from_arrays({**arrays, "scatter": np.zeros((2, 2))})
