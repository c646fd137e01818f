"""``state_dict``, ``load_state_dict``: a resumed run equals an uninterrupted one, to the bit."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from posthoc_ema import (
    EMA,
    PowerFunction,
    SnapshotStore,
    StateError,
    StructureError,
    reconstruct,
)

STEPS, CUT = 20, 9


def torch_model(step: int) -> Any:
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.randn(3, 2, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "c": torch.randn(2, generator=generator, dtype=torch.complex64),
        "d": torch.randn(2, generator=generator, dtype=torch.float64),
        "order": torch.randn(2, 3, generator=generator).t(),
        "n": torch.tensor(step),
    }


def numpy_model(step: int) -> Any:
    rng = np.random.default_rng(step)
    return {
        "w": rng.normal(size=(3, 2)).astype(np.float32),
        "inner": {"c": rng.normal(size=2) * 1j, "d": rng.normal(size=())},
        "n": np.array(step),
    }


def jax_model(step: int) -> Any:
    rng = np.random.default_rng(step)
    return {
        "layers": [jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)],
        "half": jnp.asarray(rng.normal(size=4), jnp.bfloat16),
        "c": jnp.asarray(rng.normal(size=2) * 1j, jnp.complex64),
        "n": jnp.array(step),
    }


def through_torch_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save({"ema": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["ema"]


def through_numpy_file(state: Any) -> Any:
    """Arrays and plain text alone, as a checkpoint that must not run code: no pickle."""
    arrays = {
        f"averages.{track}.{name}": np.asarray(value)
        for track, averages in enumerate(state["averages"])
        for name, value in averages.items()
    }
    scalars = {k: np.asarray(v) for k, v in state.items() if k not in ("averages", "profiles")}
    profiles = {
        f"profiles.{k}.{key}": np.asarray(value)
        for k, profile in enumerate(state["profiles"])
        for key, value in profile.items()
    }
    file = io.BytesIO()
    np.savez(file, **arrays, **scalars, **profiles)
    file.seek(0)
    with np.load(file, allow_pickle=False) as found:
        loaded = dict(found)
    out: dict[str, Any] = {k: loaded[k] for k in scalars}
    out["averages"] = [
        {
            name.split(".", 2)[2]: value
            for name, value in loaded.items()
            if name.startswith(f"averages.{track}.")
        }
        for track in range(len(state["averages"]))
    ]
    out["profiles"] = [
        {
            name.split(".", 2)[2]: value.item()
            for name, value in loaded.items()
            if name.startswith(f"profiles.{k}.")
        }
        for k in range(len(state["profiles"]))
    ]
    return out


def through_json(state: Any) -> Any:
    """Everything but the arrays survives JSON."""
    import json

    plain = json.loads(json.dumps({k: v for k, v in state.items() if k != "averages"}))
    return {**plain, "averages": state["averages"]}


def as_is(state: Any) -> Any:
    return state


def leaves(tree: Any) -> list[np.ndarray]:
    if isinstance(tree, dict):
        return [x for value in tree.values() for x in leaves(value)]
    if isinstance(tree, list):
        return [x for value in tree for x in leaves(value)]
    return [tree.numpy() if isinstance(tree, torch.Tensor) else np.asarray(tree)]


def assert_bitwise_equal(first: Any, second: Any) -> None:
    for a, b in zip(leaves(first), leaves(second), strict=True):
        if a.dtype != b.dtype or a.tobytes() != b.tobytes():
            raise AssertionError(f"{a} and {b} differ")


ROUTES: list[tuple[Callable[[int], Any], Callable[[Any], Any]]] = [
    (torch_model, as_is),
    (torch_model, through_torch_file),
    (torch_model, through_json),
    (numpy_model, as_is),
    (numpy_model, through_numpy_file),
    (numpy_model, through_json),
    (jax_model, as_is),
    (jax_model, through_numpy_file),
]


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize(
    ("model", "route"), ROUTES, ids=[f"{m.__name__}-{r.__name__}" for m, r in ROUTES]
)
def test_resumed_equals_uninterrupted(
    model: Any, route: Any, irregular: bool, tmp_path: Path
) -> None:
    def t_of(step: int) -> float | None:
        return step**1.5 if irregular else None

    def fresh(folder: str) -> EMA:
        return EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path / folder, every=4, unit="images")

    whole = fresh("whole")
    for step in range(1, STEPS + 1):
        whole.update(model(step), t=t_of(step))

    first = fresh("cut")
    for step in range(1, CUT + 1):
        first.update(model(step), t=t_of(step))
    second = fresh("cut")
    second.load_state_dict(route(first.state_dict()))
    assert second.t == first.t
    for step in range(CUT + 1, STEPS + 1):
        second.update(model(step), t=t_of(step))

    for sigma_rel in (0.05, 0.10):
        assert_bitwise_equal(whole.average(sigma_rel), second.average(sigma_rel))
    with pytest.raises(AssertionError, match="differ"):  # the comparison can fail
        assert_bitwise_equal(whole.average(0.05), second.average(0.10))

    # And the folders cannot be told apart, but for the run's random identity.
    stores = [SnapshotStore(tmp_path / name).list() for name in ("whole", "cut")]
    for a, b in zip(*stores, strict=True):
        assert (a.t, a.profile, a.path.name) == (b.t, b.profile, b.path.name)
        assert a.digests["averages"] == b.digests["averages"]
        assert a.run.t_first == b.run.t_first
        assert a.run.unit == b.run.unit == "images"
    assert len({s.run.run_id for s in stores[1]}) == 1


def test_loading_after_binding_replaces_the_averages() -> None:
    ema = EMA(sigma_rel=0.1)
    for step in range(1, 6):
        ema.update(numpy_model(step))
    state = ema.state_dict()
    expected = ema.average()
    for step in range(6, 9):
        ema.update(numpy_model(step))
    ema.load_state_dict(state)
    assert ema.t == 5
    for name, value in state["averages"][0].items():
        np.testing.assert_array_equal(ema.state_dict()["averages"][0][name], value)
    ema.update(numpy_model(6))
    other = EMA(sigma_rel=0.1)
    other.load_state_dict(state)
    other.update(numpy_model(6))
    assert_bitwise_equal(ema.average(), other.average())
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(ema.average(), expected)


def test_a_module_may_be_bound_before_its_state_comes() -> None:
    module = nn.Linear(3, 3)
    ema = EMA(sigma_rel=(0.05, 0.1))
    for _ in range(5):
        ema.update(module)
        nn.init.normal_(module.weight)
    late = EMA(sigma_rel=(0.05, 0.1))
    late.update(module)
    late.load_state_dict(ema.state_dict())
    assert late.t == 5
    assert torch.equal(late.average(0.1)["weight"], ema.average(0.1)["weight"])


def test_state_is_a_copy() -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update({"w": np.zeros(3)})
    state = ema.state_dict()
    ema.update({"w": np.ones(3)})
    np.testing.assert_array_equal(state["averages"][0]["w"], 0)
    state["averages"][0]["w"][:] = 9
    assert (ema.average()["w"] <= 1).all()


def test_loaded_state_stays_the_callers_own() -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update({"w": np.zeros(3)})
    state = ema.state_dict()
    resumed = EMA(sigma_rel=0.1)
    resumed.load_state_dict(state)
    resumed.average()["w"][:] = 5
    resumed.state_dict()["averages"][0]["w"][:] = 6
    np.testing.assert_array_equal(resumed.average()["w"], 0)
    resumed.update({"w": np.ones(3)})
    np.testing.assert_array_equal(state["averages"][0]["w"], 0)


def test_averages_are_copies() -> None:
    for convert in (np.array, torch.tensor):
        model = {"w": convert([1.0, 2.0]), "n": convert([3]), "out": convert([1.0])}
        ema = EMA(sigma_rel=0.1, exclude="out")
        ema.update(model)
        average = ema.average()
        for value in average.values():
            value[:] = 77
        assert float(ema.average()["w"][0]) == 1
        assert int(ema.average()["n"][0]) == 3
        assert float(model["w"][0]) == 1
        assert float(model["out"][0]) == 1


def test_state_of_an_ema_without_updates() -> None:
    state = EMA(sigma_rel=(0.05, 0.1)).state_dict()
    ema = EMA(sigma_rel=(0.05, 0.1))
    ema.load_state_dict(state)
    with pytest.raises(StateError, match="call update first"):
        ema.average(0.05)
    ema.update({"w": np.full(2, 3.0)})
    assert ema.t == 1
    np.testing.assert_array_equal(ema.average(0.1)["w"], 3)  # the first update copies


def test_empty_state_loaded_over_a_bound_ema_starts_anew() -> None:
    ema = EMA(sigma_rel=0.1)
    for _ in range(3):
        ema.update({"w": np.ones(2)})
    ema.load_state_dict(EMA(sigma_rel=0.1).state_dict())
    assert ema.t == 0
    ema.update({"w": np.full(2, 5.0)})
    np.testing.assert_array_equal(ema.average()["w"], 5)


def test_the_clock_goes_on_after_resuming() -> None:
    ema = EMA(sigma_rel=0.1)
    for _ in range(7):
        ema.update({"w": np.ones(1)})
    resumed = EMA(sigma_rel=0.1)
    resumed.load_state_dict(ema.state_dict())
    resumed.update({"w": np.ones(1)})
    assert resumed.t == 8
    with pytest.raises(StateError, match="with t at some times and without it"):
        resumed.update({"w": np.ones(1)}, t=9)


def test_time_cannot_go_back_after_resuming() -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update({"w": np.ones(1)}, t=500)
    resumed = EMA(sigma_rel=0.1)
    resumed.load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match=r"got 1 after 500 \(after resuming, go on counting"):
        resumed.update({"w": np.ones(1)}, t=1)
    resumed.update({"w": np.ones(1)}, t=501)


def test_skipped_updates_survive_resuming() -> None:
    ema = EMA(sigma_rel=0.1, nonfinite="skip")
    for value in (1.0, np.nan, 2.0, np.nan):
        ema.update({"w": np.full(2, value)})
    assert (ema.t, ema.skipped) == (3, 2)
    resumed = EMA(sigma_rel=0.1, nonfinite="skip")
    resumed.load_state_dict(ema.state_dict())
    resumed.update({"w": np.full(2, 3.0)})
    assert (resumed.t, resumed.skipped) == (5, 2)
    expected = PowerFunction(0.1).weights([1, 3, 5]) @ [1, 2, 3]
    np.testing.assert_allclose(resumed.average()["w"], expected, rtol=1e-14)  # float64 roundings


# States that do not fit -----------------------------------------------------------------------


@pytest.fixture
def state() -> dict[str, Any]:
    ema = EMA(sigma_rel=(0.05, 0.1))
    for step in range(3):
        ema.update({"w": np.full(2, step), "b": np.zeros(1)} | {"w": np.full(2, float(step))})
    return ema.state_dict()


def test_other_tracks_are_refused(state: Any) -> None:
    for tracks in ((0.05,), (0.05, 0.2), (0.1, 0.05)):
        with pytest.raises(ValueError, match=r"the state has the tracks .*same sigma_rel"):
            EMA(sigma_rel=tracks).load_state_dict(state)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        {"w": np.ones(2)},
        {"w": np.ones(2), "b": np.ones(1), "extra": np.ones(1)},
        {"w": np.ones(2), "bias": np.ones(1)},
        {"w": np.ones(3), "b": np.ones(1)},
    ],
    ids=["missing", "extra", "renamed", "reshaped"],
)
def test_other_names_or_shapes_are_refused(state: Any, model: Any, bound: bool) -> None:
    ema = EMA(sigma_rel=(0.05, 0.1))
    expected = r"averages do not fit the model: (b|w|extra|bias) "
    with pytest.raises(StructureError, match=expected):  # noqa: PT012 - whichever comes second
        if bound:
            ema.update(model)
        ema.load_state_dict(state)
        ema.update(model)


def test_a_state_that_does_not_fit_changes_nothing(state: Any) -> None:
    ema = EMA(sigma_rel=(0.05, 0.1))
    ema.update({"w": np.full(2, 7.0), "b": np.full(1, 7.0)})
    del state["averages"][1]["b"]
    with pytest.raises(ValueError, match="do not fit"):
        ema.load_state_dict(state)
    assert ema.t == 1
    for sigma_rel in (0.05, 0.1):
        np.testing.assert_array_equal(ema.average(sigma_rel)["w"], 7)


def test_incomplete_states_are_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"no state of EMA\.state_dict: it lacks .*averages"):
        EMA().load_state_dict({})
    nothing: Any = {"model": {}}.get("ema")  # as a checkpoint from before the EMA gives it
    with pytest.raises(ValueError, match="from before the EMA was added has none"):
        EMA().load_state_dict(nothing)
    with pytest.raises(ValueError, match="it lacks clock"):
        EMA(sigma_rel=(0.05, 0.1)).load_state_dict({k: v for k, v in state.items() if k != "clock"})
    with pytest.raises(ValueError, match="averages"):
        EMA(sigma_rel=(0.05, 0.1)).load_state_dict({**state, "averages": state["averages"][:1]})
    with pytest.raises(ValueError, match="averages"):
        EMA(sigma_rel=(0.05, 0.1)).load_state_dict({**state, "averages": []})


def test_another_unit_is_refused(state: Any) -> None:
    # The clock would go on counting something else.
    with pytest.raises(ValueError, match=r"steps.*images|images.*steps"):
        EMA(sigma_rel=(0.05, 0.1), unit="images").load_state_dict(state)


def test_the_encoding_may_change_in_mid_run(tmp_path: Path) -> None:
    first = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path, every=5)
    for step in range(1, 16):
        first.update(numpy_model(step))
    second = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path, every=5, encoding="float16")
    second.load_state_dict(first.state_dict())
    for step in range(16, 31):
        second.update(numpy_model(step))
    snapshots = SnapshotStore(tmp_path).verify()
    assert [s.encoding for s in snapshots] == ["float32"] * 6 + ["float16"] * 6
    result = reconstruct(tmp_path, 0.07)
    assert result.params["w"].shape == (3, 2)
    np.testing.assert_array_equal(reconstruct(tmp_path, 0.05).params["w"], snapshots[-2].read("w"))


def test_newer_states_are_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="version 2, this library reads 1; upgrade"):
        EMA(sigma_rel=(0.05, 0.1)).load_state_dict({**state, "version": 2})


def test_another_models_checkpoint_is_no_state() -> None:
    with pytest.raises(ValueError, match=r"do not call load_state_dict"):
        EMA().load_state_dict(nn.Linear(2, 2).state_dict())


def test_an_ema_is_not_pickled_but_its_state(tmp_path: Path) -> None:
    """Before there are averages it may be, as launchers of processes do with callbacks."""
    ema = pickle.loads(pickle.dumps(EMA(snapshots=tmp_path, every=1)))
    assert ema.sigma_rel == (0.05, 0.10)
    ema.update({"w": np.ones(2)})
    for attempt in (pickle.dumps, deepcopy):
        with pytest.raises(
            TypeError, match=r"cannot be copied or pickled.*save its ema\.state_dict"
        ):
            attempt(ema)
