"""Commands that write, delete and draw: exactly what was asked for, or nothing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import DATA_SAYS_NO, MISUSE, files_of, invoke, invoke_json
from helpers import assert_close
from safetensors.numpy import load_file
from small_run import flip_a_byte, write_run

from posthoc_ema import predict_error, reconstruct

SNAPSHOTS = 32  # 16 times, two tracks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots to read; tests that change them take a copy."""
    return write_run(tmp_path_factory.mktemp("run") / "ema", unit="images")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "ema"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# reconstruct


def test_reconstruct_writes_what_the_library_makes(run: Path, tmp_path: Path) -> None:
    result = invoke("reconstruct", run, "--sigma-rel", "0.05,0.07", "--out", "out")
    assert files_of(tmp_path / "out") == [
        "sigma_rel=0.05.safetensors",
        "sigma_rel=0.07.safetensors",
    ]
    written = load_file(tmp_path / "out" / "sigma_rel=0.07.safetensors")
    expected = reconstruct(run, 0.07).state_dict()
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        reason = "two targets at once are summed in another order, in float32"
        assert_close(written[name], values, rtol=1e-5, atol=2e-6, reason=reason)
    assert written["steps"] == 320
    row = result.stdout.splitlines()[-1].split()
    assert row[0] == "out/sigma_rel=0.07.safetensors"
    assert row[1] == f"{predict_error(run, 0.07):.2e}"


def test_reconstruct_one_file(run: Path, tmp_path: Path) -> None:
    said = invoke_json(
        "reconstruct", run, "--sigma-rel", "0.07", "--t", "150", "--out", "a.safetensors"
    )
    assert said[0]["files"] == ["a.safetensors"]
    assert said[0]["t"] == 150
    coefficients = [entry["coefficient"] for entry in said[0]["coefficients"]]
    assert all(entry["t"] <= 150 for entry in said[0]["coefficients"])
    assert_close(sum(coefficients), 1, atol=1e-12, reason="they sum to one, in float64")
    assert_close(said[0]["l1_norm"], np.abs(coefficients).sum(), rtol=1e-12, reason="rounding")
    assert (tmp_path / "a.safetensors").exists()


def test_reconstruct_other_profiles_and_some_names(run: Path, tmp_path: Path) -> None:
    said = invoke_json(
        "reconstruct", run, "--profile", "exponential:halflife=30", "--profile",
        "uniform:window=0.2", "--names", "*.bias", "--out", "out",
    )  # fmt: skip
    assert [result["profile"]["kind"] for result in said] == ["exponential", "uniform"]
    for result in said:
        assert load_file(result["files"][0]).keys() == {"net.bias"}


def test_reconstruct_does_not_overwrite_unless_told(run: Path) -> None:
    asked = ("reconstruct", run, "--sigma-rel", "0.05,0.07", "--out", "out")
    invoke(*asked)
    kept = Path("out/sigma_rel=0.07.safetensors")
    kept.write_bytes(b"precious")
    Path("out/sigma_rel=0.05.safetensors").unlink()
    stderr = invoke(*asked, status=MISUSE).stderr
    assert f"{kept} exists" in stderr
    assert "--overwrite" in stderr
    assert kept.read_bytes() == b"precious"
    assert not Path("out/sigma_rel=0.05.safetensors").exists()
    invoke(*asked, "--overwrite")
    assert kept.stat().st_size > 1000


def test_reconstruct_stops_at_damage_and_writes_nothing(copy: Path, tmp_path: Path) -> None:
    bad = copy / files_of(copy)[-1]
    flip_a_byte(bad, place=-2000)
    result = invoke("reconstruct", copy, "--sigma-rel", "0.07", "--out", "out", status=DATA_SAYS_NO)
    assert result.stderr.startswith(f"Error: {bad} is damaged")
    assert len(result.stderr.splitlines()) == 1
    assert files_of(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "out"), "say which average"),
        (("--sigma-rel", "0.07"), "Missing option '--out'"),
        (("--sigma-rel", "0.4", "--out", "out"), "sigma_rel must be in (0, 0.288675]"),
        (("--sigma-rel", "0", "--out", "out"), "sigma_rel must be in (0, 0.288675]"),
        (("--sigma-rel", "0.01,0.03,...,0.2", "--out", "out"), "does not fit"),
        (("--profile", "gaussian:width=2", "--out", "out"), "is no profile"),
        (("--sigma-rel", "0.07", "--t", "321", "--out", "out"), "t=321 is outside"),
        (("--sigma-rel", "0.07", "--t", "soon", "--out", "out"), "'soon' is not a number"),
        (("--sigma-rel", "0.07", "--t", "-1", "--out", "out"), "expected a finite time > 0"),
        (("--sigma-rel", "0.07", "--method", "magic", "--out", "out"), "'magic' is not one of"),
        (("--sigma-rel", "0.07", "--names", "x*", "--out", "out"), "nothing matches 'x*'"),
        (("--sigma-rel", "0.05,0.07", "--out", "a.safetensors"), "one file for 2 results"),
        (("--sigma-rel", "0.07", "--out", "{run}"), "lies in the snapshot folder"),
        (("--sigma-rel", "0.07", "--out", "{run}/a.safetensors"), "lies in the snapshot folder"),
    ],
)
def test_reconstruct_misused(run: Path, options: tuple[str, ...], message: str) -> None:
    before = files_of(run)
    options = tuple(option.replace("{run}", str(run)) for option in options)
    assert message in invoke("reconstruct", run, *options, status=MISUSE).stderr
    assert files_of(run) == before


# plot


@pytest.mark.parametrize("kind", ["profiles", "coefficients", "error"])
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot(run: Path, kind: str, ending: str) -> None:
    result = invoke("plot", kind, run, "--sigma-rel", "0.05,0.1", "--out", f"new/x.{ending}")
    assert result.stdout == f"new/x.{ending}\n"
    head = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert Path(f"new/x.{ending}").read_bytes().startswith(head)


def test_error_draws_its_curve_too(run: Path) -> None:
    invoke("error", run, "--plot", "error.png")
    assert Path("error.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("error", "--out", "x.bmpx"), "x.bmpx must end in .png, .svg or .pdf"),
        (("error", "--out", "x"), "x must end in .png, .svg or .pdf"),
        (("error", "--sigma-rel", "0.07", "--out", "x.png"), "give two or more"),
        (("error", "--profile", "uniform:window=1", "--out", "x.png"), "takes no --profile"),
        (("everything", "--out", "x.png"), "'everything' is not one of"),
    ],
)
def test_plot_misused(run: Path, args: tuple[str, ...], message: str) -> None:
    kind, *options = args
    assert message in invoke("plot", kind, run, *options, status=MISUSE).stderr


def test_plot_without_matplotlib(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for args in (("plot", "error", run, "--out", "x.png"), ("error", run, "--plot", "x.png")):
        stderr = invoke(*args, status=MISUSE).stderr
        assert "pip install 'posthoc-ema[plots]'" in stderr
