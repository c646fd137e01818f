"""``posthoc-ema plan``: what it advises is what ``plan`` says, and runs when pasted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import DATA_SAYS_NO, MISUSE, invoke, invoke_json
from helpers import assert_at_most, assert_equal
from small_run import write_run

import posthoc_ema
from posthoc_ema import EMA, SnapshotStore, plan

TWO = ("--tracks", "0.05,0.1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "ema")


def test_a_table(tmp_path: Path) -> None:
    lines = invoke("plan", "--budget", 16, "--t-end", 1000, *TWO).stdout.splitlines()
    made = plan(16, (0.01, 0.25), (0.05, 0.1), t_end=1000)
    assert lines[0] == "tracks 0.05, 0.1; 8 times, 16 snapshots"
    assert lines[1] == "times " + ", ".join(f"{t:g}" for t in made.times)
    assert lines[3].split() == ["sigma_rel", "predicted", "error", "evenly", "spaced"]
    (worst,) = (line for line in lines if line.startswith("worst"))
    assert worst.split()[1] == f"{made.worst_error:.2e}"
    assert "relative to the RMS distance that the weights travel" in "\n".join(lines)


def test_as_json() -> None:
    said = invoke_json("plan", "--budget", 12, "--sigma-rel", "0.05,0.1,0.2", "--t-end", 500, *TWO)
    made = plan(12, (0.05, 0.2), (0.05, 0.1), t_end=500)
    assert_equal(said["times"], made.times)
    assert (said["sigma_rel"], said["snapshots"], said["t_end"]) == ([0.05, 0.1], 12, 500)
    assert said["worst_error"] == made.worst_error
    assert [e["predicted_error"] for e in said["errors"]] == list(made.errors)
    assert said["thinning"] is None


@pytest.mark.parametrize("end", [("--t-end", "64"), ("--every", "4")])
def test_its_advice_runs(end: Any, tmp_path: Path) -> None:
    said = invoke_json("plan", "--budget", 8, "--sigma-rel", "0.05,0.2", *TWO, *end)
    code = said["code"].replace("snapshots=...", "snapshots=folder")
    ema: EMA = eval(code, {**vars(posthoc_ema), "folder": tmp_path})
    for step in range(1, 65):
        ema.update({"w": np.full(3, step, np.float32)})
    ema.snapshot()
    kept = SnapshotStore(tmp_path).list()
    assert len(kept) == said["snapshots"] == 8
    assert kept[-1].t == 64
    assert code in invoke(
        "plan", "--budget", 8, "--sigma-rel", "0.05,0.2", *TWO, *end
    ).stdout.replace("snapshots=...", "snapshots=folder")


def test_like_an_earlier_run(run: Path) -> None:
    asked = ("plan", "--budget", 12, "--t-end", 640, *TWO, "--like", run)
    said = invoke_json(*asked)
    made = plan(12, (0.01, 0.25), (0.05, 0.1), t_end=640, like=run)
    assert said["worst_error"] == made.worst_error
    assert "relative to the RMS of the weights" in invoke(*asked).stdout
    # The weights walk away from where they were by less than their size.
    constant = plan(12, (0.01, 0.25), (0.05, 0.1), t_end=640)
    assert_at_most(made.worst_error, constant.worst_error, reason="smaller steps than a walk")
    size = np.mean([s.nbytes for s in SnapshotStore(run).list()])
    sized = invoke_json("plan", "--budget", f"{12.5 * size / 1000}kB", *asked[3:])
    assert sized == said


def test_a_run_that_tells_nothing(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", every=320, sigma_rel=0.05)
    said = invoke("plan", "--budget", 8, "--t-end", 10, "--like", one, status=MISUSE)
    assert "does not tell how the weights move" in said.stderr


def test_a_run_that_stood_still(tmp_path: Path) -> None:
    ema = EMA(snapshots=tmp_path / "ema", every=2)
    for _ in range(8):
        ema.update({"w": np.ones(100)})
    said = invoke("plan", "--budget", 8, "--t-end", 10, "--like", tmp_path / "ema", status=MISUSE)
    assert "the same in all snapshots" in said.stderr


def test_a_damaged_run(run: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", every=80)
    victim = sorted(folder.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    said = invoke("plan", "--budget", 8, "--t-end", 10, "--like", folder, status=DATA_SAYS_NO)
    assert str(victim) in said.stderr


def test_a_budget_in_bytes() -> None:
    asked = ("--t-end", 100, *TWO, "--parameters", "1e6")
    assert invoke_json("plan", "--budget", "40MB", *asked)["snapshots"] == 10
    half = invoke_json("plan", "--budget", "40MB", *asked, "--encoding", "float16")
    assert half["snapshots"] == 20


def test_number_of_tracks() -> None:
    said = invoke_json("plan", "--budget", 9, "--t-end", 100, "--tracks", 3)
    assert len(said["sigma_rel"]) == len(said["times"]) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Missing option '--budget'"),
        (("--budget", "few"), "is not a number"),
        (("--budget", "0"), "expected a finite time > 0"),
        (("--budget", "1"), "less than one time of 2 tracks"),
        (("--budget", "1GB"), "needs --parameters or --like"),
        (("--budget", "8", "--tracks", "0.5"), "sigma_rel must be in"),
        (("--budget", "8", "--tracks", "7"), "tracks must be 1 to 4"),
        (("--budget", "8", "--movement", "cosine"), "need t_end"),
        (("--budget", "8", "--movement", "odd"), "--movement"),
        (("--budget", "8", "--like", "nowhere"), "does not exist"),
    ],
)
def test_misused(args: tuple[str, ...], message: str) -> None:
    assert message in invoke("plan", *args, status=MISUSE).stderr
