"""Ablations: variants trained under the same conditions, resumed, compared and reported."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, assert_close

from reference_model.ablate import (
    JUDGE,
    AblationPlan,
    AblationRun,
    Progress,
    Variant,
    ablate,
    leave_one_out,
)
from reference_model.ablate_checks import Check, checks
from reference_model.ablate_pool import LOG_FILE
from reference_model.ablate_report import error_bars, render, write_ablation
from reference_model.ablate_results import Drift, Outcome, gather, weight_law
from reference_model.ablate_worker import work
from reference_model.checkpoint import CHECKPOINT_FILE, RunDirError
from reference_model.cli import main
from reference_model.ladder import INGREDIENTS, LADDER
from reference_model.magnitude_log import MAGNITUDES_FILE
from reference_model.presets import preset
from reference_model.protocol import Protocol
from reference_model.sweep_record import SWEEP_FILE, load_record
from reference_model.train import train

PLAN = AblationPlan(
    "digits-tiny",
    (Variant("D"), Variant("G")),
    (0, 1),
    nimg=128,
    sigma_rels=(0.05, 0.2),
    protocol=Protocol(images=40, repeats=2, num_steps=1, batch_size=40),
)
OPTIONS = (
    *("--preset", "digits-tiny", "--configs", "D,G", "--seeds", "2", "--total-nimg", "128"),
    *("--sigma-rel", "0.05,0.2", "--images", "40", "--repeats", "2", "--num-steps", "1"),
    *("--batch-size", "40", "--quiet"),
)
"""The same plan on the command line."""


def in_process(run: AblationRun, plan: AblationPlan, out: Path) -> None:
    """What a worker does, without the seconds that a process takes to start."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    settings = run.job(plan, out / JUDGE).settings
    assert work({**settings, "run_dir": str(run.run_dir), "threads": 1}) == 0


@pytest.fixture(scope="module")
def finished(finished_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs made here, the fourth by `ablate` itself. Read only."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    (out / JUDGE).mkdir(parents=True)
    for pattern in ("classifier-*", "reference-*"):  # the digits' own, seconds to train
        for path in finished_demo.glob(pattern):
            shutil.copy(path, out / JUDGE)
    *first, last = PLAN.runs(out)
    for run in first:
        in_process(run, PLAN, out)
    # Interrupted in the middle of training.
    train(last.config, last.run_dir, progress=False, stop_at=64)
    assert ablate(PLAN, out, jobs=1, progress=False) == []
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def invoke(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["ablate", *map(str, arguments)])
    if result.exit_code != status:
        raise AssertionError(f"exit status {result.exit_code}: {result.output}") from (
            result.exception
        )
    return result.output


# What is done, and what is not done again.


def test_only_what_was_missing_was_done(finished: Path) -> None:
    *first, last = PLAN.runs(finished)
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


def test_all_runs_share_one_classifier(finished: Path) -> None:
    records = [load_record(run.run_dir) for run in PLAN.runs(finished)]
    assert len({r.settings["judge"]["digest"] for r in records if r is not None}) == 1
    names = {path.name for path in (finished / JUDGE).iterdir()}
    for run in PLAN.runs(finished):
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


# Results.


def test_numbers_are_those_of_the_runs(finished: Path) -> None:
    d, g = gather(PLAN, finished)
    assert (d.name, g.name, d.seeds, d.lengths) == ("D", "G", (0, 1), (0.05, 0.1, 0.2))
    means = []
    for seed in (0, 1):
        record = load_record(finished / f"G-seed{seed}")
        assert record is not None
        means.append([m.distance for m in record.averages])
    mean = np.mean(means, axis=0)
    assert_close([s.mean for s in g.curve], mean, rtol=1e-12, reason="order of float64 sums")
    error = np.abs(np.subtract(*means)) / 2  # of two values: half their difference
    assert_close([s.error for s in g.curve], error, rtol=1e-9, reason="order of float64 sums")
    assert g.best_sigma_rel == (0.05, 0.1, 0.2)[int(mean.argmin())]
    assert g.best.mean == min(s.mean for s in g.curve)
    assert g.best_by_seed == tuple((0.05, 0.1, 0.2)[int(np.argmin(m))] for m in means)
    # Counted by hand nowhere else: D has no gains, one more group norm is without weights.
    assert g.parameters - d.parameters == 907


def test_one_seed_takes_its_repeats(finished: Path) -> None:
    plan = replace(PLAN, seeds=(1,))
    d, _ = gather(plan, finished)
    record = load_record(finished / "D-seed1")
    assert record is not None
    assert d.distances == tuple(m.distances for m in record.averages)
    assert "trained with one seed" in error_bars([d])
    assert error_bars(gather(PLAN, finished)) == "standard errors over seeds"


def test_the_law_of_free_weights(finished: Path) -> None:
    d, g = gather(PLAN, finished)
    assert g.drift.law == ()
    assert d.drift.law[0] == 1.0
    constant = replace(preset("digits", "D"), rampup_nimg=0)
    (after,) = weight_law(constant, [128 * 101])  # before the 101st update
    assert_close(
        after, math.sqrt(1 + 0.03**2 * 100), rtol=1e-12, reason="a sum of 100 float64 squares"
    )


def outcome(name: str, *distances: float, **drift: tuple[float, ...]) -> Outcome:
    """An invented one, measured at 0.05, 0.1 and 0.2 with two seeds that differ by 0.2."""
    config, *left_out = name.split("-")
    values = {"activation": (1.0, 1.0, 1.0), "weight": (1.0, 1.0, 1.0), **drift}
    return Outcome(
        Variant(config, tuple(left_out)), 10, 32, 0.1, (0, 1), (0.05, 0.1, 0.2),
        tuple((d - 0.1, d + 0.1) for d in distances or (2.0, 1.0, 4.0)), (9.0, 9.0), (0.1, 0.1),
        Drift((32, 64, 128), **values),
    )  # fmt: skip


def test_what_a_wrong_length_costs() -> None:
    o = outcome("G", 1.04, 1.0, 4.0)
    assert (o.best_sigma_rel, o.best.mean) == (0.1, 1.0)
    assert_close(o.best.error, 0.1, rtol=1e-9, reason="half a difference of two float64")
    assert o.good_lengths == (0.05, 0.1)
    assert (o.worst_sigma_rel, o.cost(0.2), o.cost(0.1)) == (0.2, 4.0, 1.0)
    assert not o.best_at_edge
    assert outcome("G", 1.0, 2.0, 3.0).best_at_edge


def verdicts(*outcomes: Outcome) -> dict[str, bool]:
    """Each check by the words before its details."""
    return {re.split(r" as | \(", c.statement)[0]: c.holds for c in checks(outcomes)}


def test_theory_is_held_against_what_was_seen() -> None:
    a = outcome("A", 4.0, 3.0, 5.0, activation=(1.0, 1.0, 1.5))
    d = outcome("D", weight=(1.0, 1.1, 1.3), law=(1.0, 1.2, 1.4))
    g = outcome("G")
    half = outcome("G-pixel_norm", activation=(1.0, 0.7, 0.5))
    found = verdicts(a, d, g, half)
    assert found == {
        "A: activations grow": True,
        "D: stored weights grow": True,
        "D: activations do not grow": True,
        "G: stored weights keep magnitude one": True,
        "G: activations do not grow": True,
        "G-pixel_norm: stored weights keep magnitude one": True,
        "G-pixel_norm: activations do not grow": True,
        "G without pixel norm: activations sink to about half of G’s": True,
        "G is better than A, each at its own best EMA length": True,
    }


def test_theory_can_be_contradicted() -> None:
    a = outcome("A", 4.0, 1.1, 5.0)
    d = outcome("D", weight=(1.0, 1.1, 1.0), law=(1.0, 1.2, 1.4), activation=(1.0, 1.0, 2.0))
    g = outcome("G", weight=(1.0, 1.0, 1.05), activation=(1.0, 1.0, 2.0))
    half = outcome("G-pixel_norm", weight=(1.0, 1.0, 0.9), activation=(1.0, 1.0, 2.0))
    assert not any(verdicts(a, d, g, half).values())


# The report, and the command.


def test_the_page_holds_the_numbers(finished: Path) -> None:
    outcomes = gather(PLAN, finished)
    page = render(PLAN, outcomes, checks(outcomes))
    for o in outcomes:
        assert f"{o.parameters:,}" in page
        assert f"{o.best.mean:.3g}"[:3] in page
        assert f">{o.name}</text>" in page  # named in the charts
    assert page.count("<svg") == 2 * 3
    assert "{{" not in page
    assert "src=" not in page  # asks for nothing from elsewhere
    assert "D: stored weights grow as √(1 + Σα²)" in page


def test_colours_and_dashes_tell_many_variants_apart(finished: Path) -> None:
    many = [outcome(v.name) for v in leave_one_out("G")]
    page = render(PLAN, many, [Check("a < b", "1", "2", False)])
    assert 'class="line s0 dashed"' in page
    assert "a &lt; b" in page
    assert "<strong>no</strong>" in page


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    results = write_ablation(PLAN, tmp_path)
    assert results["variants"] == []
    page = (tmp_path / "ablate.html").read_text()
    assert "No run has finished" in page
    assert "Without a finished run: D, G" in page


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


# The benchmark.


def test_the_benchmark_draws_what_was_measured(finished: Path, out: Path, tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    from benchmarks import ladder

    results = write_ablation(PLAN, out)
    assert ladder.report(results).splitlines()[2].startswith("| D")
    paths = ladder.draw({"ladder": results, "ingredients": results}, tmp_path / "figures")
    names = ["ladder-curves.png", "ladder-magnitudes.png", "ladder-ingredients.png"]
    assert [path.name for path in paths] == names
    assert all(plt.imread(path).std() > 0.05 for path in paths)  # an empty page has one colour


@pytest.mark.slow
def test_the_benchmark_shares_runs_between_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import harness, ladder

    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["ladder", "--out", str(tmp_path / "runs"), "--quick"])
    ladder.main()
    assert "| G-pixel_norm" in capsys.readouterr().out
    assert not (tmp_path / "results").exists(), "a quick run must not replace recorded results"
    log = (tmp_path / "runs" / "G-seed0" / LOG_FILE).read_text()
    assert log.count("started") == 1
