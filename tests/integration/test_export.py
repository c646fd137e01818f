"""Results as other programs keep weights: for torch.load, and as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MISUSE, files_of, invoke
from helpers import assert_equal
from safetensors.torch import load_file, save_file

from posthoc_ema import EMA, StructureError, reconstruct


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)
    )
    model.tied = model[0]
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("run") / "ema", network()
    ema = EMA(snapshots=folder, every=5)
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        ema.update(model)
    return folder


def test_a_file_for_torch_load(folder: Path, tmp_path: Path) -> None:
    result = reconstruct(folder, 0.07, out=tmp_path / "made" / "average.pt")
    assert list(result.files) == [tmp_path / "made" / "average.pt"]
    state = torch.load(result.files[0], weights_only=True)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["average.pt"]
    expected = reconstruct(folder, 0.07).state_dict()
    assert set(state) == set(expected) == set(network().state_dict())
    for name, values in expected.items():
        assert_equal(state[name].numpy(), values.numpy())
    assert state["tied.weight"].data_ptr() == state["0.weight"].data_ptr()
    network().load_state_dict(state)


def test_by_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "average.pt"
    said = invoke("reconstruct", folder, "--sigma-rel", "0.07", "--out", out).stdout
    assert "average.pt" in said
    before = out.read_bytes()
    text = invoke("reconstruct", folder, "--sigma-rel", "0.05", "--out", out, status=MISUSE).stderr
    assert "exists" in text
    assert "--overwrite" in text
    assert out.read_bytes() == before
    invoke("reconstruct", folder, "--sigma-rel", "0.05", "--out", out, "--overwrite")
    assert out.read_bytes() != before
    two = ("--sigma-rel", "0.05,0.07", "--out", tmp_path / "two.pt")
    assert "hold one result" in invoke("reconstruct", folder, *two, status=MISUSE).stderr


def model_folder(folder: Path, stem: str = "model", **change: Any) -> Path:
    folder.mkdir()
    state = {n: v for n, v in network().state_dict().items() if not n.startswith("tied")} | change
    save_file(state, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"architectures": ["Small"]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more")
    return folder


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_hugging_face_folder(folder: Path, tmp_path: Path, stem: str) -> None:
    like = model_folder(tmp_path / "like", stem)
    out = tmp_path / "averaged"
    invoke("reconstruct", folder, "--sigma-rel", "0.07", "--like", like, "--out", out)
    names = {path.name for path in out.iterdir()}
    assert names == {f"{stem}.safetensors", "config.json", "tokenizer.json", "vocab.txt"}
    assert (out / "vocab.txt").read_text() == "a\nb\n"
    expected = reconstruct(folder, 0.07)
    state = load_file(out / f"{stem}.safetensors")
    assert set(state) == {*expected.params, *expected.buffers}
    for name, values in state.items():
        assert_equal(values.numpy(), expected.state_dict()[name].numpy())


def test_shards_and_their_index(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    monkeypatch.setattr(import_module("posthoc_ema.reconstruct"), "MAX_SHARD_BYTES", 100)
    like = model_folder(tmp_path / "like")
    reconstruct(folder, 0.07, out=tmp_path / "averaged", like=like)
    index = json.loads((tmp_path / "averaged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files_of(tmp_path / "averaged"))


@pytest.mark.slow  # importing transformers takes most of it
def test_transformers_loads_it(tmp_path: Path) -> None:
    """A model of theirs, saved, tracked, averaged and loaded by their own functions."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "like")
    ema = EMA(snapshots=tmp_path / "ema", every=1)
    for _ in range(3):
        ema.update(model)
    reconstruct(tmp_path / "ema", 0.07, out=tmp_path / "averaged", like=tmp_path / "like")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "averaged")
    for name, values in model.state_dict().items():
        assert_equal(loaded.state_dict()[name].numpy(), values.numpy())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"out": "x", "sigma_rel": [0.05]}, ValueError, "hold one result"),
        ({"sigma_rel": 0.05}, ValueError, "hold one result"),
        ({"out": "like", "sigma_rel": 0.05}, ValueError, "give another folder"),
        ({"out": "x", "sigma_rel": 0.05, "names": "0.*"}, ValueError, "leave names= out"),
        ({"out": "x", "sigma_rel": 0.05, "like": "nowhere"}, ValueError, r"no config\.json"),
        ({"out": "x", "sigma_rel": 0.05, "like": "other"}, StructureError,
         r"is another model: it has 1 tensors that the snapshots lack \(extra\), and lacks 0"),
    ],
)  # fmt: skip
def test_misuse(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, error: Any,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "like")
    model_folder(tmp_path / "other", extra=torch.ones(1))
    with pytest.raises(error, match=message):
        reconstruct(folder, **{"like": "like", **options})
    assert not (tmp_path / "x").exists()
