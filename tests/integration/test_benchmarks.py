"""Each benchmark runs, on a scale of seconds; what it measures is asserted nowhere."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Without peers, which are not part of the environment; one case where all run the same code.
COMMANDS = {
    "tracker_overhead": ["--no-peers", "--builds", "1"],
    "reconstruct_throughput": ["--no-peers", "--case", "float16", "out4gb"],
    "solve_conditioning": ["--repeats", "1"],
    "snapshot_writing": [],
    "fewer_snapshots": [],
    "model_speed": ["--case", "28x28"],
    "guidance": [],
    "unit_scaling": [],
}
ROWS = {
    "fewer_snapshots": "| float16",
    "solve_conditioning": "| kriging",
    "model_speed": "| reference_model",
    "guidance": "| σ_rel 0.25",
    "unit_scaling": "| U ",
}
SLOW = {"guidance", "unit_scaling"}


@pytest.fixture(autouse=True)
def _needs_torch():
    pytest.importorskip("torch")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in COMMANDS]
)
def test_benchmark_runs_and_prints_a_row_for_this_library(name, tmp_path):
    before = _results()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", *COMMANDS[name]],
        cwd=ROOT,
        env={**_environment(), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wanted = ROWS.get(name, "| posthoc_ema")
    assert any(line.startswith("|") and wanted in line for line in done.stdout.splitlines())
    assert "bar:" not in done.stdout, "a tiny size must not be compared with the bars"
    assert _results() == before, "a quick run must not replace recorded results"


def test_an_absent_peer_is_reported_not_left_out(tmp_path, monkeypatch):
    from benchmarks import peers, tracker_overhead

    monkeypatch.setattr(peers, "FOLDER", tmp_path / "nothing here")
    monkeypatch.setattr(peers, "_loaded", {})
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    case = tracker_overhead.Case([10, 10], rounds=1)
    results = tracker_overhead.measure(case, builds=1, with_peers=True)
    assert list(results) == list(tracker_overhead.CONTENDERS)
    for name in ("ema-pytorch", "pytorch-posthoc-ema", "diffusers", "timm"):
        assert "make bench-peers" in results[name]["not_installed"]
    assert "not installed" in tracker_overhead.report("any", case, results, bars=False)


@pytest.mark.parametrize("collides", [True, False])
def test_a_peer_of_the_same_import_name_leaves_this_library_in_place(
    collides, tmp_path, monkeypatch
):
    import posthoc_ema
    from benchmarks import peers

    name = "posthoc_ema" if collides else "some_other_library"
    package = tmp_path / "peer" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"from {name}.part import WHOSE")
    (package / "part.py").write_text("WHOSE = 'theirs'")
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(peers, "_loaded", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(peers.PEERS, "peer", peers.Peer("peer==1", name))

    assert peers.load("peer").WHOSE == "theirs"
    assert sys.modules["posthoc_ema"] is posthoc_ema
    assert "posthoc_ema.part" not in sys.modules


def _environment():
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _results():
    folder = ROOT / "benchmarks" / "results"
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}
