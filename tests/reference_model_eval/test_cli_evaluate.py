"""The commands `evaluate` and `statistics`: what they print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from reference_model.averages import Weights, load_networks
from reference_model.checkpoint import load_config
from reference_model.cli import main
from reference_model.cli_protocol import chosen_protocol
from reference_model.demo import QUICK
from reference_model.guidance import Guide
from reference_model.judge import Judge
from reference_model.points import Point
from reference_model.protocol import Protocol
from reference_model.sweep_record import load_record

# torch deprecates TorchScript, which is the form in which people have Inception's weights.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Rows(nn.Module):
    """Eight features: means of the rows."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=3).flatten(1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "rows.pt"
    torch.jit.save(torch.jit.script(Rows()), str(path))
    return f"torchscript:{path}"


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == status, result.output
    return result.output


def measure(run_dir: Path, *arguments: object) -> dict[str, Any]:
    return json.loads(run("evaluate", "--run-dir", run_dir, "--quiet", "--json", *arguments))


def test_several_lengths_and_the_raw_weights_at_once(run_dir: Path):
    data = measure(run_dir, "--raw", "--sigma-rel", "0.07,0.2", "--held-out-loss")
    assert data["protocol"]["images"] == QUICK.protocol.images  # that of the sweep
    record = load_record(run_dir)
    assert record is not None
    for row, sigma_rel in zip(data["measurements"], (None, 0.07, 0.2), strict=True):
        assert row["sigma_rel"] == sigma_rel
        found = record.find(Point(sigma_rel, 800))
        assert found is not None
        assert row["distance"] == found.distance
        assert row["standard_error"] == found.error
        assert set(row["more"]) == {"precision", "recall", "held-out loss"}
        assert all(len(v) == QUICK.protocol.repeats for v in row["more"].values())


def test_the_table_has_a_line_for_each(run_dir: Path):
    text = run(
        "evaluate", "--run-dir", run_dir, "--quiet", "--raw", "--sigma-rel", "0.1", "--repeats", 1
    )
    head, raw, averaged = text.splitlines()
    columns = ["sigma_rel", "distance", "std", "error", "precision", "recall", "as", "intended"]
    assert head.split() == columns
    assert raw.split()[:1] + averaged.split()[:1] == ["raw", "0.1"]
    assert raw.split()[2] == "-"  # one repeat has no spread


def test_guidance_and_solver_are_those_of_generate(run_dir: Path):
    options = ("--sigma-rel", 0.1, "--repeats", 1, "--sampler", "euler", "--sigma-max", 40)
    guided = ("--guidance", 2, "--guidance-sigma-rel", 0.2, "--guidance-interval", "0.1,50")
    (plain,) = measure(run_dir, *options)["measurements"]
    (row,) = measure(run_dir, *options, *guided)["measurements"]
    assert row["distances"] != plain["distances"]
    net, gnet = load_networks([Weights(run_dir, 0.1), Weights(run_dir, 0.2)])
    guide = Guide(gnet, 2.0, (0.1, 50.0))
    protocol = chosen_protocol(run_dir, {"repeats": 1})
    score = Judge(load_config(run_dir), protocol, run_dir, progress=False).score(
        net, gnet=[guide.net], guidance=[guide.guidance], guidance_interval=[guide.interval],
        sampler="euler", sigma_max=40.0,
    )  # fmt: skip
    assert tuple(row["distances"]) == score.distances


def test_a_folder_of_generated_images_has_the_distance_of_its_weights(run_dir: Path):
    protocol = QUICK.protocol
    classes = ",".join(map(str, protocol.classes(10)))
    folders = []
    for repeat in range(protocol.repeats):
        seeds = protocol.seeds(repeat)
        folders += ["--from", run_dir / f"images{repeat}"]
        for part in ("1/2", "2/2"):
            run(
                "generate", "--run-dir", run_dir, "--sigma-rel", 0.1, "--quiet", "--part", part,
                "--seeds", f"{seeds.start}-{seeds.stop - 1}", "--classes", classes,
                "--num-steps", protocol.num_steps, "--out", run_dir / f"images{repeat}",
            )  # fmt: skip
    (row,) = measure(run_dir, *folders)["measurements"]
    record = load_record(run_dir)
    assert record is not None
    found = record.find(Point(0.1, 800))
    assert found is not None
    # Another batch size sums in another order: a pixel may round to the next of 255 levels.
    assert row["distances"] == pytest.approx(found.distances, rel=1e-2)
    assert row["images"] == [str(path) for path in folders[1::2]]


def test_statistics_of_parts_are_merged_compared_and_compared_with(
    run_dir: Path, tmp_path: Path, rows: str
):
    run(
        "generate", "--run-dir", run_dir, "--sigma-rel", 0.1, "--quiet", "--seeds", "0-29",
        "--num-steps", 2, "--out", tmp_path / "images",
    )  # fmt: skip
    statistics = ("statistics", "--quiet", "--features", rows)
    for part in (1, 2):
        text = run(
            *statistics, tmp_path / "images", "--part", f"{part}/2", "--out",
            tmp_path / f"{part}.npz",
        )  # fmt: skip
        assert "8 torchscript features of 15 images" in text
    parts = [tmp_path / "2.npz", tmp_path / "1.npz"]
    assert "30 images" in run("statistics", *parts, "--out", tmp_path / "all.npz", "--quiet")
    measured = {
        source: measure(run_dir, "--features", rows, "--from", tmp_path / source)["measurements"]
        for source in ("images", "all.npz")
    }
    (folder,), (merged,) = measured.values()
    # Sums of 30 float64 terms in another order.
    assert merged["distances"] == pytest.approx(folder["distances"], rel=1e-9)
    assert merged["more"] == folder["more"]

    options = ("--features", rows, "--reference", tmp_path / "all.npz", "--from", tmp_path)
    (itself,) = measure(run_dir, *options[:-1], tmp_path / "all.npz")["measurements"]
    # Traces of about 1e4 cancel: 1e-8 is a thousand of their ulp.
    assert itself["distances"] == pytest.approx([0.0], abs=1e-8)
    assert itself["more"] == {"precision": [1.0], "recall": [1.0]}


def test_a_sweep_under_other_features_is_another_record(run_dir: Path, rows: str):
    before = load_record(run_dir)
    assert before is not None
    assert before.settings["protocol"]["features"] == "classifier"
    assert chosen_protocol(run_dir, {"features": rows}).features == rows
    settings = {**before.settings, "protocol": {**before.settings["protocol"], "features": rows}}
    assert settings != before.settings


def test_misuse_is_explained(run_dir: Path, tmp_path: Path, rows: str):
    evaluate = ("evaluate", "--run-dir", run_dir, "--quiet")
    assert "give --sigma-rel" in run(*evaluate, status=2)
    folder = tmp_path / "images"
    folder.mkdir()
    assert "give --sigma-rel" in run(*evaluate, "--raw", "--from", folder, status=2)
    text = run(*evaluate, "--from", folder, "--num-steps", 3, "--guidance", 2, status=2)
    assert "--num-steps, --guidance cannot be applied" in " ".join(text.split())
    assert "holds no images" in run(*evaluate, "--from", folder, status=1)
    assert "a guide without strength" in run(
        *evaluate, "--raw", "--guidance-sigma-rel", 0.2, status=2
    )
    assert "the guide is the network itself" in run(
        *evaluate, "--sigma-rel", 0.1, "--guidance", 2, status=2
    )
    assert "features must be one of" in run(*evaluate, "--raw", "--features", "clip:x", status=1)
    assert "nothing is downloaded" in run(*evaluate, "--raw", "--features", "dinov2:none", status=1)

    statistics = ("statistics", "--quiet", "--out", tmp_path / "out.npz")
    data = tmp_path / "set.npy"
    np.save(data, np.zeros((9, 8, 8), np.uint8))
    assert "say by --features" in run(*statistics, data, status=1)
    assert "does not come from a file" in run(
        *statistics, data, "--features", "classifier", status=1
    )
    run(*statistics, data, "--features", rows)
    assert "merged whole" in run(*statistics, tmp_path / "out.npz", "--part", "1/2", status=1)
    assert "images of shape (1, 4, 4)" in _other_shape(run_dir, tmp_path, rows)
    unequal = ("--from", data, "--from", tmp_path / "ten.npy", "--features", rows)
    np.save(tmp_path / "ten.npy", np.zeros((10, 8, 8), np.uint8))
    assert "9 and 10 images" in run(*evaluate, *unequal, status=1)


def _other_shape(run_dir: Path, tmp_path: Path, rows: str) -> str:
    np.save(tmp_path / "small.npy", np.zeros((9, 4, 4), np.uint8))
    return run(
        "evaluate", "--run-dir", run_dir, "--quiet", "--features", rows, "--from",
        tmp_path / "small.npy", status=1,
    )  # fmt: skip


def test_torchrun_is_for_generating(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = run("evaluate", "--run-dir", run_dir, "--raw", status=2)
    assert "let torchrun `generate`" in " ".join(text.split())


def test_protocol_flags_are_taken_over_and_turned_off(run_dir: Path):
    assert not chosen_protocol(run_dir, {"held_out_loss": None}).held_out_loss
    assert chosen_protocol(run_dir, {"held_out_loss": True}).held_out_loss
    assert not Protocol().held_out_loss
    (row,) = measure(run_dir, "--raw", "--no-held-out-loss", "--repeats", 1)["measurements"]
    assert "held-out loss" not in row["more"]
