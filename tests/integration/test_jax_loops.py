"""JAX loops: pure averages in jit and scan, Optax, Flax NNX, Equinox, and their snapshots."""

from __future__ import annotations

import doctest
import importlib
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_equal
from page_sections import assert_averaging_helped, run_example, run_section

from posthoc_ema import (
    EMA,
    Exponential,
    PowerFunction,
    SnapshotStore,
    StateError,
    StructureError,
    Uniform,
    reconstruct,
)
from posthoc_ema.integrations.jax import EMAState, PureEMA, SnapshotWriter, current_time, put_into
from posthoc_ema.integrations.optax import averaged, ema_state

ROUNDING = "float32 weights and averages, 1e-7 for each of tens of updates"


def params_at(step: int) -> Any:
    rng = np.random.default_rng(step)
    return {
        "layers": [jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)],
        "half": jnp.asarray(rng.normal(size=4), jnp.bfloat16),
        "c": jnp.asarray(rng.normal(size=2) * 1j, jnp.complex64),
        "n": jnp.array(step),
    }


def assert_trees_close(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert_close(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-6, reason=ROUNDING)


@pytest.mark.parametrize("profiles", [(0.05, 0.10), (Exponential(halflife=7.0), 0.2)])
def test_pure_averages_equal_those_of_ema(profiles: Any) -> None:
    tracker, ema = PureEMA(profiles), EMA(profiles)
    update = jax.jit(tracker.update, donate_argnums=0)
    state, t = tracker.init(params_at(0)), 0
    for step in range(1, 31):
        delta = 1 + step * step % 7
        t += delta
        state = update(state, params_at(step), delta)
        ema.update(params_at(step), t=t)
    assert current_time(state) == ema.t == t
    for profile, average in zip(profiles, state.averages, strict=True):
        assert_trees_close(average, ema.average(profile))


@pytest.mark.parametrize("start", [0, 1000, 2**31 - 5, 2**40])
def test_the_profile_under_scan_at_any_time(start: int) -> None:
    """One-hot parameters: the average is the profile's share of each step."""
    steps, delta = 20, 2**26 if start > 2**30 else 1
    tracker = PureEMA(0.1)

    @jax.jit
    def run(state: EMAState) -> EMAState:
        def body(state: EMAState, step: Any) -> tuple[EMAState, None]:
            return tracker.update(state, jax.nn.one_hot(step, steps), delta), None

        return jax.lax.scan(body, state, jnp.arange(steps))[0]

    state = run(tracker.init(jnp.zeros(steps), t=start))
    end = start + steps * delta
    assert current_time(state) == end
    times = [start + (k + 1) * delta for k in range(steps)]
    # What came before the first update counts as its weights did.
    cumulative = [float(PowerFunction(0.1).cumulative(t, end)) for t in times]
    expected = np.diff([0.0, *cumulative])
    assert_close(np.asarray(state.averages[0]), expected, rtol=2e-5, atol=1e-7, reason=ROUNDING)


def test_time_is_exact_where_float32_and_int32_are_not() -> None:
    tracker = PureEMA(0.1)
    state = tracker.init({"w": jnp.ones(1)}, t=2**24)
    for _ in range(3):
        state = jax.jit(tracker.update)(state, {"w": jnp.ones(1)})
    assert current_time(state) == 2**24 + 3
    state = tracker.init({"w": jnp.ones(1)}, t=2**31 - 1)
    state = jax.jit(tracker.update)(state, {"w": jnp.ones(1)}, 2**30 - 1)
    assert current_time(state) == 2**31 + 2**30 - 2


def test_the_first_update_copies_in_the_middle_of_a_run() -> None:
    tracker = PureEMA(0.1)
    state = tracker.update(tracker.init(params_at(0), t=500), params_at(1))
    assert_equal(state.averages[0]["layers"][0], params_at(1)["layers"][0])
    assert_equal(state.averages[0]["half"], params_at(1)["half"].astype(jnp.float32))
    assert state.averages[0]["n"] == 1
    later = tracker.update(state, params_at(2))
    assert not np.array_equal(later.averages[0]["layers"][0], params_at(2)["layers"][0])


def test_what_pure_averages_refuse() -> None:
    tracker = PureEMA()
    state = tracker.init({"w": jnp.ones(1)})
    for bad in (0, -1, 0.5, 2**30):
        with pytest.raises(ValueError, match="t_delta must be an integer in"):
            tracker.update(state, {"w": jnp.ones(1)}, bad)
    for bad in (-1, 0.5):
        with pytest.raises(ValueError, match="t must be an integer >= 0"):
            tracker.init({"w": jnp.ones(1)}, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each once"):
        PureEMA((0.1, 0.1))
    with pytest.raises(ValueError, match="each once"):
        PureEMA(())
    with pytest.raises(TypeError, match="no update rule"):
        PureEMA(Uniform(0.5))


def loss(params: Any, x: Any) -> Any:
    return ((x @ params["w"] + params["b"] - x.sum(1, keepdims=True)) ** 2).mean()


def start_params() -> Any:
    return {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 1)), jnp.float32),
            "b": jnp.zeros(1)}  # fmt: skip


def batch_at(step: int) -> Any:
    return jnp.asarray(np.random.default_rng(step).normal(size=(8, 4)), jnp.float32)


def make_step(optimizer: Any) -> Any:
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("accumulate", [1, 3])
def test_optax_in_jit_with_donated_buffers(accumulate: int) -> None:
    optimizer: Any = averaged(optax.adam(0.05), (0.05, 0.2))
    if accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, accumulate)
    params = start_params()
    state, ema, step = optimizer.init(params), EMA((0.05, 0.2)), make_step(optimizer)
    for k in range(24):
        params, state = step(params, state, batch_at(k))
        if (k + 1) % accumulate == 0:
            ema.update(params)
    assert current_time(ema_state(state)) == ema.t == 24 // accumulate
    for sigma_rel, average in zip((0.05, 0.2), ema_state(state).averages, strict=True):
        assert_trees_close(average, ema.average(sigma_rel))


def test_optax_changes_no_step_and_takes_extra_arguments() -> None:
    plain, wrapped = optax.sgd(0.1), averaged(optax.sgd(0.1), t_delta=256)
    params = start_params()
    grads = jax.grad(loss)(params, batch_at(0))
    expected, _ = plain.update(grads, plain.init(params), params)
    updates, state = wrapped.update(grads, wrapped.init(params), params, value=jnp.array(1.0))
    assert_equal(updates["w"], expected["w"])
    assert current_time(state.ema) == 256
    assert current_time(averaged(plain, t=7).init(params).ema) == 7
    with pytest.raises(ValueError, match="give params"):
        wrapped.update(grads, state)
    with pytest.raises(StructureError, match=r"one averaged\(...\) optimiser \(got 0\)"):
        ema_state(plain.init(params))
    with pytest.raises(StructureError, match=r"\(got 2\)"):
        ema_state((state, state))


def train(folder: Path, state: Any, params: Any, writer: SnapshotWriter, steps: range) -> Any:
    optimizer = averaged(optax.adam(0.05))
    step = make_step(optimizer)
    for k in steps:
        params, state = step(params, state, batch_at(k))
        writer(state.ema, params)
    return params, state


def test_snapshots_and_a_resumed_run(tmp_path: Path) -> None:
    optimizer = averaged(optax.adam(0.05))

    def writer(name: str) -> SnapshotWriter:
        return SnapshotWriter((0.05, 0.10), tmp_path / name, every=4, unit="updates")

    params = start_params()
    train(tmp_path, optimizer.init(params), params, writer("whole"), range(20))
    params = start_params()
    params, state = train(tmp_path, optimizer.init(params), params, writer("cut"), range(10))
    # Any checkpoint of pytrees keeps the run's identity, and its time.
    checkpoint = pickle.dumps(jax.tree.map(np.asarray, (params, state)))
    train(tmp_path, state, params, writer("cut"), range(10, 14))  # a future that is given up
    params, state = jax.tree.map(jnp.asarray, pickle.loads(checkpoint))
    resumed = writer("cut")
    params, state = train(tmp_path, state, params, resumed, range(10, 20))

    stores = [SnapshotStore(tmp_path / name).verify() for name in ("whole", "cut")]
    assert [s.t for s in stores[0]] == [t for t in (4, 8, 12, 16, 20) for _ in range(2)]
    for a, b in zip(*stores, strict=True):
        assert (a.t, a.profile, a.digests["averages"]) == (b.t, b.profile, b.digests["averages"])
        assert b.run.unit == "updates"
    assert len(list((tmp_path / "cut" / "abandoned").rglob("*.safetensors"))) == 2
    weights = reconstruct(tmp_path / "cut", 0.10)
    assert_equal(weights.params["w"], ema_state(state).averages[1]["w"])
    assert isinstance(weights.params["w"], jax.Array)

    with pytest.raises(StateError, match="does not continue the one written before"):
        resumed(pickle.loads(checkpoint)[1].ema, params)  # back in time
    other = train(tmp_path / "x", optimizer.init(params), params, writer("x"), range(4))[1]
    with pytest.raises(StateError, match="does not continue"):
        resumed(other.ema, params)
    with pytest.raises(ValueError, match="belongs to another run"):
        writer("cut")(other.ema, params)


def test_the_writer_waits_for_an_update_and_a_due_time(tmp_path: Path) -> None:
    tracker = PureEMA(0.1)
    state = tracker.init(params_at(0))
    writer = SnapshotWriter(tracker, tmp_path, every=3, encoding="float16")
    assert writer(state, params_at(0)) == []
    written = []
    for step in range(1, 8):
        state = tracker.update(state, params_at(step))
        written += writer(state, params_at(step))
    assert [s.t for s in written] == [3, 6]
    assert writer(state, params_at(7)) == []
    assert [s.t for s in writer(state, params_at(7), now=True)] == [7]
    assert writer(state, params_at(7), now=True) == []
    assert written[0].averages["half"] == "BF16"
    assert_equal(reconstruct(tmp_path, 0.1).buffers["n"], 7)
    for arguments in ({}, {"every": 1, "schedule": written}):
        with pytest.raises(ValueError, match="either every or schedule"):
            SnapshotWriter(0.1, tmp_path, **arguments)


def test_a_run_that_enables_averages_in_its_middle(tmp_path: Path) -> None:
    optimizer = averaged(optax.adam(0.05), t=100)
    params, writer = start_params(), SnapshotWriter((0.05, 0.10), tmp_path, every=4)
    train(tmp_path, optimizer.init(params), params, writer, range(8))
    found = SnapshotStore(tmp_path).list()
    assert {s.run.t_first for s in found} == {101}
    assert [s.t for s in found if s.profile == PowerFunction(0.1)] == [101, 104, 108]


@pytest.fixture(scope="module")
def nnx() -> Any:
    from flax import nnx

    return nnx


def make_nnx(nnx: Any, seed: int = 0) -> Any:
    class Net(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            self.layers = nnx.List([nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)])
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.layers[1](self.drop(self.norm(self.layers[0](x))))

    return Net(nnx.Rngs(seed))


NNX_NAMES = ["layers.0.bias", "layers.0.kernel", "layers.1.bias", "layers.1.kernel", "norm.bias",
             "norm.scale"]  # fmt: skip


@pytest.mark.parametrize("whole", [False, True])
def test_flax_nnx(nnx: Any, tmp_path: Path, whole: bool) -> None:
    model = make_nnx(nnx)
    optimizer = nnx.Optimizer(model, averaged(optax.adam(0.05)), wrt=nnx.Param)
    ema = EMA(snapshots=tmp_path, every=4)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any) -> None:
        grads = nnx.grad(lambda m: ((m(x) - x.sum(1, keepdims=True)) ** 2).mean())(model)
        optimizer.update(model, grads)

    def tracked() -> Any:
        return nnx.state(model) if whole else nnx.state(model, nnx.Param)

    for k in range(12):
        step(model, optimizer, batch_at(k))
        ema.update(tracked())

    found = SnapshotStore(tmp_path).list()[-1]
    assert sorted(found.averages) == NNX_NAMES
    # Statistics and counters are copied as they are, not averaged; random keys are left out.
    copies = {c.name for c in found.copy_sources()}
    assert copies == ({"norm.mean", "norm.var", "drop.rngs.count"} if whole else set())
    # The same from inside the compiled step.
    inside = jax.tree.leaves(ema_state(nnx.as_pure(optimizer.opt_state)).averages[1])
    weights = reconstruct(tmp_path, 0.10)
    for name, value in zip(NNX_NAMES, inside, strict=True):
        assert_close(np.asarray(weights.params[name]), np.asarray(value), rtol=2e-5, atol=2e-6,
                     reason=ROUNDING)  # fmt: skip

    fresh = make_nnx(nnx, seed=1)
    state = nnx.state(fresh) if whole else nnx.state(fresh, nnx.Param)
    nnx.update(fresh, put_into(state, weights))
    for name in NNX_NAMES:
        value: Any = fresh
        for part in name.split("."):
            value = value[int(part)] if part.isdigit() else getattr(value, part)
        assert_equal(value[...], weights.params[name])
    assert np.array_equal(fresh.norm.mean[...], model.norm.mean[...]) == whole


def test_equinox(tmp_path: Path) -> None:
    import equinox as eqx

    model = eqx.nn.MLP(4, 1, 3, 1, key=jax.random.key(0))
    optimizer = averaged(optax.adam(0.05))
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    ema = EMA(snapshots=tmp_path, every=4)

    @eqx.filter_jit(donate="all-except-first")
    def step(x: Any, model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(lambda m: ((jax.vmap(m)(x) - x.sum(1, keepdims=True)) ** 2).mean())
        updates, state = optimizer.update(grads(model), state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    for k in range(12):
        model, state = step(batch_at(k), model, state)
        ema.update(model)  # activations and other leaves that are no arrays may stay in it

    weights = reconstruct(tmp_path, 0.07)
    names = [f"layers.{k}.{part}" for k in (0, 1) for part in ("weight", "bias")]
    assert list(weights.params) == names
    assert_trees_close(ema_state(state).averages[1], eqx.filter(ema.average(0.10), eqx.is_array))
    loaded = put_into(model, weights)
    assert_equal(loaded.layers[0].weight, weights.params["layers.0.weight"])
    assert jnp.isfinite(loaded(jnp.ones(4))).all()


def test_weights_go_back_by_name_and_type() -> None:
    tree = {"a": jnp.zeros(2, jnp.bfloat16), "b": [jnp.zeros(1)]}
    made = put_into(tree, {"a": jnp.ones(2, jnp.float32)})
    assert made["a"].dtype == jnp.bfloat16
    assert made["b"][0] == 0
    with pytest.raises(StructureError, match=r"no leaf 'c' .*its names are a, b\.0"):
        put_into(tree, {"c": jnp.zeros(1)})
    with pytest.raises(StructureError, match=r"a has shape \(2,\) in the tree, \(3,\)"):
        put_into(tree, {"a": jnp.zeros(3)})


@pytest.mark.parametrize(
    "heading",
    [
        "JAX and Optax",
        pytest.param("Flax NNX", marks=pytest.mark.slow),
        pytest.param("Equinox", marks=pytest.mark.slow),
    ],
)
def test_the_page(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_section(heading) == 2


@pytest.mark.parametrize("name", ["train_optax"])
def test_the_examples(name: str, tmp_path: Path) -> None:
    assert_averaging_helped(run_example(name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_nnx", "train_equinox"])
def test_the_slower_examples(name: str, tmp_path: Path) -> None:
    assert_averaging_helped(run_example(name, tmp_path))


@pytest.mark.parametrize("module", ["jax", "optax"])
def test_docstring_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"posthoc_ema.integrations.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
