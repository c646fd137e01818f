"""A request beyond what the snapshots can support is answered, with a warning that says why."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from posthoc_ema import EMA, reconstruct


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve times of a random walk."""
    folder = tmp_path_factory.mktemp("beyond") / "ema"
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=2000).astype(np.float32)}
    ema = EMA(snapshots=folder, every=50)
    for _ in range(600):
        weights["w"] = weights["w"] + 0.01 * rng.normal(size=2000).astype(np.float32)
        ema.update(weights)
    return folder


def test_far_below_the_shortest_track(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"sigma_rel=0\.003 at t=600 is beyond") as caught:
        result = reconstruct(folder, 0.003)
    text = str(caught[0].message)
    assert f"predicted error is {result.predicted_error:.2g}" in text
    assert "(kept: 0.05, 0.1)" in text
    assert "no further apart than 1.8" in text
    assert "(they are 50 apart)" in text
    assert text in result.diagnostics["remarks"]
    assert result.predicted_error > 0.25 * result.diagnostics["nearest_error"]


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.07, 0.10, 0.25])
def test_what_is_supported_is_given_without_a_word(folder: Path, sigma_rel: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = reconstruct(folder, sigma_rel)
    assert result.diagnostics["remarks"] == ()


def test_the_nearest_snapshot_is_never_nearer(folder: Path) -> None:
    for result in reconstruct(folder, [0.02, 0.04, 0.06, 0.2]):
        assert result.predicted_error <= result.diagnostics["nearest_error"]
