"""``posthoc-ema import``: what is said, and that one command makes averages."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import DATA_SAYS_NO, MISUSE, files_of, invoke, invoke_json
from helpers import assert_equal
from safetensors.numpy import load_file

from posthoc_ema import PowerFunction, Uniform, import_snapshots, reconstruct


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Raw checkpoints of a random walk, sixteen of them."""
    source = tmp_path / "checkpoints"
    source.mkdir()
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(40, 30))
    for step in range(50, 801, 50):
        weights = weights + 0.1 * rng.normal(size=weights.shape)
        torch.save({"w": torch.from_numpy(weights).float()}, source / f"step-{step}.pt")
    return source


def test_one_command_makes_averages(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "ema"
    said = invoke("import", source, out, "--profile", "raw", "--reconstruct", "0.1,0.2").stdout
    assert "checkpoints: 16 snapshots, t in steps" in said
    assert "step-50.pt" in said
    assert "step-800.pt" in said
    assert "16 snapshots in" in said
    averages = tmp_path / "ema-averages"
    assert files_of(averages) == ["sigma_rel=0.1.safetensors", "sigma_rel=0.2.safetensors"]
    expected = reconstruct(out, 0.1, framework="numpy").params["w"]
    assert_equal(load_file(averages / "sigma_rel=0.1.safetensors")["w"], expected)
    again = invoke("import", source, out, "--profile", "raw").stdout
    assert "16 of them imported before" in again


def test_as_json(source: Path, tmp_path: Path) -> None:
    common = ("import", source, tmp_path / "ema", "--profile", "raw:step=2", "--unit", "batches")
    dry = invoke_json(*common, "--dry-run")
    assert (dry["kind"], dry["unit"], dry["dry_run"]) == ("checkpoints", "batches", True)
    assert dry["files"][0]["t"] == 50
    assert dry["files"][0]["profile"] == Uniform(2, relative=False).to_dict()
    assert dry["snapshots"] == []
    assert not (tmp_path / "ema").exists()
    done = invoke_json(*common, "--encoding", "delta8", "--reconstruct", "0.2")
    assert len(done["snapshots"]) == 16
    assert done["averages"][0]["profile"]["sigma_rel"] == 0.2
    assert 0 < done["averages"][0]["predicted_error"] < 0.2


def test_a_dry_run_says_what_was_recognised(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "ema"
    said = invoke("import", source, out, "--profile", "exponential:halflife=9", "--dry-run").stdout
    assert "Exponential(halflife=9.0)" in said
    assert "nothing was written" in said
    assert not out.exists()


def test_remarks_and_lengths(source: Path, tmp_path: Path) -> None:
    for path in source.glob("step-*.pt"):
        path.rename(source / f"0.{path.stem.removeprefix('step-')}.pt")
    common = ("import", source, tmp_path / "ema")
    text = invoke(*common, status=DATA_SAYS_NO).stderr
    assert "does not say its EMA length" in text
    done = invoke(*common, "--sigma-rel", "0.05")
    assert "sigma_rel=0.05" in done.stdout
    assert "Note: taken to be updated at every step" in done.stderr
    assert import_snapshots(source, tmp_path / "ema", sigma_rel=0.05).files[0][2] == PowerFunction(
        0.05
    )


def test_a_table(source: Path, tmp_path: Path) -> None:
    rows = "\n".join(f"step-{t}.pt,{t},raw" for t in (50, 100))
    table = tmp_path / "list.csv"
    table.write_text(f"file,t,profile\n{rows}\n")
    said = invoke("import", source, tmp_path / "ema", "--csv", table).stdout
    assert "list: 2 snapshots" in said


def test_plain_means_by_command(source: Path, tmp_path: Path) -> None:
    """LAWA, and how good it is."""
    invoke("import", source, tmp_path / "ema", "--profile", "raw")
    common = ("--profile", "uniform:window=200", "--method", "plain", "--out", tmp_path / "lawa")
    (made,) = invoke_json("reconstruct", tmp_path / "ema", *common)
    assert [c["coefficient"] for c in made["coefficients"]] == [0] * 12 + [0.25] * 4
    assert made["predicted_error"] > 0


class Hostile:
    def __reduce__(self) -> object:
        return os.system, ("touch executed",)


def test_a_hostile_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(3), "x": Hostile()}, source / "step-900.pt")
    result = invoke("import", source, tmp_path / "ema", "--profile", "raw", status=DATA_SAYS_NO)
    assert "step-900.pt refers to posix.system" in result.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone", "out"), "does not exist"),
        ((".", "out", "--kind", "magic"), "Invalid value for '--kind'"),
        ((".", "out", "--profile", "magic"), "is no profile; the forms are"),
        ((".", "out", "--sigma-rel", "0.5"), "sigma_rel must be in"),
        ((".", "out", "--reconstruct", "x"), "is not a number"),
        ((".", "out", "--update-every", "0"), "Invalid value for '--update-every'"),
        ((".", "out", "--kind", "list"), "needs csv="),
        ((".", ".", "--profile", "raw"), "out must be another folder"),
    ],
)
def test_misuse(
    source: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(source)
    assert message in invoke("import", *arguments, status=MISUSE).stderr
