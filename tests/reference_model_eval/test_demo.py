"""The demo and the commands around it, as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from reference_model.checkpoint import RunDirError
from reference_model.cli import main
from reference_model.cli_protocol import chosen_protocol
from reference_model.demo import QUICK, demo, remove_run
from reference_model.protocol import Protocol


def run(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exit_code != status:
        raise AssertionError(f"exit status {result.exit_code}: {result.output}") from (
            result.exception
        )
    return result.output


def test_the_demo_says_what_it_found_and_what_to_type_next(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    path = demo(run_dir, quick=True)
    out = capsys.readouterr().out
    assert path == run_dir / "report.html"
    assert str(path) in out
    assert "Best EMA length: σ_rel" in out
    assert f"generate --run-dir {run_dir}" in out


def test_a_second_demo_reuses_every_finished_stage(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr("reference_model.parallel_generation.generate_images", refuse)
    monkeypatch.setattr("reference_model.classifier.train_classifier", refuse)
    monkeypatch.setattr("reference_model.train.EDM2Loss.__call__", refuse)
    demo(run_dir, quick=True, progress=False)
    # The guard works: without the sweep's record it measures again.
    (run_dir / "sweep.json").unlink()
    with pytest.raises(AssertionError, match="done again"):
        demo(run_dir, quick=True, progress=False)


def test_another_run_in_the_directory_is_refused_with_the_way_out(run_dir: Path):
    with pytest.raises(RunDirError, match=r"was started with .*--fresh"):
        demo(run_dir, quick=False, progress=False)


def test_fresh_removes_the_run_and_nothing_else(run_dir: Path):
    (run_dir / "notes.txt").write_text("mine")
    (run_dir / "kept").mkdir()
    remove_run(run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == ["kept", "notes.txt"]
    remove_run(run_dir / "not there")


def test_sweep_as_a_table_and_as_json(run_dir: Path):
    table = run("sweep", "--run-dir", run_dir, "--sigma-rel", "0.1,0.2", "--quiet")
    assert "best" in table
    assert str(run_dir / "report.html") in table
    data = json.loads(run("sweep", "--run-dir", run_dir, "--sigma-rel", "0.1", "--quiet", "--json"))
    # What the demo measured, under its protocol, without asking for it again.
    lengths = [row["sigma_rel"] for row in data["measurements"]]
    assert lengths == [None, *QUICK.sigma_rels]
    assert data["best"] in QUICK.sigma_rels


def test_evaluate_raw_and_averaged(run_dir: Path):
    data = json.loads(run("evaluate", "--run-dir", run_dir, "--raw", "--quiet", "--json"))
    recorded = json.loads((run_dir / "sweep.json").read_text())["measurements"][0]
    assert data["measurements"][0]["distances"] == recorded["scores"]["distance"]
    text = run("evaluate", "--run-dir", run_dir, "--sigma-rel", "0.1", "--quiet", "--repeats", "1")
    assert [line.split()[0] for line in text.splitlines()] == ["sigma_rel", "0.1"]


def test_the_protocol_of_the_sweep_is_the_default_of_later_commands(run_dir: Path):
    assert chosen_protocol(run_dir, {"images": None, "repeats": 3}) == Protocol(
        images=40, repeats=3, num_steps=2, batch_size=40
    )
    assert chosen_protocol(run_dir / "none", {}) == Protocol()


def test_report_command(run_dir: Path):
    (run_dir / "report.html").unlink()
    assert str(run_dir / "report.html") in run("report", "--run-dir", run_dir)
    assert (run_dir / "report.html").exists()


def test_misuse_is_explained(run_dir: Path, tmp_path: Path):
    assert "give --sigma-rel" in run("evaluate", "--run-dir", run_dir, status=2)
    assert "config.json does not exist" in run("report", "--run-dir", tmp_path / "x", status=1)
    few = run("sweep", "--run-dir", run_dir, "--images", "20", "--quiet", status=1)
    assert "at least 33 images" in few
    shutil.rmtree(run_dir / "ema")
    gone = run("evaluate", "--run-dir", run_dir, "--sigma-rel", "0.1", "--quiet", status=1)
    assert "ema" in gone


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.05", [0.05]),
        ("0.1, 0.05,0.1", [0.1, 0.05]),
        ("0.01,0.02,...,0.05,0.1", [0.01, 0.02, 0.03, 0.04, 0.05, 0.1]),
    ],
)
def test_lists_of_lengths(text: str, numbers: list[float], run_dir: Path):
    from reference_model.cli_support import SigmaRels

    assert list(SigmaRels().convert(text, None, None)) == numbers


@pytest.mark.parametrize(
    "text", ["", "a", "0.1,...", "...,0.2", "0.1,0.2,...,0.25", "0.2,0.1,...,0"]
)
def test_lists_that_are_none_are_refused(text: str, run_dir: Path):
    output = run("sweep", "--run-dir", run_dir, f"--sigma-rel={text}", status=2)
    assert "is not of the form" in output or "do not lead to" in output
