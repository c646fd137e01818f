"""Presets, configs, and the commands train and generate."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from reference_model.cli import main
from reference_model.cli_support import parse_numbers
from reference_model.configs import NetworkConfig, TrainConfig
from reference_model.generate import tile, to_pil
from reference_model.presets import PRESETS, preset

QUICK = ["--batch-size", "8", "--total-nimg", "48", "--snapshot-nimg", "16", "--quiet"]


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, list(arguments))
    if result.exit_code != status:
        raise AssertionError(f"exit status {result.exit_code}: {result.output}") from (
            result.exception
        )
    return result.output


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "digits"
    output = run("train", "--preset", "digits-tiny", "--run-dir", str(run_dir), *QUICK)
    assert output == "Finished after 48 of 48 images.\n"
    return run_dir


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = preset(name)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "channels", "lr", "dropout", "ref_batches", "million_images", "P"),
    [
        ("edm2-img512-xs", 128, 0.0120, 0.0, 70_000, 2147.5, (-0.4, 1.0)),
        ("edm2-img512-s", 192, 0.0100, 0.0, 70_000, 2147.5, (-0.4, 1.0)),
        ("edm2-img512-m", 256, 0.0090, 0.1, 70_000, 2147.5, (-0.4, 1.0)),
        ("edm2-img512-l", 320, 0.0080, 0.1, 70_000, 1879.0, (-0.4, 1.0)),
        ("edm2-img512-xl", 384, 0.0070, 0.1, 70_000, 1342.2, (-0.4, 1.0)),
        ("edm2-img512-xxl", 448, 0.0065, 0.1, 70_000, 939.5, (-0.4, 1.0)),
        ("edm2-img64-s", 192, 0.0100, 0.0, 35_000, 1073.7, (-0.8, 1.6)),
        ("edm2-img64-m", 256, 0.0090, 0.1, 35_000, 2147.5, (-0.8, 1.6)),
        ("edm2-img64-l", 320, 0.0080, 0.1, 35_000, 1073.7, (-0.8, 1.6)),
        ("edm2-img64-xl", 384, 0.0070, 0.1, 35_000, 671.1, (-0.8, 1.6)),
    ],
)
def test_presets_match_the_paper(
    name: str,
    channels: int,
    lr: float,
    dropout: float,
    ref_batches: float,
    million_images: float,
    P: tuple[float, float],
) -> None:
    """Table 6."""
    c = preset(name)
    assert (c.network.model_channels, c.ref_lr, c.network.dropout) == (channels, lr, dropout)
    assert (c.ref_batches, round(c.total_nimg / 1e6, 1)) == (ref_batches, million_images)
    assert (c.batch_size, c.betas, c.rampup_nimg) == (2048, (0.9, 0.99), 10_000_000)
    assert (c.P_mean, c.P_std) == P
    assert c.network.img_channels == (4 if "512" in name else 3)


def test_every_config_field_has_help_and_an_option() -> None:
    text = run("train", "--help")
    for kind in (NetworkConfig, TrainConfig):
        for spec in fields(kind):
            if spec.name != "network":
                assert spec.metadata["help"]
                assert f"--{spec.name.replace('_', '-')} " in text


def test_torch_is_loaded_by_the_network_and_not_by_the_command_line() -> None:
    code = (
        "import sys, reference_model.cli; print('torch' in sys.modules);"
        "from reference_model import build_model; print('torch' in sys.modules)"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.split() == ["False", "True"]


def test_unknown_name_in_the_package() -> None:
    import reference_model

    with pytest.raises(AttributeError, match="has no attribute 'build_modle'"):
        _ = reference_model.build_modle


def test_options_override_the_preset(tmp_path: Path) -> None:
    options = ["--model-channels", "4", "--attn-resolutions", "", "--clip-act", "none"]
    run("train", "--preset", "digits-tiny", "--run-dir", str(tmp_path), *QUICK, *options)
    tiny = preset("digits-tiny")
    network = replace(tiny.network, model_channels=4, attn_resolutions=(), clip_act=None)
    expected = replace(
        tiny, batch_size=8, total_nimg=48, snapshot_nimg=16, network=network
    ).to_dict()
    assert json.loads((tmp_path / "config.json").read_text()) == expected


def test_run_dir_alone_continues_a_run(finished: Path) -> None:
    assert run("train", "--run-dir", str(finished), "--quiet").startswith("Finished after 48")


def test_new_run_needs_a_preset(tmp_path: Path) -> None:
    output = run("train", "--run-dir", str(tmp_path / "new"), status=2)
    assert "holds no run yet; start one with --preset" in output


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--channel-mult", "1,x"], 2, "'1,x' is not of the form int,..."),
        (["--seed", "none"], 2, "'none' is not of the form int"),
        (["--config", "H"], 1, "config must be one of A, B, C, D, E, F, G, U (got 'H')"),
        (["--config", "B", "--leave-out", "mp_silu"], 1, "config B has no mp_silu to leave out"),
        (["--data", ""], 1, "no data set given; 'digits' is built in"),
        (["--betas", "0.9"], 1, "betas must be two numbers in [0, 1) (got (0.9,))"),
        (["--betas", "0.9,1"], 1, "betas must be two numbers in [0, 1)"),
        (["--ema-sigma-rel", "0.05,0.3"], 1, "EMA lengths must lie in (0, 0.2887] (got 0.3)"),
        (["--ema-sigma-rel", ","], 1, "ema_sigma_rel must name at least one EMA length"),
        (["--direct-sigma-rel", "0"], 1, "EMA lengths must lie in (0, 0.2887] (got 0.0)"),
        (["--channel-mult", "1,0"], 1, "channel_mult must name levels of 1 or more"),
        (["--channels-per-head", "0"], 1, "channels_per_head must be at least 1 (got 0)"),
        (["--P-std", "nan"], 1, "P_std must be at least 0 (got nan)"),
        (["--seed", "-1"], 1, "seed must be at least 0 (got -1)"),
        (["--loss-scaling", "0"], 1, "loss_scaling must be positive (got 0.0)"),
        (["--sigma-data", "0"], 1, "sigma_data must be positive (got 0.0)"),
        (["--device", "gpu"], 2, "'gpu' is no device; give cpu, cuda, cuda:1, ..."),
        (["--device", "mps"], 2, "PyTorch finds no mps device here; --device cpu works"),
    ],
)
def test_misuse_is_explained(tmp_path: Path, options: list[str], status: int, message: str) -> None:
    base = ["train", "--preset", "digits-tiny", "--run-dir", str(tmp_path / "new")]
    output = run(*base, *options, status=status)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "new").exists()  # or the right options would be refused next time


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rho", "0"], "rho must be positive (got 0.0)"),
        (["--batch-size", "0"], "batch_size must be at least 1 (got 0)"),
        (["--S-churn", "-1"], "S_churn must be at least 0 (got -1.0)"),
    ],
)
def test_senseless_sampling_is_explained(
    finished: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    base = ["generate", "--run-dir", str(finished), "--raw", "--out", str(tmp_path / "out")]
    assert message in run(*base, *options, "--quiet", status=1)


def test_generate_writes_each_image_and_a_grid(finished: Path, tmp_path: Path) -> None:
    options = ["--run-dir", str(finished), "--out", str(tmp_path), "--num-steps", "3"]
    run("generate", *options, "--sigma-rel", "0.08", "--seeds", "0-3,7")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["grid.png", *(f"seed{s:06d}.png" for s in (0, 1, 2, 3, 7))]
    assert pixels(tmp_path / "seed000007.png").shape == (32, 32)
    # Three columns, two rows, margins of one pixel, all four times enlarged.
    assert pixels(tmp_path / "grid.png").shape == (4 * 17, 4 * 26)


def test_generated_weights_can_be_raw(finished: Path, tmp_path: Path) -> None:
    base = ["generate", "--run-dir", str(finished), "--num-steps", "3", "--seeds", "1"]
    base += ["--scale", "1", "--classes", "4"]
    run(*base, "--raw", "--out", str(tmp_path / "raw"))
    run(*base, "--sigma-rel", "0.25", "--out", str(tmp_path / "long"))
    raw, long = (pixels(tmp_path / name / "seed000001.png") for name in ("raw", "long"))
    assert raw.shape == (8, 8)
    assert (raw != long).any()


def test_classes_are_taken_in_turn(finished: Path, tmp_path: Path) -> None:
    base = ["generate", "--run-dir", str(finished), "--num-steps", "3", "--raw", "--scale", "1"]
    run(*base, "--seeds", "1-3", "--classes", "4,7", "--out", str(tmp_path / "both"))
    run(*base, "--seeds", "3", "--classes", "4", "--out", str(tmp_path / "one"))
    both, one = (pixels(tmp_path / name / "seed000003.png").astype(int) for name in ("both", "one"))
    # The last bit of float32 can turn a rounding to eight bits.
    assert abs(both - one).max() <= 1


def test_generate_needs_one_choice_of_weights(finished: Path, tmp_path: Path) -> None:
    options = ["generate", "--run-dir", str(finished), "--out", str(tmp_path)]
    assert "give either --sigma-rel" in run(*options, status=2)
    assert "give either" in run(*options, "--raw", "--sigma-rel", "0.1", status=2)


def test_generate_from_nothing_is_explained(tmp_path: Path) -> None:
    options = ["generate", "--run-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--raw"]
    assert "config.json does not exist; start a run with" in run(*options, status=1)


def test_seeds_are_numbers_and_ranges() -> None:
    assert parse_numbers("0-3,10, 12", "seeds") == [0, 1, 2, 3, 10, 12]


@pytest.mark.parametrize("text", ["", "a", "3-", "5-2"])
def test_other_seeds_are_refused(text: str) -> None:
    from click import UsageError

    with pytest.raises(UsageError, match="seeds must"):
        parse_numbers(text, "seeds")


def test_tile_lays_out_rows() -> None:
    images = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 1, 1)
    assert tile(images, margin=0)[0].tolist() == [[1, 2, 3], [4, 5, 255]]


def test_latents_are_not_shown_as_pictures() -> None:
    with pytest.raises(ValueError, match="image of 2 channels"):
        to_pil(torch.zeros(2, 4, 4, dtype=torch.uint8))
    assert to_pil(torch.zeros(3, 4, 4, dtype=torch.uint8)).mode == "RGB"
