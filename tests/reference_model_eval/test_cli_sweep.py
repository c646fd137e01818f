"""The command `sweep`: what it prints, records and refuses, and that a kill costs nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from reference_model.cli import main
from reference_model.held_out_loss import LOSS


def command(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["sweep", *(str(a) for a in arguments)])
    if result.exit_code != status:
        raise AssertionError(f"exit status {result.exit_code}: {result.output}") from (
            result.exception
        )
    return result.output


def test_a_killed_sweep_goes_on_and_measures_nothing_twice(run_dir: Path):
    """Killed for good, not interrupted: the process has no chance to save anything."""
    (run_dir / "sweep.json").unlink()
    arguments = ["--run-dir", str(run_dir), "--sigma-rel", "0.05,0.1", "--guidance", "1,1.5,2",
                 "--guide-sigma-rel", "0.2,0.25", "--quiet", "--images", "200", "--repeats", "1",
                 "--num-steps", "4", "--threads", "1"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "reference_model", "sweep", *arguments])
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (run_dir / "sweep.json").exists() and len(_measured(run_dir)) >= 2:
                break
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = _measured(run_dir)
    assert 2 <= len(before) < 10
    command(*arguments)
    after = _measured(run_dir)
    assert len(after) == 10  # two lengths alone, and by two guides of two strengths
    # Seconds differ in every measurement that is made anew.
    assert all(m in after for m in before)


def _measured(run_dir: Path) -> list[object]:
    return json.loads((run_dir / "sweep.json").read_text())["measurements"]


def test_the_command_measures_times_guides_and_tensors(run_dir: Path):
    common = ("--run-dir", run_dir, "--quiet")
    table = command(*common, "--sigma-rel", "0.1,0.2", "--at", "0.5,1")
    assert "images seen" in table
    assert table.count("\n  ") >= 2
    table = command(*common, "--sigma-rel", "0.1", "--guidance", "1,2", "--guide-sigma-rel", "0.2")
    assert "guide" in table
    assert "σ_rel 0.2" in table
    table = command(*common, "--sensitivity", "--layers", "unet.out.*", "--sigma-rel", "0.1")
    assert "unet.out.gain.* at 0.05" in table
    assert LOSS in table
    data = json.loads(command(*common, "--find-best", "--bounds", "0.1,0.2", "--budget", "3",
                              "--json"))  # fmt: skip
    kinds = [(r["t"], bool(r["guide"]), bool(r["changed"])) for r in data["measurements"]]
    assert {(400, False, False), (800, True, False), (800, False, True)} <= set(kinds)
    (changed, *_) = (r for r in data["measurements"] if r["changed"])
    assert changed["distance"] is None
    assert set(changed["scores"]) == {LOSS}
    page = (run_dir / "report.html").read_text()
    for section in ("quality", "times", "guidance", "sensitivity", "samples"):
        assert f'id="{section}"' in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--find-best --sigma-rel 0.1", "give --bounds, no --sigma-rel"),
        ("--at 0.5 --times 2", "either --at or --times"),
        ("--guide-sigma-rel 0.2", "a guide without strength"),
        ("--guidance 2", "--guidance needs a guide: --guidance-sigma-rel 0.25"),
        ("--find-best --guidance 2 --guide-t 0.5", "needs --guidance-sigma-rel"),
        ("--sensitivity --times 2", "--sensitivity goes with neither"),
        ("--sensitivity --sigma-rel 0.1,0.2", "--sensitivity takes one --sigma-rel"),
        ("--find-best --measure loss", "--measure loss takes no samples"),
        ("--guidance 2 --guide-t 0.5 --measure loss", "--measure loss takes no samples"),
        ("--layers unet.*", "belong to --sensitivity"),
        ("--at now", "'now' is no time; give images, as in 64ki"),
        ("--at 0", "'0' is no time"),
        ("--guidance a", "'a' is not of the form 1,1.5,2"),
        ("--times 0", "0 is not in the range"),
    ],
)
def test_misuse_is_explained(arguments: str, message: str, finished_demo: Path):
    assert message in command("--run-dir", finished_demo, *arguments.split(), status=2)


def test_what_the_run_does_not_offer_is_explained(run_dir: Path):
    text = command("--run-dir", run_dir, "--guidance", "2", "--guide-run", run_dir / "none",
                   "--quiet", status=1)  # fmt: skip
    assert "none" in text
    text = command("--run-dir", run_dir, "--at", "5k", "--quiet", status=1)
    assert "the run has snapshots up to 800 images" in text


def test_times_are_read_with_suffixes(finished_demo: Path):
    from reference_model.cli_sweep import Times

    assert Times().convert("64ki, 128k,1Mi,2M,0.5,300", None, None) == (
        65536, 128_000, 2**20, 2_000_000, 0.5, 300,
    )  # fmt: skip
