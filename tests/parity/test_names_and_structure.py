"""Which tensors are tracked, under which names, and what is said when they change."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from posthoc_ema import EMA, PowerFunction, StructureError

FRAMEWORKS: dict[str, Any] = {"numpy": np.ones, "torch": torch.ones, "jax": jnp.ones}


@pytest.fixture(params=FRAMEWORKS)
def ones(request: pytest.FixtureRequest) -> Any:
    return FRAMEWORKS[request.param]


# Patterns ------------------------------------------------------------------------------------


def tracked(ema: EMA) -> set[str]:
    return set(ema.state_dict()["averages"][0])


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, {"enc.w", "enc.b", "dec.w", "dec.b"}),
        ("enc.*", None, {"enc.w", "enc.b"}),
        (["enc.w", "dec.w"], None, {"enc.w", "dec.w"}),
        (None, "*.b", {"enc.w", "dec.w"}),
        ("enc.*", ["*.b"], {"enc.w"}),
        (("*.[wb]",), "dec.?", {"enc.w", "enc.b"}),
    ],
)
def test_patterns_choose_tensors(ones: Any, include: Any, exclude: Any, expected: Any) -> None:
    ema = EMA(sigma_rel=0.1, include=include, exclude=exclude)
    ema.update({"enc": {"w": ones(2), "b": ones(1)}, "dec": {"w": ones(2), "b": ones(1)}})
    assert tracked(ema) == expected


def test_a_pattern_that_matches_nothing_is_refused(ones: Any) -> None:
    model = {"enc.w": ones(2)}
    for wrong in ({"include": "encoder.*"}, {"exclude": ["enc.w", "decoder.*"]}):
        with pytest.raises(StructureError, match=r"'(enc|dec)oder\.\*' matches no tensor.*enc\.w"):
            EMA(sigma_rel=0.1, **wrong).update(model)
    # The same check must let through what does match (also when all else is left out).
    EMA(sigma_rel=0.1, include="enc.*").update(model)


def test_patterns_that_leave_nothing_to_average(ones: Any) -> None:
    with pytest.raises(StructureError, match="no floating-point tensors to average"):
        EMA(sigma_rel=0.1, exclude="*").update({"w": ones(2)})


def test_patterns_match_whole_names_and_case() -> None:
    with pytest.raises(StructureError, match="matches no tensor"):
        EMA(sigma_rel=0.1, include="W").update({"w": np.ones(1)})
    with pytest.raises(StructureError, match="matches no tensor"):
        EMA(sigma_rel=0.1, include="enc").update({"enc.w": np.ones(1)})


def test_excluded_tensors_of_a_module_are_absent_from_its_average() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(sigma_rel=0.1, exclude="1.*")
    ema.update(module)
    assert set(ema.average()) == {"0.weight", "0.bias"}


# Structure -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda o: {"w": o((2, 3)), "b": o(3), "new": o(1)}, "new appeared"),
        (lambda o: {"w": o((2, 3))}, "b vanished"),
        (lambda o: {"w": o((3, 2)), "b": o(3)}, r"w changed from shape \(2, 3\) to \(3, 2\)"),
        (lambda o: {"w": o((2, 3)), "bias": o(3)}, "bias appeared; b vanished"),
        (lambda o: {"w": o((2, 3)), "b": 1.0}, "b (vanished|is a float)"),
    ],
    ids=["appears", "vanishes", "reshaped", "renamed", "no array any more"],
)
def test_changes_are_refused_by_name(ones: Any, changed: Any, message: str) -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update({"w": ones((2, 3)), "b": ones(3)})
    with pytest.raises(StructureError, match=message):
        ema.update(changed(ones))
    assert ema.t == 1
    ema.update({"w": ones((2, 3)), "b": ones(3)})
    assert ema.t == 2


def test_order_does_not_matter_names_do(ones: Any) -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update({"a": ones(2) * 1, "b": ones(2) * 2})
    ema.update({"b": ones(2) * 2, "a": ones(2) * 1})
    average = ema.average()
    assert float(average["a"][0]) == 1
    assert float(average["b"][0]) == 2


def test_many_changes_are_counted_not_listed() -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update({f"w{k}": np.ones(1) for k in range(20)})
    with pytest.raises(StructureError, match="and 35 more"):  # 20 appeared, 20 vanished
        ema.update({f"v{k}": np.ones(1) for k in range(20)})


def test_in_mappings_one_tensor_may_have_two_names_for_a_while(ones: Any) -> None:
    # Zeros shared at the start are no tied weights: in a mapping names alone count.
    shared = ones(2)
    ema = EMA(sigma_rel=0.1)
    ema.update({"a": shared, "b": shared})
    ema.update({"a": ones(2) * 3, "b": ones(2) * 5})
    ema.update({"a": shared, "b": shared})
    assert tracked(ema) == {"a", "b"}
    assert float(ema.average()["a"][0]) != float(ema.average()["b"][0])


def test_names_that_collide_are_refused(ones: Any) -> None:
    with pytest.raises(StructureError, match=r"both called 'a\.b'"):
        EMA(sigma_rel=0.1).update({"a": {"b": ones(1)}, "a.b": ones(1)})


def test_a_model_of_another_framework_is_refused() -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update({"w": np.ones(2)})
    with pytest.raises(StructureError, match="w is a Tensor, expected a numpy array"):
        ema.update({"w": torch.ones(2)})
    ema = EMA(sigma_rel=0.1)
    ema.update({"w": torch.ones(2)})
    with pytest.raises(StructureError, match=r"w is a ndarray, expected a torch\.Tensor"):
        ema.update({"w": np.ones(2)})


@pytest.mark.parametrize(
    "model", [None, 3.0, "weights", {}, [], object(), {"w": None}], ids=lambda m: repr(m)[:12]
)
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises((TypeError, StructureError), match=r"expected|no floating-point tensors"):
        EMA(sigma_rel=0.1).update(model)


@pytest.mark.parametrize(
    "array",
    [np.array(["text"]), np.array([object()]), np.ones(1, np.longdouble), np.zeros(1, "M8[s]")],
    ids=lambda a: str(a.dtype),
)
def test_arrays_that_files_cannot_hold_are_named(array: Any) -> None:
    with pytest.raises(StructureError, match=r"odd.*exclude"):
        EMA(sigma_rel=0.1).update({"w": np.ones(1), "odd": array})
    EMA(sigma_rel=0.1, exclude="odd").update({"w": np.ones(1), "odd": array})


def test_device_is_for_torch() -> None:
    with pytest.raises(ValueError, match="device= is for PyTorch"):
        EMA(sigma_rel=0.1, device="cpu").update({"w": np.ones(1)})


# Pytrees -------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["weight", "bias"])


def test_pytrees_keep_their_form_and_have_readable_names() -> None:
    tree = {
        "layers": [Pair(jnp.ones((2, 2)), jnp.zeros(2)), Pair(jnp.ones((2, 1)), jnp.zeros(1))],
        "scale": (jnp.ones(()),),
        "rate": 0.1,
        "none": None,
        "step": jnp.array(3),
    }
    ema = EMA(sigma_rel=0.1)
    ema.update(tree)
    assert tracked(ema) == {
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "layers.1.bias",
        "scale.0",
    }
    average = ema.average()
    assert jax.tree.structure(average) == jax.tree.structure(tree)
    assert average["rate"] == 0.1
    assert int(average["step"]) == 3


def test_registered_dataclasses_are_pytrees() -> None:
    import dataclasses

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        weight: Any
        bias: Any

    ema = EMA(sigma_rel=0.1)
    ema.update(Layer(jnp.ones(2), jnp.zeros(2)))
    assert tracked(ema) == {"weight", "bias"}
    assert isinstance(ema.average(), Layer)


def test_random_keys_are_left_as_they_are() -> None:
    tree = {"w": jnp.ones(2), "key": jax.random.key(0)}
    ema = EMA(sigma_rel=0.1)
    ema.update(tree)
    assert tracked(ema) == {"w"}


def test_other_mappings() -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update(OrderedDict(w=torch.ones(2), inner=OrderedDict(b=torch.ones(1))))
    assert tracked(ema) == {"w", "inner.b"}
    ema = EMA(sigma_rel=0.1)
    ema.update(nn.Linear(2, 2).state_dict())
    assert tracked(ema) == {"weight", "bias"}


def test_numpy_leaves_in_a_jax_tree_are_read_at_once() -> None:
    # JAX may read a numpy array after the call returns; the caller may change it before that.
    for _ in range(10):
        array = np.ones(2_000_000, np.float32)
        ema = EMA(sigma_rel=0.1)
        for value in (1, 2):
            array.fill(value)
            ema.update({"w": array, "v": jnp.ones(1)})
            array.fill(1e6)
        expected = float(PowerFunction(0.1).weights([1, 2]) @ [1, 2])
        np.testing.assert_allclose(ema.average()["w"], expected, rtol=1e-6)  # float32


def test_parameters_may_be_donated_to_the_next_step() -> None:
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    params = {"w": jnp.zeros(3), "frozen": jnp.zeros(2), "n": jnp.zeros(2, jnp.int32)}
    ema = EMA(sigma_rel=0.1, exclude="frozen")
    for _ in range(5):
        params = step(params)
        ema.update(params)
    params = step(params)  # deletes the arrays of the last update
    average = ema.average()
    assert float(average["w"][0]) == pytest.approx(4.6, abs=0.4)
    assert int(average["n"][0]) == 5


def test_updates_compile_once() -> None:
    from posthoc_ema.trackers import jax as tracker

    ema = EMA()
    params = {"w": jnp.ones((17, 3)), "b": jnp.ones(5, jnp.bfloat16)}
    for step in range(3):
        ema.update(params, t=step + 1)
    compiled = tracker._update_tracks._cache_size()
    for t in (4, 5.5, 100, 1e6):
        ema.update(params, t=t)
    assert tracker._update_tracks._cache_size() == compiled


def test_updates_inside_jit_are_refused_with_the_way_out() -> None:
    ema = EMA(sigma_rel=0.1)

    @jax.jit
    def step(params: Any) -> Any:
        ema.update(params)
        return params

    with pytest.raises(StructureError, match=r"w is being traced.*PureEMA of posthoc_ema\.integ"):
        step({"w": jnp.ones(2)})


def test_pure_functions_run_inside_scan() -> None:
    from posthoc_ema.schedule import update_weight
    from posthoc_ema.trackers.jax import init, update

    times = np.arange(1, 31)
    history = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    weights = jnp.array([update_weight(0.1, t - 1, t) for t in times])

    @jax.jit
    def scan(rows: Any, shares: Any) -> Any:
        def body(average: Any, row_share: Any) -> Any:
            row, share = row_share
            return update(average, {"w": row}, share), None

        return jax.lax.scan(body, init({"w": rows[0]}), (rows[1:], shares[1:]))[0]

    ema = EMA(sigma_rel=0.1)
    for row in history:
        ema.update({"w": row})
    found = np.asarray(scan(history, weights)["w"])
    # The same arithmetic in another order of fused operations: a few roundings of float32.
    np.testing.assert_allclose(found, ema.average()["w"], rtol=0, atol=2e-6)
