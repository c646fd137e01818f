"""Where results go: files of one or many shards, and arrays of every framework."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file as load_torch

from posthoc_ema import EMA, Custom, Exponential, SnapshotError, SnapshotStore, Uniform, reconstruct
from tests.parity.runs import Run, record

module = import_module("posthoc_ema.reconstruct")  # the package's name of it is the function


def mixed_model(step: int) -> dict[str, torch.Tensor]:
    """Types of all sizes, so that files hold averages and copies in turn."""
    generator = torch.Generator().manual_seed(step)
    return {
        "a.half": torch.randn(11, generator=generator).half(),
        "step": torch.tensor(step),
        "b.double": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "mask": torch.tensor([True, step % 2 == 0]),
        "c.weight": torch.randn(130, 7, generator=generator),
        "empty": torch.zeros(0, 4),
        "d.complex": torch.randn(4, generator=generator, dtype=torch.complex64),
        "codes": torch.arange(5, dtype=torch.int8) + step,
        "e.scale": torch.randn((), generator=generator),
        "short": torch.arange(3, dtype=torch.int16),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "ema"
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=folder, every=4)
    for step in range(1, 25):
        ema.update(mixed_model(step))
    return folder


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_same_tensors(first: Any, second: Any) -> None:
    if set(first) != set(second):
        raise AssertionError(f"names differ: {set(first) ^ set(second)}")
    for name in first:
        a, b = first[name], second[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            raise AssertionError(f"{name} differs: {a.dtype} {b.dtype}")


def stored_form(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a file holds it: complex numbers as pairs."""
    return {n: torch.view_as_real(w) if w.is_complex() else w for n, w in state.items()}


# Files ---------------------------------------------------------------------------------------


def test_one_file(folder: Path, tmp_path: Path) -> None:
    expected = reconstruct(folder, 0.07)
    out = tmp_path / "new folder" / "weights.safetensors"
    result = reconstruct(folder, 0.07, out=out)
    assert list(result.files) == [out]
    assert visible(out.parent) == {"weights.safetensors"}, "no temporary file, no index"
    assert_same_tensors(load_torch(out), stored_form(expected.state_dict()))
    # And the result reads itself back.
    assert_same_tensors(result.state_dict(), expected.state_dict())
    assert list(result.params) == list(expected.params)
    assert result.predicted_error == expected.predicted_error


def test_any_reader_of_safetensors_takes_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    state = reconstruct(folder, 0.07, out=out).state_dict()
    arrays = load_numpy(out)
    np.testing.assert_array_equal(arrays["c.weight"], state["c.weight"].numpy())
    with safe_open(out, "pt") as file:
        assert file.metadata()["format"] == "pt"  # what transformers looks for
        assert torch.equal(file.get_tensor("codes"), state["codes"])
        assert file.get_slice("c.weight")[3:5].shape == (2, 7)
    # Every tensor starts at a multiple of its element size: maps need no copies.
    raw = out.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] != entry["data_offsets"][1]:
            size = {"F64": 8, "I64": 8, "F32": 4, "I16": 2}.get(entry["dtype"], 1)
            assert entry["data_offsets"][0] % size == 0, name


def test_a_folder_for_one(folder: Path, tmp_path: Path) -> None:
    result = reconstruct(folder, 0.07, out=tmp_path / "out")
    assert [path.name for path in result.files] == ["model.safetensors"]
    assert_same_tensors(
        load_torch(result.files[0]), stored_form(reconstruct(folder, 0.07).state_dict())
    )


def test_a_folder_for_several(folder: Path, tmp_path: Path) -> None:
    wanted = [0.05, 0.07, 0.0701, 0.2]
    results = reconstruct(folder, wanted, out=tmp_path)
    names = [result.files[0].name for result in results]
    assert len(set(names)) == 4
    assert visible(tmp_path) == set(names)
    for sigma_rel, result, memory in zip(wanted, results, reconstruct(folder, wanted), strict=True):
        assert repr(sigma_rel) in result.files[0].name
        assert_same_tensors(load_torch(result.files[0]), stored_form(memory.state_dict()))


def test_all_kinds_of_targets_can_be_written(folder: Path, tmp_path: Path) -> None:
    linear = Custom(cumulative=lambda tau, t: tau / t)
    steep = Custom(cumulative=lambda tau, t: (tau / t) ** 9)
    targets = [linear, steep, Exponential(halflife=3), Uniform(0.2), Uniform(0.3)]
    results = reconstruct(folder, target=targets, out=tmp_path)
    assert len({result.files[0] for result in results}) == 5
    for target, result in zip(targets, results, strict=True):
        expected = reconstruct(folder, target=target)
        assert torch.allclose(result.params["c.weight"], expected.params["c.weight"], atol=1e-5)
    by_pattern = reconstruct(folder, {"c.*": 0.2, "*": linear}, out=tmp_path / "m.safetensors")
    assert torch.allclose(
        load_torch(by_pattern.files[0])["c.weight"],
        reconstruct(folder, 0.2).params["c.weight"],
        atol=1e-5,  # blocks of another size: sums of a dozen terms in another order
    )


@pytest.mark.parametrize("limit", [1, 60, 500, 2000, 4200])
@pytest.mark.parametrize("several", [False, True])
def test_shards_hold_the_same_tensors(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, several: bool
) -> None:
    expected = reconstruct(folder, [0.07, 0.2])
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", limit)
    wanted = [0.07, 0.2] if several else 0.07
    found = reconstruct(folder, wanted, out=tmp_path)
    for result, memory in zip(found if several else [found], expected, strict=False):
        state = stored_form(memory.state_dict())
        loaded: dict[str, torch.Tensor] = {}
        for path in result.files:
            shard = load_torch(path)
            assert shard, "no shard is empty"
            total = sum(w.numel() * w.element_size() for w in shard.values())
            assert total <= limit or len(shard) == 1, "above the limit only if one tensor is"
            assert not set(shard) & set(loaded)
            loaded.update(shard)
        # Sums over other blocks: equal to rounding, and exactly where types are not averaged.
        assert set(loaded) == set(state)
        for name, value in state.items():
            if name in memory.buffers:
                assert torch.equal(loaded[name], value), name
            else:
                assert torch.allclose(loaded[name], value, rtol=0, atol=1e-5), name
        if len(result.files) > 1:
            assert all("-of-" in path.name for path in result.files)
        assert_same_tensors(stored_form(result.state_dict()), loaded)


def test_an_index_as_hugging_face_writes_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 500)
    result = reconstruct(folder, 0.07, out=tmp_path)
    number = len(result.files)
    assert number > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-{k:05d}-of-{number:05d}.safetensors" for k in range(1, number + 1)]
    assert visible(tmp_path) == {*names, "model.safetensors.index.json"}
    loaded = {name: load_torch(tmp_path / name) for name in names}
    assert {tensor: name for name, shard in loaded.items() for tensor in shard} == index[
        "weight_map"
    ]
    size = sum(w.numel() * w.element_size() for shard in loaded.values() for w in shard.values())
    assert index["metadata"]["total_size"] == size


def test_no_file_of_an_earlier_result_is_taken_for_this_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reconstruct(folder, 0.07, out=tmp_path)
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 500)
    cut = reconstruct(folder, 0.2, out=tmp_path)
    assert not whole.files[0].exists(), "or readers would prefer it to the shards"
    assert (tmp_path / "model.safetensors.index.json").exists()
    monkeypatch.undo()
    again = reconstruct(folder, 0.07, out=tmp_path)
    assert again.files[0].exists()
    assert not (tmp_path / "model.safetensors.index.json").exists()
    del cut


def test_overwrite_can_be_forbidden(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    reconstruct(folder, 0.07, out=out, overwrite=False)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match=r"w\.safetensors exists"):
        reconstruct(folder, 0.2, out=out, overwrite=False)
    assert out.read_bytes() == before
    reconstruct(folder, 0.2, out=out)
    assert out.read_bytes() != before


def test_out_is_checked_before_any_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="lies in the snapshot folder; give another"):
        reconstruct(folder, 0.07, out=folder)
    with pytest.raises(SnapshotError, match="lies in the snapshot folder"):
        reconstruct(folder, 0.07, out=folder / ".." / folder.name / "x.safetensors")
    with pytest.raises(ValueError, match="is one file for 2 results; give a folder"):
        reconstruct(folder, [0.07, 0.2], out=tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="once only"):
        reconstruct(folder, [0.07, 0.07], out=tmp_path)
    assert len(SnapshotStore(folder).list()) == 12
    assert visible(tmp_path) == set()


def test_a_failed_pass_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "damaged")
    snapshot = SnapshotStore(tmp_path / "damaged").list()[3]
    data = bytearray(snapshot.path.read_bytes())
    data[snapshot.entries["c.weight"].offset] ^= 1
    snapshot.path.write_bytes(data)
    out = tmp_path / "out"
    with pytest.raises(SnapshotError, match="is damaged"):
        reconstruct(tmp_path / "damaged", 0.07, out=out)
    assert visible(out) == set()


def test_results_written_keep_the_tied_names(tmp_path: Path) -> None:
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path / "ema")
    ema.update(net)
    ema.snapshot()
    result = reconstruct(tmp_path / "ema", 0.1, out=tmp_path / "out")
    net.load_state_dict(result.state_dict(), strict=True)


# Snapshot files ------------------------------------------------------------------------------


def test_each_snapshot_file_is_a_state_dict_for_any_tool(folder: Path) -> None:
    model = stored_form(mixed_model(1))
    for snapshot in SnapshotStore(folder).list():
        state = load_torch(snapshot.path)
        assert set(state) == set(model)
        assert {n: w.shape for n, w in state.items()} == {n: w.shape for n, w in model.items()}
        np.testing.assert_array_equal(state["c.weight"].numpy(), snapshot.read("c.weight"))
        assert int(state["step"]) == snapshot.t
    bare = torch.nn.ModuleDict({"l": torch.nn.Linear(2, 3), "n": torch.nn.BatchNorm1d(3)})
    ema = EMA(sigma_rel=0.1, snapshots=folder.parent / "bare")
    ema.update(bare)
    bare.load_state_dict(load_torch(ema.snapshot()[0].path), strict=True)


# Frameworks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["numpy", "torch", "jax"])
def test_every_framework_gets_its_own_arrays(folder: Path, target: str) -> None:
    native = reconstruct(folder, 0.07).state_dict()
    state = reconstruct(folder, 0.07, framework=target).state_dict()
    kinds = {"numpy": np.ndarray, "torch": torch.Tensor, "jax": jax.Array}
    assert set(state) == set(native)
    for name, value in state.items():
        assert isinstance(value, kinds[target]), name
        assert tuple(value.shape) == tuple(native[name].shape), name
        if target == "jax" and native[name].element_size() == 8 and not native[name].is_complex():
            # JAX has 32 bits only, unless x64 is switched on.
            np.testing.assert_allclose(np.asarray(value), native[name].numpy(), rtol=1e-6)
        else:
            assert np.asarray(value).dtype == native[name].numpy().dtype, name
            np.testing.assert_array_equal(np.asarray(value), native[name].numpy())


@pytest.mark.parametrize("origin", ["numpy", "torch", "jax"])
def test_by_default_the_framework_that_wrote(origin: str, tmp_path: Path) -> None:
    convert: dict[str, Any] = {
        "numpy": lambda ws: {n: w.astype(np.float32) for n, w in ws.items()},
        "torch": lambda ws: {n: torch.tensor(w, dtype=torch.float32) for n, w in ws.items()},
        "jax": lambda ws: {n: jnp.asarray(w, jnp.float32) for n, w in ws.items()},
    }
    run: Run = record(tmp_path / "ema", steps=24, every=6, convert=convert[origin])
    own = reconstruct(run.folder, 0.07).params["enc.w"]
    kinds = {"numpy": np.ndarray, "torch": torch.Tensor, "jax": jax.Array}
    assert isinstance(own, kinds[origin])
    plain = reconstruct(run.folder, 0.07, framework="numpy").params["enc.w"]
    assert isinstance(plain, np.ndarray)
    np.testing.assert_array_equal(np.asarray(own), plain)


@pytest.mark.parametrize("target", ["numpy", "torch", "jax"])
def test_copied_tensors_of_low_precision_change_frameworks(target: str, tmp_path: Path) -> None:
    # Buffers keep their type; bfloat16 and float8 reach numpy through ml_dtypes.
    net = torch.nn.Linear(2, 2)
    values = [1.5, -2.0, 0.25]
    net.register_buffer("brain", torch.tensor(values, dtype=torch.bfloat16))
    net.register_buffer("byte", torch.tensor(values).to(torch.float8_e4m3fn))
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path)
    ema.update(net)
    ema.snapshot()
    buffers = reconstruct(tmp_path, 0.1, framework=target).buffers
    for name, kind in (("brain", ml_dtypes.bfloat16), ("byte", ml_dtypes.float8_e4m3fn)):
        value = buffers[name]
        if target == "torch":
            assert value.dtype == net.get_buffer(name).dtype
            value = value.float().numpy()
        else:
            assert value.dtype == kind
        np.testing.assert_array_equal(np.asarray(value, np.float32), values)


def test_numpy_comes_without_torch_or_jax(tmp_path: Path) -> None:
    # Reading never needs the framework that wrote.
    import subprocess
    import sys

    ema = EMA(sigma_rel=0.1, snapshots=tmp_path)
    ema.update(torch.nn.Linear(2, 2))
    ema.snapshot()
    code = (
        "import sys\n"
        "from posthoc_ema import reconstruct\n"
        f"state = reconstruct({str(tmp_path)!r}, 0.1, framework='numpy').state_dict()\n"
        "assert set(state) == {'weight', 'bias'}, state\n"
        "assert not {'torch', 'jax'} & set(sys.modules), 'a framework was loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_result_in_a_file_is_read_once_and_never_another(tmp_path: Path) -> None:
    run = record(tmp_path / "ema", steps=40, every=8)
    first = reconstruct(run.folder, 0.07, out=tmp_path / "a.safetensors")
    assert first.params is first.params
    second = reconstruct(run.folder, 0.08, out=tmp_path / "a.safetensors")
    third = reconstruct(run.folder, 0.09, out=tmp_path / "a.safetensors")
    assert first.params, "read before it was replaced"
    assert third.params
    with pytest.raises(SnapshotError, match=r"a\.safetensors was replaced"):
        second.state_dict()
