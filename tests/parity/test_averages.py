"""Every tracker against an explicit float64 sum over the full history."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from posthoc_ema import EMA, Exponential, PowerFunction, beta
from tests.parity.runs import (
    KINDS,
    TIMES,
    as_float64,
    assert_average,
    by_name,
    explicit_average,
    random_walk,
    rounding_bound,
)

SHAPES = {"a.weight": (5, 3), "a.bias": (3,), "b.c.scale": ()}


def run(kind: str, ema: EMA, history: list[Any], times: list[float]) -> None:
    model = KINDS[kind].make(history[0])
    for t, weights in zip(times, history, strict=True):
        model = KINDS[kind].move(model, weights)
        ema.update(model, t=t)


@pytest.mark.parametrize("clock", TIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_average_is_the_explicit_sum(kind: str, clock: str) -> None:
    times = TIMES[clock]
    history = random_walk(len(times), SHAPES)
    ema = EMA(sigma_rel=(0.05, 0.10, 0.25))
    run(kind, ema, history, times)
    for sigma_rel in ema.sigma_rel:
        expected = explicit_average(PowerFunction(sigma_rel), times, history)
        found = by_name(kind, ema.average(sigma_rel), list(SHAPES))
        assert_average(found, expected, len(times))


def test_the_comparison_notices_a_clock_that_is_off_by_one() -> None:
    # The twin: the mistake of counting from t + 1 lies far outside the tolerance.
    times = TIMES["every step"]
    history = random_walk(len(times), SHAPES)
    ema = EMA(sigma_rel=0.1)
    run("numpy", ema, history, [t + 1 for t in times])
    with pytest.raises(AssertionError, match="is off by"):
        assert_average(
            ema.average(), explicit_average(PowerFunction(0.1), times, history), len(times)
        )


def test_updating_every_tenth_step_keeps_the_length() -> None:
    # A fixed decay per call, 100 calls apart, would turn 0.05 into a far longer average.
    times = list(range(10, 4001, 10))
    ema = EMA(sigma_rel=0.05)
    for t in times:
        ema.update({"w": np.array([t, t**2], np.float64)}, t=t)
    mean, second = ema.average()["w"]
    relative = np.sqrt(second - mean**2) / times[-1]
    # The grid itself adds to the width, by (10/4000)²/12 under the root: far below 1e-3.
    assert abs(relative - 0.05) < 1e-3


@pytest.mark.parametrize("kind", ["torch module", "numpy", "jax mapping"])
@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.2886])
def test_one_hot_probe_shows_the_profile(kind: str, sigma_rel: float) -> None:
    # A parameter that is one-hot in the step: its average is the profile itself.
    times = TIMES["irregular"]
    steps = len(times)
    ema = EMA(sigma_rel=sigma_rel)
    run(kind, ema, [{"w": row} for row in np.eye(steps)], times)
    found = as_float64(ema.average(sigma_rel)["w"])
    gamma = PowerFunction(sigma_rel).gamma
    edges = (np.concatenate([[0.0], times]) / times[-1]) ** (gamma + 1)
    np.testing.assert_allclose(found, np.diff(edges), rtol=0, atol=rounding_bound(steps, 1))
    # All weights are rounded shares of one: the sum is off by less than each of them together.
    assert abs(found.sum() - 1) < 1e-5


def test_classical_ema_as_a_track() -> None:
    profile = Exponential(halflife=7.5)
    times = TIMES["irregular"]
    history = random_walk(len(times), SHAPES)
    ema = EMA(sigma_rel=profile)
    run("numpy", ema, history, times)
    assert_average(ema.average(), explicit_average(profile, times, history), len(times))


def test_beta_and_the_tracker_agree() -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update({"w": np.zeros(1)}, t=30)
    ema.update({"w": np.ones(1)}, t=40)
    assert ema.average()["w"][0] == pytest.approx(1 - float(beta(0.1, 40, 10)), rel=1e-14)


# Low precision -------------------------------------------------------------------------------

TORCH_DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
NUMPY_DTYPES = [
    np.float64,
    np.float32,
    np.float16,
    np.complex64,
    np.complex128,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]
JAX_DTYPES = [
    jnp.float32,
    jnp.bfloat16,
    jnp.float16,
    jnp.complex64,
    jnp.float8_e4m3fn,
    jnp.float8_e5m2,
]


def complex_walk(steps: int) -> list[dict[str, Any]]:
    parts = zip(
        random_walk(steps, {"w": (4, 3), "v": (2,)}, seed=1),
        random_walk(steps, {"w": (4, 3), "v": (2,)}, seed=2),
        strict=True,
    )
    return [{name: re[name] + 1j * im[name] for name in re} for re, im in parts]


def walk_for(is_complex: bool, steps: int) -> list[dict[str, Any]]:
    return complex_walk(steps) if is_complex else random_walk(steps, {"w": (4, 3), "v": (2,)})


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_torch_types(dtype: torch.dtype) -> None:
    # Averages are exact for the values the model holds, whatever its type rounds away.
    history = [
        {name: torch.tensor(w).to(dtype) for name, w in weights.items()}
        for weights in walk_for(dtype.is_complex, 40)
    ]
    ema = EMA(sigma_rel=0.1)
    for weights in history:
        ema.update(weights)
    double = dtype in (torch.float64, torch.complex128)
    values = [{n: as_float64(w) for n, w in weights.items()} for weights in history]
    expected = explicit_average(PowerFunction(0.1), range(1, 41), values)
    found = ema.average()
    assert_average(found, expected, 40, np.float64 if double else np.float32)
    kept = (
        (torch.complex128 if double else torch.complex64)
        if dtype.is_complex
        else (torch.float64 if double else torch.float32)
    )
    assert {value.dtype for value in found.values()} == {kept}


@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=lambda d: np.dtype(d).name)
def test_numpy_types(dtype: Any) -> None:
    is_complex = np.dtype(dtype).kind == "c"
    history = [{n: w.astype(dtype) for n, w in ws.items()} for ws in walk_for(is_complex, 40)]
    ema = EMA(sigma_rel=0.1)
    for weights in history:
        ema.update(weights)
    double = dtype in (np.float64, np.complex128)
    expected = explicit_average(PowerFunction(0.1), range(1, 41), history)
    found = ema.average()
    assert_average(found, expected, 40, np.float64 if double else np.float32)
    single, wide = ("complex64", "complex128") if is_complex else ("float32", "float64")
    assert {value.dtype.name for value in found.values()} == {wide if double else single}


@pytest.mark.parametrize("dtype", JAX_DTYPES, ids=lambda d: np.dtype(d).name)
def test_jax_types(dtype: Any) -> None:
    is_complex = np.dtype(dtype).kind == "c"
    history = [
        {n: jnp.asarray(w).astype(dtype) for n, w in ws.items()} for ws in walk_for(is_complex, 40)
    ]
    ema = EMA(sigma_rel=0.1)
    for weights in history:
        ema.update(weights)
    values = [{n: as_float64(w) for n, w in weights.items()} for weights in history]
    found = ema.average()
    assert_average(found, explicit_average(PowerFunction(0.1), range(1, 41), values), 40)
    assert {value.dtype.name for value in found.values()} == {
        "complex64" if is_complex else "float32"
    }


def test_jax_float64_is_kept_in_float64() -> None:
    with jax.enable_x64(True):
        history = random_walk(40, {"w": (4, 3)})
        ema = EMA(sigma_rel=0.1)
        for weights in history:
            ema.update({"w": jnp.asarray(weights["w"], dtype=jnp.float64)})
        found = ema.average()
        assert found["w"].dtype == jnp.float64
        expected = explicit_average(PowerFunction(0.1), range(1, 41), history)
        assert_average(found, expected, 40, np.float64)


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_a_long_bfloat16_run_does_not_stand_still(framework: str) -> None:
    # An average kept in bfloat16 stays at exactly 1.0: each step is below its rounding.
    steps = 2000 if framework == "jax" else 20000  # a jitted call for each: slower, as telling
    ramp = np.linspace(1, 2, steps).astype(ml_dtypes.bfloat16)
    convert: Any = {
        "numpy": lambda x: np.full(3, x),
        "torch": lambda x: torch.full((3,), float(x), dtype=torch.bfloat16),
        "jax": lambda x: jnp.full(3, x, jnp.bfloat16),
    }[framework]
    levels = {value: {"w": convert(value)} for value in np.unique(ramp)}
    ema = EMA(sigma_rel=0.05)
    for value in ramp:
        ema.update(levels[value])
    weights = PowerFunction(0.05).weights(np.arange(1, steps + 1))
    expected = float(weights @ ramp.astype(np.float64))
    assert expected == pytest.approx(1.947, abs=2e-3)
    # Late updates have weight 9e-4; float32 rounds each at 6e-8, of which some 1/9e-4 add up.
    np.testing.assert_allclose(as_float64(ema.average()["w"]), expected, rtol=0, atol=1.3e-4)


def test_numpy_arrays_need_not_be_contiguous() -> None:
    history = random_walk(20, {"t": (4, 6), "f": (3, 5), "s": (8, 4)})
    layouts = {
        "t": lambda w: np.ascontiguousarray(w.T).T,
        "f": np.asfortranarray,
        "s": lambda w: np.repeat(w, 2, axis=1)[:, ::2],
    }
    ema = EMA(sigma_rel=0.1)
    for weights in history:
        model = {n: layouts[n](w) for n, w in weights.items()}
        assert not any(w.flags.c_contiguous for w in model.values())
        ema.update(model)
    expected = explicit_average(PowerFunction(0.1), range(1, 21), history)
    assert_average(ema.average(), expected, 20, np.float64)


def test_big_endian_arrays_keep_their_values() -> None:
    ema = EMA(sigma_rel=0.1)
    for value in (1, 2, 3):
        ema.update({"w": np.full(2, value, ">f4"), "n": np.full(2, value, ">i8")})
    expected = float(PowerFunction(0.1).weights([1, 2, 3]) @ [1, 2, 3])
    np.testing.assert_allclose(ema.average()["w"], expected, rtol=1e-6)  # ten float32 roundings
    np.testing.assert_array_equal(ema.average()["n"], 3)


@pytest.mark.parametrize("kind", ["torch", "numpy", "jax"])
def test_integers_are_copied(kind: str) -> None:
    convert: Any = {"torch": torch.tensor, "numpy": np.array, "jax": jnp.array}[kind]
    ema = EMA(sigma_rel=0.1)
    for count in (2000, 2036):
        ema.update({"w": convert([1.0]), "n": convert([count]), "on": convert([count > 2000])})
    average = ema.average()
    assert int(average["n"][0]) == 2036
    assert bool(average["on"][0])
