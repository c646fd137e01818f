"""Precision of stored and reconstructed weights, and the paper's method done by other means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from posthoc_ema import EMA, PowerFunction, SnapshotStore, reconstruct
from tests.parity.runs import Weights, as_float64, explicit_average, random_walk, record

SHAPES = {"w": (60, 5), "b": (7,), "s": ()}


def double(weights: Weights) -> Weights:
    return {name: np.asarray(w, np.float64) for name, w in weights.items()}


# Algorithm 3 of the paper, as printed: its own conversion, inner products and solve. ----------


def gamma_by_roots(sigma_rel: float) -> float:
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def inner(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> NDArray[np.float64]:
    ratio = t_a / t_b
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    maximum = np.maximum(t_a, t_b)
    numerator = (gamma_a + 1) * (gamma_b + 1) * ratio**exponent
    return numerator / ((gamma_a + gamma_b + 1) * maximum)


def algorithm_3(
    folder: Path, tracks: dict[str, float], sigma_rel: float, t: float
) -> dict[str, NDArray[np.float64]]:
    """From the files alone, read by the safetensors package; float64, rescaled to sum to one."""
    files, times, gammas = [], [], []
    for path in sorted(folder.glob("*.safetensors")):
        time, track = path.stem.removeprefix("t=").split("_sigma_rel=")
        if float(time) <= t:
            files.append(load_file(path))
            times.append(float(time))
            gammas.append(gamma_by_roots(tracks[track]))
    times_a, gammas_a = np.array(times), np.array(gammas)
    a = inner(times_a[:, None], gammas_a[:, None], times_a, gammas_a)
    b = inner(times_a, gammas_a, t, gamma_by_roots(sigma_rel))
    x = np.linalg.solve(a, b)
    x /= x.sum()
    return {
        name: np.asarray(sum(c * as_float64(f[name]) for c, f in zip(x, files, strict=True)))
        for name in files[0]
    }


@pytest.mark.parametrize("t", [96, 60, 50])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.13, 0.25])
def test_the_papers_method_is_algorithm_3(tmp_path: Path, sigma_rel: float, t: float) -> None:
    run = record(tmp_path / "ema", convert=double, shapes=SHAPES)
    expected = algorithm_3(run.folder, {"0.05": 0.05, "0.1": 0.10}, sigma_rel, t)
    result = reconstruct(run.folder, sigma_rel, t=t, method="paper")
    for name in SHAPES:
        assert result.params[name].dtype == np.float64
        # Two ways of solving a system of condition 1e4 in float64, times coefficients of 10.
        np.testing.assert_allclose(result.params[name], expected[name], rtol=0, atol=1e-10)


def test_the_two_methods_differ(tmp_path: Path) -> None:
    run = record(tmp_path / "ema", shapes=SHAPES)
    paper = reconstruct(run.folder, 0.07, method="paper")
    kriging = reconstruct(run.folder, 0.07)
    assert np.abs(paper.coefficients - kriging.coefficients).max() > 1e-3


# float64 -------------------------------------------------------------------------------------


def test_float64_models_are_reconstructed_in_float64(tmp_path: Path) -> None:
    run = record(tmp_path / "ema", convert=double, shapes=SHAPES)
    snapshots = SnapshotStore(run.folder).list()
    result = reconstruct(run.folder, 0.07)
    for name in SHAPES:
        exact = sum(
            np.longdouble(x) * s.read(name).astype(np.longdouble)
            for x, s in zip(result.coefficients, snapshots, strict=True)
        )
        assert result.params[name].dtype == np.float64
        difference = np.abs(result.params[name] - exact).max()
        # 16 products of numbers of about 3, each rounded to 2⁻⁵³.
        assert difference < 1e-12


def test_float64_averages_are_exact_to_float64(tmp_path: Path) -> None:
    # The stored averages themselves, against the explicit sum of the whole history.
    run = record(tmp_path / "ema", convert=double, shapes=SHAPES)
    for sigma_rel in (0.05, 0.10):
        result = reconstruct(run.folder, sigma_rel)
        true = run.true_average(PowerFunction(sigma_rel))
        for name in SHAPES:
            np.testing.assert_allclose(result.params[name], true[name], rtol=0, atol=1e-13)


def test_large_offsets_keep_their_small_movements(tmp_path: Path) -> None:
    # Weights near 1000 that move by 1e-6: lost where anything is done in float32.
    history = [{"w": 1000 + 1e-6 * w["w"]} for w in random_walk(48, {"w": (50,)})]
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path, every=6)
    for weights in history:
        ema.update(weights)
    true = explicit_average(PowerFunction(0.07), range(1, 49), history)["w"]
    found = reconstruct(tmp_path, 0.07).params["w"]
    # Sixteen times float64's rounding of 1000 suffices (2e-12); interpolation between
    # snapshots leaves a hundredth of one step's movement, 1e-7.
    assert np.abs(found - true).max() < 5e-9


# float16, bfloat16 ---------------------------------------------------------------------------


def types_of(folder: Path) -> list[dict[str, str]]:
    snapshots = SnapshotStore(folder).list()
    return [{name: entry.dtype for name, entry in s.entries.items()} for s in snapshots]


@pytest.mark.parametrize(("encoding", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_encodings_round_to_nearest_and_say_how_much(
    tmp_path: Path, encoding: str, bits: int
) -> None:
    exact = record(tmp_path / "exact", shapes={"w": (400, 30)})
    rounded = record(tmp_path / "rounded", shapes={"w": (400, 30)}, encoding=encoding)
    a, b = SnapshotStore(exact.folder).list(), SnapshotStore(rounded.folder).list()
    for first, second in zip(a, b, strict=True):
        w, v = first.read("w"), second.read("w")
        assert np.abs(w - v).max() <= np.abs(w).max() * 2.0**-bits
        measured = float(np.mean((w.astype(np.float64) - v) ** 2))
        # The statistic is summed in float32 chunks of a million; it steers an estimate.
        assert second.statistics["rounding_square"] == pytest.approx(measured, rel=1e-3)
        assert first.statistics["rounding_square"] == 0
        assert second.nbytes < 0.55 * first.nbytes
    assert {t["w"] for t in types_of(rounded.folder)} == {"F16" if bits == 11 else "BF16"}


@pytest.mark.parametrize("encoding", ["float16", "bfloat16"])
def test_rounded_snapshots_cost_what_rounding_costs(tmp_path: Path, encoding: str) -> None:
    run = record(tmp_path / "ema", shapes={"w": (400, 30)}, encoding=encoding)
    result = reconstruct(run.folder, 0.07)
    true = run.true_average(PowerFunction(0.07))["w"]
    error = float(np.sqrt(np.mean((result.params["w"] - true) ** 2) / np.mean(true**2)))
    assert error == pytest.approx(result.predicted_error, rel=0.35)


def test_values_beyond_float16_fall_back_to_float32(tmp_path: Path) -> None:
    # 1e5 would become infinity and reconstruct to NaN; 3e-8 would become 5.7e-8.
    walk = random_walk(48, {"large": (40,), "tiny": (40,), "plain": (40,)})
    history = [
        {"large": 1e5 * w["large"], "tiny": 3e-8 * w["tiny"], "plain": w["plain"]} for w in walk
    ]
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path, every=6, encoding="float16")
    for weights in history:
        ema.update({name: w.astype(np.float32) for name, w in weights.items()})
    assert types_of(tmp_path)[-1] == {"large": "F32", "tiny": "F32", "plain": "F16"}
    result = reconstruct(tmp_path, 0.07)
    exact = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path / "exact", every=6)
    for weights in history:
        exact.update(weights)
    expected = reconstruct(tmp_path / "exact", 0.07)
    for name in walk[0]:
        scale = np.abs(expected.params[name]).max()
        error = np.abs(result.params[name] - expected.params[name]).max() / scale
        # float32 keeps 1e-6 after solves with slightly other coefficients; float16 1e-3.
        assert error < (2e-3 if name == "plain" else 5e-3), name
        assert np.isfinite(result.params[name]).all()


@pytest.mark.parametrize("value", [65504.0, 65519.0, 65520.0, 1e5, 1e38, -7e4])
def test_no_finite_value_becomes_infinite(tmp_path: Path, value: float) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, encoding="float16")
    ema.update({"w": np.array([1, value, -1], np.float32), "v": np.ones(2, np.float32)})
    ema.snapshot()
    found = reconstruct(tmp_path, 0.1).params["w"]
    np.testing.assert_allclose(found, [1, value, -1], rtol=2.0**-11)


@pytest.mark.parametrize("encoding", ["float16", "bfloat16"])
def test_counters_and_buffers_are_not_encoded(tmp_path: Path, encoding: str) -> None:
    # In float16 a counter of 70,001 becomes infinity.
    net = torch.nn.BatchNorm1d(2)
    net.num_batches_tracked.fill_(70_001)
    net.running_var.fill_(1e-9)
    net.running_mean.fill_(1e9)
    net.register_buffer("big", torch.tensor([2**62 + 1, -(2**62) - 1]))
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, encoding=encoding)
    ema.update(net)
    ema.snapshot()
    for name, value in reconstruct(tmp_path, 0.1).buffers.items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_a_tensor_may_outgrow_float16_in_mid_run(tmp_path: Path) -> None:
    # Its type and its place then differ from file to file.
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path, encoding="float16")
    for step in range(1, 13):
        ema.update(
            {
                "a": np.full(5000, step, np.float32),
                "grows": np.full(3000, 10.0**step, np.float32),
                "z": np.full(2000, -step, np.float32),
                "n": np.array([step]),
            }
        )
        ema.snapshot()
    assert {t["grows"] for t in types_of(tmp_path)} == {"F16", "F32"}
    result = reconstruct(tmp_path, 0.07)
    snapshots = SnapshotStore(tmp_path).list()
    for name in ("a", "grows", "z"):
        parts = [x * s.read(name)[0] for x, s in zip(result.coefficients, snapshots, strict=True)]
        allowed = 1e-6 * np.abs(parts).sum()  # float32 sums of 24 terms
        assert np.abs(result.params[name] - sum(parts)).max() <= allowed, name
    written = reconstruct(tmp_path, 0.07, out=tmp_path / "out")
    for name, value in written.state_dict().items():
        np.testing.assert_array_equal(value, result.state_dict()[name])


def test_one_large_value_among_small_ones(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, encoding="float16")
    values = np.full(1000, 3e-8, np.float32)
    values[0] = 1.0  # so the tensor's RMS is large: float16 serves, to 2⁻²⁵ of it
    ema.update({"w": values})
    ema.snapshot()
    found = reconstruct(tmp_path, 0.1).params["w"]
    assert np.abs(found - values).max() < 2.0**-25


def test_bfloat16_holds_the_whole_range(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, encoding="bfloat16")
    values = np.array([1e38, 3.3895e38, 1e-38, 1e5, 3e-8, -1.0, 0.0], np.float32)
    ema.update({"w": values})
    ema.snapshot()
    found = reconstruct(tmp_path, 0.1).params["w"]
    np.testing.assert_allclose(found, values, rtol=2.0**-8)


def test_the_largest_float32_does_not_round_to_infinity_in_bfloat16(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, encoding="bfloat16")
    values = np.array([np.finfo(np.float32).max, 1.0], np.float32)
    ema.update({"w": values})
    ema.snapshot()
    np.testing.assert_allclose(reconstruct(tmp_path, 0.1).params["w"], values, rtol=2.0**-8)


def test_float64_values_beyond_float32_survive(tmp_path: Path) -> None:
    values = np.array([1e200, 1.0, -1e-200])
    for encoding in ("float32", "float16", "bfloat16"):
        folder = tmp_path / encoding
        ema = EMA(sigma_rel=0.1, snapshots=folder, encoding=encoding)
        ema.update({"w": values})
        ema.snapshot()
        found = reconstruct(folder, 0.1).params["w"]
        np.testing.assert_allclose(found, values, rtol=2.0**-8, atol=1e-45)


# Complex -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path, every=5)
    weights = torch.randn(3, 4, dtype=dtype)
    for _ in range(20):
        weights = weights + 0.1 * torch.randn_like(weights)
        ema.update({"w": weights, "s": weights[0, 0]})
    assert torch.equal(reconstruct(tmp_path, 0.05).params["w"], ema.average(0.05)["w"])
    result = reconstruct(tmp_path, 0.07)
    assert result.params["w"].dtype == dtype
    assert result.params["w"].shape == (3, 4)
    assert result.params["s"].shape == ()
    assert torch.equal(result.params["w"][0, 0], result.params["s"])


# Odd shapes ----------------------------------------------------------------------------------


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path, every=2)
    for step in range(8):
        ema.update({"none": np.zeros((0, 3)), "one": np.array(float(step)), "w": np.ones((1, 1))})
    state = reconstruct(tmp_path, 0.07).state_dict()
    assert state["none"].shape == (0, 3)
    assert state["one"].shape == ()
    assert state["w"].shape == (1, 1)


def test_a_model_larger_than_a_block(tmp_path: Path) -> None:
    # 600,001 values: several blocks of the pass, with a rest, in one tensor and across two.
    history = random_walk(3, {"a": (500_001,), "b": (3,), "c": (99_997,)})
    ema = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path, every=1, encoding="float16")
    for weights in history:
        ema.update({name: w.astype(np.float32) for name, w in weights.items()})
    result = reconstruct(tmp_path, [0.07, 0.2])
    snapshots = SnapshotStore(tmp_path).list()
    for r in result:
        for name in history[0]:
            expected = sum(
                x * s.read(name).astype(np.float64)
                for x, s in zip(r.coefficients, snapshots, strict=True)
            )
            bound = 1e-6 * r.diagnostics["l1_norm"] * 5  # float32 sums of 6 terms of about 5
            assert np.abs(r.params[name] - expected).max() <= bound
