"""The command line: what it prints, what it writes, and the exit status that scripts rely on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from commands import DATA_SAYS_NO, MISUSE, files_of, invoke, invoke_json
from helpers import assert_close, run_python
from small_run import flip_a_byte, write_run

from posthoc_ema import EMA, predict_error
from posthoc_ema.cli import COMMANDS, main

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


# list


def test_list_shows_files_and_a_summary(run: Path) -> None:
    lines = invoke("list", run).stdout.splitlines()
    assert lines[0].split() == ["t", "track", "encoding", "size", "unit", "run", "file"]
    assert lines[2].split()[:3] == ["20", "sigma_rel=0.05", "float32"]
    assert [line.split()[-1] for line in lines[2 : 2 + SNAPSHOTS]] == files_of(run)
    size = sum(path.stat().st_size for path in run.glob("*.safetensors"))
    assert lines[-1] == (
        f"32 snapshots, {size / 1000:.0f} kB: 16 times from t=20 to t=320 images, tracks "
        "sigma_rel=0.05, sigma_rel=0.1; 1,100 averaged parameters in 2 tensors"
    )


def test_list_as_json(run: Path) -> None:
    said = invoke_json("list", run)
    assert [s["file"] for s in said["snapshots"]] == files_of(run)
    first = said["snapshots"][0]
    assert (first["t"], first["profile"]["sigma_rel"], first["unit"]) == (20, 0.05, "images")
    assert said["problems"] == []
    assert said["summary"]["parameters"] == 1100
    assert said["summary"]["t_last"] == 320


def test_list_names_a_broken_file_and_shows_the_others(copy: Path) -> None:
    broken = copy / files_of(copy)[3]
    broken.write_bytes(broken.read_bytes()[:-1])
    result = invoke("list", copy, status=DATA_SAYS_NO)
    (complaint,) = result.stderr.splitlines()
    assert complaint.startswith(f"Error: {broken} is not a complete safetensors file")
    assert result.stdout.splitlines()[-1].startswith("31 snapshots")
    said = invoke_json("list", copy, status=DATA_SAYS_NO)
    assert (len(said["snapshots"]), len(said["problems"])) == (31, 1)


def test_list_finds_two_runs_in_one_folder(copy: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", every=320, seed=1)
    stranger = other / files_of(other)[0]
    shutil.copy(stranger, copy / f"from-elsewhere-{stranger.name}")
    assert "belong to different runs" in invoke("list", copy, status=DATA_SAYS_NO).stderr


def test_list_with_nothing_but_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    said = invoke_json("list", tmp_path, status=DATA_SAYS_NO)
    assert said["summary"] is None
    assert invoke("list", tmp_path, status=DATA_SAYS_NO).stdout == ""


@pytest.mark.parametrize("command", [c.name for c in COMMANDS if c.name not in ("plan", "import")])
def test_a_missing_or_empty_folder_is_misuse(command: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    first = ["plot", "error"] if command == "plot" else [command]
    for folder, problem in (
        ("absent", "does not exist"),
        ("empty", "holds no snapshots"),
        ("file", "is not a folder"),
    ):
        stderr = invoke(*first, folder, status=MISUSE).stderr
        assert f"{folder} {problem}; give the folder that EMA(snapshots=...) wrote" in stderr


# verify


def test_verify_says_ok_for_each_file(run: Path) -> None:
    lines = invoke("verify", run).stdout.splitlines()
    assert lines[:SNAPSHOTS] == [f"ok   {file}" for file in files_of(run)]
    # 1,100 float32 and one int64 in each of 32 files: 141,056 bytes.
    assert lines[-1] == "32 of 32 files intact, 141 kB read"


def test_verify_checks_all_files_also_after_a_bad_one(copy: Path) -> None:
    bad = [files_of(copy)[k] for k in (2, 20)]
    for file in bad:
        flip_a_byte(copy / file)
    cut = copy / files_of(copy)[25]
    cut.write_bytes(cut.read_bytes()[:-1])
    result = invoke("verify", copy, status=DATA_SAYS_NO)
    assert [line.split()[-1] for line in result.stdout.splitlines() if "BAD" in line] == bad
    assert "29 of 32 files intact" in result.stdout
    assert [line.split()[1] for line in result.stderr.splitlines()] == [
        *(str(copy / file) for file in bad),
        str(cut),
    ]
    said = invoke_json("verify", copy, status=DATA_SAYS_NO)
    assert said["ok"] is False
    assert [file["file"] for file in said["files"] if not file["ok"]] == bad
    assert len(said["problems"]) == 3


def test_list_does_not_see_what_verify_finds(copy: Path) -> None:
    """The twin of the test above: a flipped value is invisible to whoever reads heads only."""
    flip_a_byte(copy / files_of(copy)[2])
    assert invoke("list", copy).stderr == ""


# error


def test_error_agrees_with_the_library(run: Path) -> None:
    said = invoke_json("error", run, "--sigma-rel", "0.02,0.04,...,0.2")
    assert [e["sigma_rel"] for e in said["errors"]] == [
        0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2
    ]  # fmt: skip
    expected = predict_error(run, [e["sigma_rel"] for e in said["errors"]])
    actual = [e["predicted_error"] for e in said["errors"]]
    assert_close(actual, expected, rtol=1e-12, reason="the same computation")
    lines = invoke("error", run, "--sigma-rel", "0.02,0.1").stdout.splitlines()
    assert lines[0] == "average at t=320 images, from 32 snapshots"
    assert lines[-2].split()[:2] == ["0.02", f"{expected[0]:.2e}"]


def test_error_has_a_grid_of_its_own(run: Path) -> None:
    lengths = [e["sigma_rel"] for e in invoke_json("error", run)["errors"]]
    assert (lengths[0], lengths[-1], len(lengths)) == (0.01, 0.25, 25)


def test_error_at_an_earlier_time_and_by_the_other_method(run: Path) -> None:
    said = invoke_json(
        "error", run, "--t", 150, "--method", "paper", "--sigma-rel", "0.07", "--max-error", "1"
    )
    assert (said["t"], said["method"]) == (150, "paper")
    expected = predict_error(run, 0.07, 150, method="paper")
    actual = said["errors"][0]["predicted_error"]
    assert_close(actual, expected, rtol=1e-12, reason="the same computation")


def test_max_error_decides_the_exit_status(run: Path) -> None:
    between = float(np.mean(predict_error(run, [0.01, 0.07])))
    asked = ("error", run, "--max-error", between, "--sigma-rel")
    assert "yes" in invoke(*asked, "0.07").stdout
    result = invoke(*asked, "0.01,0.07", status=DATA_SAYS_NO)
    assert [line.split()[-1] for line in result.stdout.splitlines()[-2:]] == ["NO", "yes"]
    assert "the predicted error of 1 of 2 lengths is above" in result.stderr
    said = invoke_json(*asked, "0.01,0.07", status=DATA_SAYS_NO)
    assert [e["exceeds"] for e in said["errors"]] == [True, False]


def test_an_unknown_error_is_no_yes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", every=320, sigma_rel=0.05)
    result = invoke("error", folder, "--sigma-rel", "0.07", "--max-error", "1", status=DATA_SAYS_NO)
    assert result.stdout.split()[-3] == "unknown"
    assert "the movement of the weights is unknown" in result.stderr
    said = invoke_json("error", folder, "--sigma-rel", "0.07")
    assert said["errors"][0]["predicted_error"] is None


# The program as a whole


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_help_teaches(command: Any) -> None:
    said = invoke(command.name, "--help").stdout
    assert "Example:\n" in said
    assert f"\n    posthoc-ema {command.name} " in said  # on a line of its own, not wrapped
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{parameter.name} is not explained"


def test_main_help_lists_every_command() -> None:
    said = invoke("--help").stdout
    for command in COMMANDS:
        (line,) = (x for x in said.splitlines() if x.startswith(f"  {command.name} "))
        assert not line.endswith("..."), "the first line of its docstring is too long"


def test_unknown_command_is_misuse() -> None:
    assert "No such command 'frobnicate'" in invoke("frobnicate", status=MISUSE).stderr


def test_debug_shows_where_an_error_came_from(run: Path) -> None:
    asked = ["--debug", "reconstruct", str(run), "--sigma-rel", "0.07", "--t", "321", "--out", "x"]
    with pytest.raises(ValueError, match="t=321 is outside"):
        CliRunner().invoke(main, asked, catch_exceptions=False)


def test_as_a_process(copy: Path) -> None:
    """The installed program, with its streams apart and its real exit status."""
    program = [str(Path(sys.executable).with_name("posthoc-ema"))]
    done = subprocess.run([*program, "list", copy, "--json"], capture_output=True, check=True)
    assert len(json.loads(done.stdout)["snapshots"]) == SNAPSHOTS
    assert done.stderr == b""
    flip_a_byte(copy / files_of(copy)[0])
    done = subprocess.run([*program, "verify", copy], capture_output=True, text=True)
    assert done.returncode == DATA_SAYS_NO
    assert files_of(copy)[0] in done.stderr


def test_as_a_module() -> None:
    assert run_python("-m", "posthoc_ema", "--version").startswith("posthoc-ema, version ")


def test_no_command_but_plot_loads_a_framework(run: Path, tmp_path: Path) -> None:
    printed = run_python(
        "-c",
        "import sys\n"
        "from posthoc_ema.cli import main\n"
        "folder, out = sys.argv[1:]\n"
        "for args in (['list', folder], ['verify', folder], ['error', folder],\n"
        "             ['prune', folder, '--keep', '2'],\n"
        "             ['reconstruct', folder, '--sigma-rel', '0.07', '--out', out]):\n"
        "    main(args, standalone_mode=False)\n"
        "print(sorted({'torch', 'jax', 'scipy', 'matplotlib'} & set(sys.modules)))",
        str(run),
        str(tmp_path / "out"),
    )
    assert printed.splitlines()[-1] == "[]"


def test_snapshots_of_a_framework_are_reconstructed_without_it(tmp_path: Path) -> None:
    """bfloat16 buffers included, which numpy itself has no type for."""
    torch = pytest.importorskip("torch")
    model = torch.nn.BatchNorm1d(4)
    model.register_buffer("mask", torch.ones(4, dtype=torch.bfloat16))
    ema = EMA(snapshots=tmp_path / "ema", every=4)
    for _ in range(8):
        ema.update(model)
    run_python(
        "-c",
        "import sys\n"
        "sys.modules['torch'] = sys.modules['ml_dtypes'] = None\n"
        "from posthoc_ema.cli import main\n"
        "main(['reconstruct', sys.argv[1], '--sigma-rel', '0.07', '--out', sys.argv[2]])",
        str(tmp_path / "ema"),
        str(tmp_path / "a.safetensors"),
    )
    from safetensors.torch import load_file as load_torch

    written = load_torch(tmp_path / "a.safetensors")
    assert written["mask"].dtype == torch.bfloat16
    model.load_state_dict(written)
