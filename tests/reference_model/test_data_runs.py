"""Runs on data sets from disk: trained, sampled and measured through the encoder of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from reference_model import build_model
from reference_model.averages import Weights
from reference_model.checkpoint import RunDirError, load_config
from reference_model.cli import main
from reference_model.configs import FASHION_MNIST
from reference_model.data import load_dataset
from reference_model.encoders import make_encoder
from reference_model.evaluate import evaluate
from reference_model.generate import generate
from reference_model.presets import preset
from reference_model.protocol import Protocol
from reference_model.sampler_config import SamplerConfig
from reference_model.sweep import sweep
from reference_model.train import check_fit, train
from tests.reference_model.data_sets import pixels, write_idx
from tests.reference_model.small_vae import save_vae

SHORT = {"batch_size": 8, "total_nimg": 24, "snapshot_nimg": 8, "stats_nimg": 8}
CLASSES = 3


def squares(folder: Path) -> Path:
    """Write 96 + 48 images of 8×8, bright where their class says, as IDX files."""
    folder.mkdir()
    for part, count in (("train", 96), ("t10k", 48)):
        labels = np.arange(count) % CLASSES
        images = pixels(count, 8, 8, seed=count) // 4
        images[np.arange(count), :, 2 * labels] += 128
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels.astype(np.uint8))
    return folder


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose network works on 4×4×4 in place of 8×8×1."""
    folder = tmp_path_factory.mktemp("folded")
    options = ["--encoder", "space-to-depth", "--img-resolution", "4", "--img-channels", "4"]
    options += ["--attn-resolutions", "2", "--label-dim", str(CLASSES)]
    for name, value in SHORT.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    data, run_dir = squares(folder / "data"), folder / "run"
    run(
        "train", "--preset", "digits-tiny", "--data", str(data), "--run-dir", str(run_dir), *options
    )
    return run_dir


def test_run_remembers_data_and_encoder(folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(folded)
    assert config.encoder == "space-to-depth"
    assert config.data == str((folded.parent / "data").resolve())
    monkeypatch.chdir(folded.parent)
    assert "Finished" in run("train", "--run-dir", "run", "--data", "data", "--quiet")


def test_images_are_unfolded(folded: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sampler": SamplerConfig(num_steps=2), "progress": False}
    grid = generate(folded, tmp_path, [0, 1], sigma_rel=0.1, scale=1, **options).grid
    with Image.open(tmp_path / "seed000001.png") as image:
        assert image.size == (8, 8)
    assert grid is not None
    with Image.open(grid) as image:
        assert image.size == (17, 8)
    # Enlarged to 32 pixels unless told otherwise: what counts are pixels, not network input.
    generate(folded, tmp_path / "enlarged", [0], sigma_rel=0.1, **options)
    with Image.open(tmp_path / "enlarged" / "seed000000.png") as image:
        assert image.size == (32, 32)


def test_run_is_measured_against_the_sets_own_test_set(folded: Path) -> None:
    protocol = Protocol(images=36, repeats=1, num_steps=2, batch_size=36)
    record = sweep(folded, [0.1], protocol, progress=False)
    described = record.settings["judge"]
    assert (described["train_images"], described["held_out_images"]) == (96, 48)
    assert described["accuracy"] > 0.9
    with Image.open(folded / "samples" / "real.png") as sheet:
        assert sheet.size == (10 * 8, 4 * 8)  # 36 images in rows of ten
    (score,) = evaluate(folded, [Weights(folded, None)], protocol, progress=False)
    assert record.raw is not None
    assert score.distances == record.raw.distances


def test_images_without_classes_cannot_be_judged_by_them(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", pixels(40, 8, 8))
    config = replace(
        preset("digits-tiny"),
        data=str(tmp_path),
        network=replace(preset("digits-tiny").network, label_dim=0),
        **SHORT,
    )
    train(config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="has no classes, and this measure is a classifier's"):
        evaluate(tmp_path / "run", [], Protocol(images=40), progress=False)


def test_latents_are_trained_on_and_decoded_by_an_autoencoder_named_later(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mean, std = rng.standard_normal((20, 4, 8, 8)), np.ones((20, 4, 8, 8))
    np.savez(tmp_path / "set.npz", mean=mean, std=std, labels=np.arange(20) % 10)
    config = replace(
        preset("digits-tiny"),
        data=str(tmp_path / "set.npz"),
        encoder="latents",
        network=replace(preset("digits-tiny").network, img_channels=4),
        **SHORT,
    )
    run_dir = tmp_path / "run"
    assert train(config, run_dir, progress=False) == 24
    options: dict[str, Any] = {"sampler": SamplerConfig(num_steps=1), "scale": 1, "progress": False}
    with pytest.raises(ValueError, match=r"train --run-dir RUN --vae FOLDER` tells a run, also a"):
        generate(run_dir, tmp_path / "out", [0], sigma_rel=None, **options)

    save_vae(tmp_path / "vae")
    weights = (run_dir / "checkpoint.pt").read_bytes()
    run("train", "--run-dir", str(run_dir), "--vae", str(tmp_path / "vae"), "--quiet")
    assert load_config(run_dir) == replace(config, vae=str((tmp_path / "vae").resolve()))
    assert (run_dir / "checkpoint.pt").read_bytes() == weights
    generate(run_dir, tmp_path / "out", [0], sigma_rel=None, **options)
    with Image.open(tmp_path / "out" / "seed000000.png") as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")


def test_what_training_depends_on_does_not_change(folded: Path) -> None:
    config = load_config(folded)
    with pytest.raises(RunDirError, match=r"started with held_out=0\.25 \(now 0\.1\); continue"):
        train(replace(config, held_out=0.1, vae="anywhere"), folded, progress=False)
    assert load_config(folded) == config


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("space-to-depth", r"'digits', encoded by 'space-to-depth', has \(4, 4, 4\); set img_ch"),
        ("latents", "encoder 'latents' takes 4 channels"),
        ("jpeg", "encoder must be one of rgb"),
    ],
)
def test_encoder_must_fit(tmp_path: Path, encoder: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(replace(preset("digits-tiny"), encoder=encoder), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "encoder"), [("mean", "rgb"), ("images", "latents")])
def test_pixels_and_latents_are_not_confused(tmp_path: Path, name: str, encoder: str) -> None:
    images = pixels(8, 4, 8, 8)
    np.save(tmp_path / f"{name}.npy", images if name == "images" else images / np.float32(255))
    network = replace(preset("digits-tiny").network, img_channels=4, label_dim=0)
    config = replace(preset("digits-tiny"), data=str(tmp_path), encoder=encoder, network=network)
    with pytest.raises(ValueError, match=f"which the encoder '{encoder}' does not take"):
        train(config, tmp_path / "run", progress=False)


def test_preset_for_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network fits 28×28 grey images in ten classes."""
    config = preset("fashion")
    assert config.data == FASHION_MNIST
    write_idx(tmp_path / "train-images-idx3-ubyte", pixels(20, 28, 28))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    dataset = load_dataset(str(tmp_path))
    check_fit(config, dataset, make_encoder(config.encoder))
    net = build_model(**config.to_dict()["network"])
    assert net.num_parameters() == 724_139
    assert config.total_nimg % config.snapshot_nimg == 0
    absent = str(tmp_path / "absent")
    monkeypatch.setattr("reference_model.data.FASHION_MNIST", absent)
    with pytest.raises(ValueError, match="`apt-get install dataset-fashion-mnist` puts it there"):
        load_dataset(absent)
