"""Folders as trainers leave them: which weights are found, and what is said of several sets."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_equal
from safetensors.torch import save_file

from posthoc_ema import SnapshotError, Uniform, import_snapshots
from posthoc_ema.importing.checkpoints import _number
from posthoc_ema.importing.write import Import

RAW = Uniform(1, relative=False)
TIMES = (10, 20)


def state(t: float, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + int(t))
    return {"layer.weight": torch.randn(4, 3, generator=generator), "bias": torch.zeros(2)}


def beside(folder: Path) -> None:
    """What trainers leave beside the weights, of names that weights might have."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"state": torch.ones(2)}
    for name in (
        "optimizer.pt", "optimizer.bin", "optimizer_1.bin", "scheduler.pt", "scheduler.bin",
        "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "sampler.bin",
        "sampler_1.bin", "dl_state_dict.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl",
    ):  # fmt: skip
        torch.save(tensors, folder / name)
    save_file(tensors, folder / "ema_state.safetensors")  # of EMACallback and EMAModel here
    (folder / "global_step10").mkdir()
    torch.save(tensors, folder / "global_step10" / "mp_rank_00_model_states.pt")
    (folder / "trainer_state.json").write_text("{}")


def imported(tmp_path: Path, **options: Any) -> Import:
    return import_snapshots(tmp_path / "run", tmp_path / "ema", **({"profile": RAW} | options))


def assert_imported(done: Import, seed: int = 0) -> None:
    assert [t for _, t, _ in done.files] == list(TIMES)
    for snapshot in done.snapshots:
        for name, values in state(snapshot.t, seed).items():
            assert_equal(snapshot.read(name), values.numpy())


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin",
     "pytorch_lora_weights.safetensors", "default/adapter_model.safetensors"],
)  # fmt: skip
def test_checkpoints_of_a_trainer(tmp_path: Path, name: str) -> None:
    """With the last weights beside the folders, which do not say their time."""
    for t in TIMES:
        folder = tmp_path / "run" / f"checkpoint-{t}"
        beside(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (save_file if name.endswith(".safetensors") else torch.save)(state(t), folder / name)
    torch.save(state(3), tmp_path / "run" / "pytorch_model.bin")
    torch.save(state(3), tmp_path / "run" / "training_args.bin")
    save_file(state(3), tmp_path / "run" / "model-00001-of-00002.safetensors")
    done = imported(tmp_path)
    assert_imported(done)
    assert done.remarks == ("left out, for want of a time > 0 or of weights: pytorch_model.bin",)


def two_networks(tmp_path: Path, names: tuple[str, str] = ("unet", "unet_ema")) -> None:
    """As the scripts of diffusers save them."""
    for t in TIMES:
        for seed, name in enumerate(names):
            folder = tmp_path / "run" / f"checkpoint-{t}" / name
            beside(folder.parent) if not seed else None
            folder.mkdir()
            save_file(state(t, seed), folder / "diffusion_pytorch_model.safetensors")
            noted = {"decay": 0.999, "optimization_step": t} if seed else {}
            (folder / "config.json").write_text(json.dumps(noted))


def test_two_networks_in_each_checkpoint(tmp_path: Path) -> None:
    two_networks(tmp_path)
    with pytest.raises(
        SnapshotError, match=r"sets of weights \(unet, unet_ema\); say which with s"
    ):
        imported(tmp_path)
    with pytest.raises(SnapshotError, match=r"holds 'vae'; their sets of weights are unet, unet_e"):
        imported(tmp_path, subfolder="vae")
    with pytest.raises(SnapshotError, match=r"decay of 0\.999 at step 10: exponential:beta=0\.999"):
        imported(tmp_path, subfolder="unet_ema", profile=None)
    assert not (tmp_path / "ema").exists()
    assert_imported(imported(tmp_path, subfolder="unet_ema"), seed=1)


def test_folders_named_one_by_one(tmp_path: Path) -> None:
    """As a shell writes out ``checkpoint-*/unet``: their time is that of the folder around them."""
    two_networks(tmp_path)
    source = [tmp_path / "run" / f"checkpoint-{t}" / "unet" for t in TIMES]
    assert_imported(import_snapshots(source, tmp_path / "ema", profile=RAW))


def test_a_folder_in_some_checkpoints_only(tmp_path: Path) -> None:
    two_networks(tmp_path)
    moved = tmp_path / "run" / "checkpoint-20" / "unet_ema"
    moved.rename(tmp_path / "moved")
    with pytest.raises(
        SnapshotError, match=r"checkpoint-20 holds no weights at 'unet_ema'; its se"
    ):
        imported(tmp_path, subfolder="unet_ema")
    (tmp_path / "run" / "checkpoint-10" / "unet").rename(tmp_path / "unet")
    with pytest.raises(SnapshotError, match=r"hold different sets of weights \(unet, unet_ema\)"):
        imported(tmp_path)


def test_several_models_of_accelerate(tmp_path: Path) -> None:
    for t in TIMES:
        folder = tmp_path / "run" / f"checkpoint_{t}"
        beside(folder)
        save_file(state(t), folder / "model.safetensors")
        save_file(state(t, 1), folder / "model_1.safetensors")
    with pytest.raises(
        SnapshotError, match=r"\(model\.safetensors, model_1\.safetensors\); say wh"
    ):
        imported(tmp_path)
    assert_imported(imported(tmp_path, subfolder="model_1.safetensors"), seed=1)


def test_weights_in_two_formats(tmp_path: Path) -> None:
    """The same ones: those that hold no code are read."""
    for t in TIMES:
        folder = tmp_path / "run" / f"checkpoint-{t}"
        folder.mkdir(parents=True)
        save_file(state(t), folder / "model.safetensors")
        torch.save(state(t, 1), folder / "pytorch_model.bin")
    assert_imported(imported(tmp_path))


def test_checkpoints_of_another_model_among_them(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for t in TIMES:
        save_file(state(t), tmp_path / "run" / f"step{t}.safetensors")
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "run" / "step30.safetensors")
    with pytest.raises(
        SnapshotError, match=r"step30.* of another model than .*step10.*'bias' has sh"
    ):
        imported(tmp_path)
    assert not (tmp_path / "ema").exists()


# Files of torch.save --------------------------------------------------------------------------


def test_a_state_dict_as_modules_give_it(tmp_path: Path) -> None:
    """It has the versions of the modules as an attribute."""
    (tmp_path / "run").mkdir()
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert hasattr(model.state_dict(), "_metadata")
    for t, modern in ((10, True), (20, False)):
        path = tmp_path / "run" / f"step-{t}.pt"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=modern)
    done = imported(tmp_path)
    for snapshot in done.snapshots:
        for name, values in model.state_dict().items():
            assert_equal(snapshot.read(name), values.numpy())


def test_parameters_with_attributes(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for t in TIMES:
        content: Any = {name: torch.nn.Parameter(value) for name, value in state(t).items()}
        content["bias"].tensor_parallel = True
        content["buffer"] = torch.nn.Buffer(torch.ones(2))
        torch.save(content, tmp_path / "run" / f"step-{t}.pt")
    assert_imported(imported(tmp_path))


def test_values_that_are_not_as_stored(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"w": torch.ones(2).to(torch.complex64).conj()}, tmp_path / "run" / "step-1.pt")
    with pytest.raises(SnapshotError, match=r"step-1\.pt .*is a conjugate or negative"):
        imported(tmp_path)


def test_a_folder_that_holds_itself(tmp_path: Path) -> None:
    for t in TIMES:
        folder = tmp_path / "run" / f"checkpoint-{t}"
        folder.mkdir(parents=True)
        save_file(state(t), folder / "model.safetensors")
        (folder / "latest").symlink_to(folder)
    assert_imported(imported(tmp_path))


def test_checkpoints_of_timm(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for t in (0, *TIMES):
        content = {
            "epoch": t, "arch": "resnet", "state_dict": state(t), "state_dict_ema": state(t, 1),
            "optimizer": {"state": {0: {"momentum": torch.ones(2)}}}, "version": 2,
            "args": argparse.Namespace(lr=0.1), "metric": 0.5,
        }  # fmt: skip
        torch.save(content, tmp_path / "run" / f"checkpoint-{t}.pth.tar")
    torch.save(content, tmp_path / "run" / "model_best.pth.tar")
    with pytest.raises(SnapshotError, match=r"2 sets of weights \(state_dict, state_dict_ema\); s"):
        imported(tmp_path)
    done = imported(tmp_path, key="state_dict_ema")
    assert_imported(done, seed=1)
    assert "checkpoint-0.pth.tar, model_best.pth.tar" in done.remarks[0]


@pytest.mark.parametrize("safe", [False, True])
def test_sets_by_what_names_begin_with(tmp_path: Path, safe: bool) -> None:
    """A Lightning module that holds a network and its average."""
    (tmp_path / "run").mkdir()
    for t in TIMES:
        both = {f"net.{k}": v for k, v in state(t).items()}
        both |= {f"ema.{k}": v for k, v in state(t, 1).items()}
        if safe:
            save_file(both, tmp_path / "run" / f"step-{t}.safetensors")
        else:
            callbacks = {"Checkpoint": {"best": {"a": torch.ones(1)}}}
            content = {"state_dict": both, "callbacks": callbacks, "optimizer_states": [state(1)]}
            torch.save(content, tmp_path / "run" / f"epoch=1-step={t}.ckpt")
    inside = "" if safe else "state_dict."
    with pytest.raises(SnapshotError, match=f"no weights at '{inside}x'; its"):
        imported(tmp_path, key=f"{inside}x")
    assert_imported(imported(tmp_path, key=f"{inside}ema"), seed=1)


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("epoch=3-step=1200.ckpt", 1200),
        ("epoch=3-step=1200-v1.ckpt", 1200),
        ("model-epoch=05-val_loss=0.3456.ckpt", 5),
        ("checkpoint-12.pth.tar", 12),
        ("ema_0.9999_050000.pt", 50000),
        ("iter_4000_epoch_3.pth", 4000),
        ("global_step500", 500),
        ("step=0.5.pt", None),
        ("last.ckpt", None),
        ("last-v1.ckpt", None),
        ("ema_0.9999.pt", None),
    ],
)
def test_times_in_names(name: str, time: int | None) -> None:
    """Decimals, such as losses and decays, are none."""
    assert _number(Path(name)) == time


def test_a_clock_of_epochs(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for t in TIMES:
        torch.save(state(t), tmp_path / "run" / f"epoch={t}.ckpt")
    assert imported(tmp_path).unit == "epochs"


@pytest.mark.parametrize(
    ("name", "message"),
    [("0.distcp", "dcp_to_torch FOLDER FILE"), ("zero_to_fp32.py", "DeepSpeed")],
)
def test_shards_of_other_kinds(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "run" / "checkpoint-10" / "x").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-10" / "x" / name).write_text("")
    with pytest.raises(SnapshotError, match=message):
        imported(tmp_path)


def test_a_checkpoint_instead_of_the_folder_around_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_file(state(1), tmp_path / "run" / "model.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "run" / "rng_state_0.pth")
    with pytest.raises(
        SnapshotError, match="give the folder that holds folders such as checkpoint"
    ):
        imported(tmp_path)


def test_stray_files_beside_pickles_and_tracks(tmp_path: Path) -> None:
    """Logs do not hide what the others are; a pickle of another name is told."""
    (tmp_path / "run").mkdir()
    for t in TIMES:
        torch.save({"ema_model.w": torch.ones(2)}, tmp_path / "run" / f"0.{t}.pt")
    (tmp_path / "run" / "log.txt").write_text("")
    done = imported(tmp_path, profile=None, sigma_rel=0.1)
    assert done.kind == "ema-pytorch"
    for name in ("network-snapshot-0000008-0.050.pkl", "network-snapshot-latest.pkl"):
        (tmp_path / "run" / name).write_bytes(b"")
    with pytest.raises(SnapshotError, match=r"network-snapshot-latest\.pkl does not say which av"):
        imported(tmp_path)
    (tmp_path / "run" / "network-snapshot-latest.pkl").unlink()
    (tmp_path / "run" / "network-snapshot-0000008-9.000.pkl").write_bytes(b"")
    with pytest.raises(SnapshotError, match=r"-9\.000\.pkl names an average that there is not: si"):
        imported(tmp_path)
