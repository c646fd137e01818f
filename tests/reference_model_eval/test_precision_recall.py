"""Precision and recall: the paper's definition, what they must tell apart, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from reference_model import precision_recall as module
from reference_model.precision_recall import precision_recall

Array = NDArray[np.float64]


def by_definition(real: Array, generated: Array, k: int) -> tuple[float, float]:
    """One vector at a time, in float64."""

    def covered(queries: Array, centres: Array) -> float:
        count = 0
        for q in queries:
            for i, c in enumerate(centres):
                others = np.delete(centres, i, axis=0)
                radius = np.sort(np.linalg.norm(others - c, axis=1))[k - 1]
                if np.linalg.norm(q - c) <= radius:
                    count += 1
                    break
        return count / len(queries)

    return covered(generated, real), covered(real, generated)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("block", [7, 1024])
def test_it_is_what_the_definition_says(k: int, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", block)
    rng = np.random.default_rng(k)
    real = rng.standard_normal((60, 4))
    generated = 1.6 * rng.standard_normal((45, 4)) + 0.9
    expected = by_definition(real, generated, k)
    assert 0 < min(expected) <= max(expected) < 1  # both sides of both decisions occur
    # No distance of these is within float32 rounding of a radius, so the counts are the same.
    assert precision_recall(real, generated, k) == expected


def test_a_far_origin_changes_nothing():
    """Squares of features near 1,000 would leave float32 no digits of distances near 1."""
    rng = np.random.default_rng(0)
    real, generated = rng.standard_normal((2, 80, 6))
    near = precision_recall(real, generated)
    assert precision_recall(real + 1000, generated + 1000) == near


def test_narrow_sets_lack_recall_and_wide_ones_precision():
    rng = np.random.default_rng(1)
    real = rng.standard_normal((400, 3))
    same = precision_recall(real, rng.standard_normal((400, 3)))
    assert min(same) > 0.85  # measured 0.93 and 0.94
    narrow = precision_recall(real, 0.1 * rng.standard_normal((400, 3)))
    assert narrow.precision > 0.95
    assert narrow.recall < 0.05
    wide = precision_recall(real, 10 * rng.standard_normal((400, 3)))
    assert wide.precision < 0.1
    assert wide.recall > 0.9
    collapsed = precision_recall(real, np.tile(real[:1], (400, 1)))
    assert collapsed.precision == 1.0
    assert collapsed.recall <= 1 / 400  # a ball of no size holds its own centre at most


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (3, 9, r"k=3 need at least 4 images in each set \(got 3 real ones\)"),
        (9, 3, r"at least 4 images in each set \(got 3 generated ones\)"),
    ],
)
def test_too_few_images_are_refused_with_the_number_needed(real: int, generated: int, message: str):
    rng = np.random.default_rng(2)
    sets = rng.standard_normal((real, 2)), rng.standard_normal((generated, 2))
    with pytest.raises(ValueError, match=message):
        precision_recall(*sets)
    precision_recall(rng.standard_normal((4, 2)), rng.standard_normal((4, 2)))  # that is enough


def test_broken_features_are_refused():
    good = np.random.default_rng(3).standard_normal((9, 2))
    broken = good.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="generated images must be finite"):
        precision_recall(good, broken)
    with pytest.raises(ValueError, match=r"real images must be finite, of shape \[N, dim\]"):
        precision_recall(good[:, 0], good)
    with pytest.raises(ValueError, match="features differ: 2 against 1 dimensions"):
        precision_recall(good, good[:, :1])
    with pytest.raises(ValueError, match=r"k must be at least 1 \(got 0\)"):
        precision_recall(good, good, k=0)
