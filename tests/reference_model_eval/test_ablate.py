"""Ablations: variants trained under the same conditions, resumed, and the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import ROOT, assert_close
from small_ablation import OPTIONS, PLAN

from reference_model.ablate import (
    JUDGE,
    AblationPlan,
    Progress,
    Variant,
    ablate,
    leave_one_out,
)
from reference_model.ablate_pool import LOG_FILE
from reference_model.ablate_results import gather
from reference_model.checkpoint import CHECKPOINT_FILE, RunDirError
from reference_model.cli import main
from reference_model.ladder import INGREDIENTS, LADDER
from reference_model.magnitude_log import MAGNITUDES_FILE
from reference_model.presets import preset
from reference_model.sweep_record import SWEEP_FILE, load_record


def invoke(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["ablate", *map(str, arguments)])
    if result.exit_code != status:
        raise AssertionError(f"exit status {result.exit_code}: {result.output}") from (
            result.exception
        )
    return result.output


# What is done, and what is not done again.


def test_only_what_was_missing_was_done(finished_ablation: Path) -> None:
    *first, last = PLAN.runs(finished_ablation)
    assert all(run.is_finished(PLAN) for run in (*first, last))
    assert not any((run.run_dir / LOG_FILE).exists() for run in first)
    starts = [
        json.loads(line)["nimg"]
        for line in (last.run_dir / "starts.jsonl").read_text().splitlines()
    ]
    assert starts == [0, 64]  # went on from its checkpoint
    assert "started" in (last.run_dir / LOG_FILE).read_text()


def test_a_finished_ablation_starts_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("started again")

    monkeypatch.setattr("reference_model.ablate.run_jobs", refuse)
    assert ablate(PLAN, out, progress=False) == []
    # Twins of the guard: a missing measurement, another length, another seed are work to do.
    for plan in (replace(PLAN, sigma_rels=(0.05, 0.15)), replace(PLAN, seeds=(0, 1, 2))):
        with pytest.raises(AssertionError, match="started again"):
            ablate(plan, out, progress=False)
    (out / "D-seed0" / SWEEP_FILE).unlink()
    with pytest.raises(AssertionError, match="started again"):
        ablate(PLAN, out, progress=False)


def test_all_runs_share_one_classifier(finished_ablation: Path) -> None:
    records = [load_record(run.run_dir) for run in PLAN.runs(finished_ablation)]
    assert len({r.settings["judge"]["digest"] for r in records if r is not None}) == 1
    names = {path.name for path in (finished_ablation / JUDGE).iterdir()}
    for run in PLAN.runs(finished_ablation):
        assert names <= {path.name for path in run.run_dir.iterdir()}


def test_other_classifiers_are_not_compared(out: Path) -> None:
    path = out / "G-seed1" / SWEEP_FILE
    data = json.loads(path.read_text())
    data["settings"]["judge"]["digest"] = "another"
    path.write_text(json.dumps(data))
    with pytest.raises(RunDirError, match=r"different classifiers \(D-seed0, G-seed1 first\)"):
        gather(PLAN, out)


def test_progress_counts_training_and_measuring(out: Path) -> None:
    progress = Progress(PLAN, PLAN.runs(out))
    whole = 4 * (128 + 4 * 2 * 40)  # three lengths and the raw weights, two repeats of 40
    assert progress() == whole
    (out / "D-seed0" / SWEEP_FILE).write_text("{}")  # cannot be read: nothing measured
    assert progress() < whole
    shutil.rmtree(out / "D-seed0")
    assert progress() == whole * 3 // 4


def test_a_failed_run_is_named_and_the_others_go_on(out: Path) -> None:
    config = out / "D-seed0" / "config.json"
    config.write_text(config.read_text().replace('"ref_lr": 0.03', '"ref_lr": 1.5'))
    output = invoke("--out", out, *OPTIONS, "--jobs", "2", status=1)
    log = out / "D-seed0" / LOG_FILE
    assert f"Error: D-seed0 failed: {out / 'D-seed0'} was started with ref_lr=1.5" in output
    assert f"(log: {log})" in output
    results = json.loads((out / "ablate.json").read_text())
    assert [v["seeds"] for v in results["variants"]] == [[1], [0, 1]]
    (failure,) = results["failures"]
    assert failure["log"] == str(log)
    assert failure["reason"] in log.read_text()
    page = (out / "ablate.html").read_text()
    assert "D-seed0 failed: " in page
    assert "over repeats of generation where there is one seed" in page


@pytest.mark.slow
def test_a_killed_ablation_takes_its_workers_along_and_goes_on(out: Path) -> None:
    plan = replace(PLAN, nimg=1600, seeds=(0,), variants=(Variant("E"),))
    arguments = [
        *(sys.executable, "-m", "reference_model", "ablate", "--out", str(out)),
        *OPTIONS, "--configs", "E", "--seeds", "1", "--total-nimg", "1600", "--jobs", "1",
    ]  # fmt: skip
    run_dir = out / "E-seed0"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, env=environment)
    try:
        for _ in range(600):
            if (run_dir / MAGNITUDES_FILE).exists():
                break
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(arguments, env=environment, check=False).returncode == 0
    assert (run_dir / LOG_FILE).read_text().count("started") == 2
    stats = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    images = [line["nimg"] for line in stats]
    assert images == sorted(set(images))  # nothing done twice, nor by two at once
    assert all(run.is_finished(plan) for run in plan.runs(out))


@pytest.mark.slow
def test_sigterm_saves_all_runs(out: Path) -> None:
    arguments = [
        *(sys.executable, "-m", "reference_model", "ablate", "--out", str(out)),
        *OPTIONS, "--configs", "E", "--seeds", "1", "--total-nimg", "64000", "--jobs", "1",
    ]  # fmt: skip
    process = subprocess.Popen(
        arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if (out / "E-seed0" / MAGNITUDES_FILE).exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped; all runs were saved, and the same command goes on" in errors
    assert (out / "E-seed0" / CHECKPOINT_FILE).exists()


# Plans.


def test_variants_have_names_and_words() -> None:
    assert Variant("G").name == "G"
    assert Variant("G", ("pixel_norm", "mp_sum")).name == "G-pixel_norm-mp_sum"
    assert Variant("G").about == LADDER["G"]
    assert Variant("G", ("mp_sum",)).about == "without weights of sums, Eq. 88; plain sums without"
    assert Variant("D").has("weight_norm")
    assert not Variant("D").has("forced_norm")
    assert not Variant("E", ("forced_norm",)).has("forced_norm")
    with pytest.raises(ValueError, match="config must be one of A, B"):
        Variant("Z")


def test_leave_one_out_is_the_whole_and_each_without_one() -> None:
    names = [v.name for v in leave_one_out("G")]
    assert names == ["G", *(f"G-{name}" for name in INGREDIENTS)]
    assert [v.name for v in leave_one_out("B")] == ["B", "B-uncertainty"]
    assert [v.name for v in leave_one_out("G", ["mp_cat"])] == ["G", "G-mp_cat"]
    with pytest.raises(ValueError, match="config B has no mp_cat to leave out"):
        leave_one_out("B", ["mp_cat"])


def test_all_runs_see_the_same_images_with_their_own_habits() -> None:
    variants = tuple(Variant(config) for config in "AG")
    plan = AblationPlan("digits", variants, (0, 3), nimg=10_000)
    a, g = plan.config(variants[0], 0), plan.config(variants[1], 3)
    assert (a.batch_size, g.batch_size) == (256, 128)
    assert a.total_nimg == g.total_nimg == plan.total_nimg == 39 * 256  # whole steps of both
    assert (a.seed, g.seed) == (0, 3)
    assert a.ref_lr == preset("digits", "A").ref_lr
    # The schedule is the preset's, in proportion.
    stretch = 39 * 256 / 128_000
    assert_close(g.ref_batches, 100 * stretch, rtol=1e-12, reason="one float64 product")
    assert g.snapshot_nimg == round(20 * 128 * stretch)
    assert plan.config(Variant("G", ("lr_decay",)), 0).ref_batches == 0
    assert AblationPlan("digits", variants).config(variants[1], 0) == preset("digits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nimg": 100, "variants": (Variant("A"), Variant("G"))}, "100 images are less than one"),
        ({"variants": ()}, "variants must name at least one"),
        ({"seeds": (1, 1)}, "seeds must name at least one, each once"),
        ({"sigma_rels": (0.5,)}, r"EMA lengths must lie in \(0, 0.2887\] \(got 0.5\)"),
        ({"fixed_sigma_rel": 0.0}, r"EMA lengths must lie in .*\(got 0.0\)"),
    ],
)
def test_plans_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AblationPlan(**{**{"preset": "digits", "variants": (Variant("G"),)}, **change})  # type: ignore[arg-type]


# The command.


def test_the_command_reports_a_finished_ablation(out: Path) -> None:
    lines = invoke("--out", out, *OPTIONS).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["D", "G"]
    assert lines[-1] == f"Wrote {out / 'ablate.html'}"
    data = json.loads(invoke("--out", out, *OPTIONS, "--json"))
    assert data == json.loads((out / "ablate.json").read_text())
    assert data["plan"]["variants"] == ["D", "G"]
    assert data["plan"]["protocol"] == asdict(PLAN.protocol)
    (d, g) = data["variants"]
    assert g["best"]["mean"] == min(row["mean"] for row in g["curve"])
    assert d["fixed"]["sigma_rel"] == 0.1
    # Fewer variants cost nothing either.
    assert "\nG " in invoke("--out", out, *OPTIONS, "--configs", "G")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--configs", "D,X"), 1, "config must be one of A, B"),
        (("--configs", ""), 1, "variants must name at least one"),
        (("--leave-one-out=fur",), 1, "leave_out must name some of uncertainty"),
        (("--preset", "nothing"), 2, "'nothing' is not one of"),
        (("--sigma-rel", "0.1,0.9"), 1, "EMA lengths must lie in"),
        (("--sigma-rel", "many"), 2, "is not of the form"),
        (("--images", "0"), 1, "images must be at least 1"),
        (("--seeds", "0"), 2, "--seeds"),
        (("--total-nimg", "8"), 1, "8 images are less than one step"),
        (("--configs", "G", "--images", "10"), 1, "needs at least 33 images in each repeat"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    output = invoke("--out", tmp_path / "new", "--quiet", *arguments, status=status)
    assert message in " ".join(output.split())


def test_the_default_is_the_whole_ladder() -> None:
    from reference_model.cli_ablate import _variants
    from reference_model.cli_ablate import ablate as command

    for given in (["--leave-one-out", "--seeds", "2"], ["--seeds", "2", "--leave-one-out"]):
        assert command.make_context("ablate", ["--out", "x", *given]).params["left_out"] == ("all",)
    assert [v.name for v in _variants(None, None)] == list(LADDER)
    assert [v.name for v in _variants(None, ("all",))][:2] == ["G", "G-uncertainty"]
    assert [v.name for v in _variants(("F",), ("mp_sum",))] == ["F", "G", "G-mp_sum"]


def test_the_help_teaches() -> None:
    output = invoke("--help")
    assert "ablate --out runs/ladder --seeds 2" in output
    assert "--leave-one-out=pixel_norm,mp_sum" in output
