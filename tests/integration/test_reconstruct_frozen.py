"""Models of which only a small part moves: adapters, heads, quiet tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posthoc_ema import EMA, PowerFunction, SnapshotStore, reconstruct
from tests.parity.runs import explicit_average, random_walk, relative_rms


def fine_tune(folder: Path, base: Any, encoding: str = "float32", steps: int = 48) -> Any:
    """A frozen base and an adapter that moves; returns the adapter's history."""
    history = random_walk(steps, {"adapter": (100,)})
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=folder, every=6, encoding=encoding)
    for weights in history:
        ema.update({"base": base, "adapter": weights["adapter"].astype(np.float32)})
    return history


@pytest.mark.parametrize("encoding", ["float32", "float16"])
def test_an_adapter_beside_a_large_frozen_base(tmp_path: Path, encoding: str) -> None:
    # 100 moving weights among three million: no sample by size will see them.
    base = np.random.default_rng(0).normal(size=3_000_000).astype(np.float32)
    history = fine_tune(tmp_path, base, encoding)
    true = explicit_average(PowerFunction(0.07), range(1, 49), history)["adapter"]
    paper = reconstruct(tmp_path, 0.07, method="paper")
    kriging = reconstruct(tmp_path, 0.07)
    error = relative_rms(kriging.params["adapter"], true)
    assert error <= 1.1 * relative_rms(paper.params["adapter"], true)
    nearest = min(relative_rms(s.read("adapter"), true) for s in SnapshotStore(tmp_path).list())
    assert error < nearest / 5
    if encoding == "float32":
        # Sums of 16 float32 products of numbers up to five.
        assert np.abs(kriging.params["base"] - base).max() < 1e-5


def test_a_model_frozen_throughout(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path, every=5)
    weights = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for _ in range(30):
        ema.update({"w": weights})
    result = reconstruct(tmp_path, 0.07)
    np.testing.assert_allclose(result.params["w"], weights, rtol=1e-5)  # sums in float32
    assert result.predicted_error < 1e-6


def test_a_phase_in_which_nothing_moves(tmp_path: Path) -> None:
    # Warm-up with rate zero, then training: averages of the last part must not suffer.
    walk = random_walk(96, {"w": (2000,)})
    history = [walk[max(step - 60, 0)] for step in range(96)]
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path, every=6)
    for weights in history:
        ema.update({"w": weights["w"].astype(np.float32)})
    for sigma_rel in (0.03, 0.07, 0.2):
        true = explicit_average(PowerFunction(sigma_rel), range(1, 97), history)["w"]
        kriging = relative_rms(reconstruct(tmp_path, sigma_rel).params["w"], true)
        paper = relative_rms(reconstruct(tmp_path, sigma_rel, method="paper").params["w"], true)
        assert kriging <= 1.1 * paper


def test_weights_of_very_different_speed(tmp_path: Path) -> None:
    walk = random_walk(48, {"fast": (500,), "slow": (500,)})
    history = [{"fast": w["fast"], "slow": 5.0 + 1e-4 * w["slow"]} for w in walk]
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path, every=6)
    for weights in history:
        ema.update({name: w.astype(np.float64) for name, w in weights.items()})
    true = explicit_average(PowerFunction(0.07), range(1, 49), history)
    kriging = reconstruct(tmp_path, 0.07)
    paper = reconstruct(tmp_path, 0.07, method="paper")
    for name in ("fast", "slow"):
        assert relative_rms(kriging.params[name], true[name]) <= 1.1 * relative_rms(
            paper.params[name], true[name]
        )
