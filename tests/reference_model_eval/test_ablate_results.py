"""What an ablation found: its numbers, what theory says of them, the page and the figures."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close
from small_ablation import PLAN

from reference_model.ablate import (
    Variant,
    leave_one_out,
)
from reference_model.ablate_charts import quality_chart
from reference_model.ablate_checks import Check, checks
from reference_model.ablate_pool import LOG_FILE
from reference_model.ablate_report import error_bars, render, write_ablation
from reference_model.ablate_results import Drift, Outcome, gather, weight_law
from reference_model.presets import preset
from reference_model.sweep_record import load_record


def test_numbers_are_those_of_the_runs(finished_ablation: Path) -> None:
    d, g = gather(PLAN, finished_ablation)
    assert (d.name, g.name, d.seeds, d.lengths) == ("D", "G", (0, 1), (0.05, 0.1, 0.2))
    means = []
    for seed in (0, 1):
        record = load_record(finished_ablation / f"G-seed{seed}")
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


def test_one_seed_takes_its_repeats(finished_ablation: Path) -> None:
    plan = replace(PLAN, seeds=(1,))
    d, _ = gather(plan, finished_ablation)
    record = load_record(finished_ablation / "D-seed1")
    assert record is not None
    assert d.distances == tuple(m.distances for m in record.averages)
    assert "trained with one seed" in error_bars([d])
    assert error_bars(gather(PLAN, finished_ablation)) == "standard errors over seeds"


def test_the_law_of_free_weights(finished_ablation: Path) -> None:
    d, g = gather(PLAN, finished_ablation)
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


# The report.


def test_the_page_holds_the_numbers(finished_ablation: Path) -> None:
    outcomes = gather(PLAN, finished_ablation)
    page = render(PLAN, outcomes, checks(outcomes))
    for o in outcomes:
        assert f"{o.parameters:,}" in page
        assert f"{o.best.mean:.3g}"[:3] in page
        assert f">{o.name}</text>" in page  # named in the charts
    assert page.count("<svg") == 2 * 3
    assert "{{" not in page
    assert "src=" not in page  # asks for nothing from elsewhere
    assert "D: stored weights grow as √(1 + Σα²)" in page


def test_colours_and_dashes_tell_many_variants_apart(finished_ablation: Path) -> None:
    many = [outcome(v.name) for v in leave_one_out("G")]
    page = render(PLAN, many, [Check("a < b", "1", "2", False)])
    assert 'class="line s0 dashed"' in page
    assert "a &lt; b" in page
    assert "<strong>no</strong>" in page


def test_error_bars_and_names_have_room() -> None:
    """Names were cut off on phones, and error bars ran out of the axes into the title."""
    wide = replace(outcome("G"), distances=((1.0, 9.0), (9.0, 9.0), (9.0, 9.0)))
    many = [wide, *(outcome(v.name) for v in leave_one_out("G")[1:])]
    for svg in re.findall(r"<svg.*?</svg>", quality_chart(many, 0.1)):
        width, height = (float(re.search(rf'{k}="(\d+)"', svg)[1]) for k in ("width", "height"))  # type: ignore[index]
        bars = [(float(a), float(b)) for a, b in re.findall(r"M\S+ (\S+)V([\d.]+)M", svg)]
        assert len(bars) == len(many)
        assert all(26 <= top < bottom <= height - 44 for top, bottom in bars)
        names = re.findall(r'class="note s\d" x="([^"]*)" y="([^"]*)"[^>]*>([^<]*)<', svg)
        assert max(float(x) + 7 * len(name) for x, _, name in names) <= width
        heights = sorted(float(y) for _, y, _ in names)
        assert min(np.diff(heights)) >= 14.9
        assert heights[-1] <= height - 40


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    results = write_ablation(PLAN, tmp_path)
    assert results["variants"] == []
    page = (tmp_path / "ablate.html").read_text()
    assert "No run has finished" in page
    assert "Without a finished run: D, G" in page


# The benchmark.


def test_the_benchmark_draws_what_was_measured(out: Path, tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    from benchmarks import ladder

    results = write_ablation(PLAN, out)
    assert ladder.report(results).splitlines()[2].startswith("| D")
    paths = [
        path for part in ladder.PARTS for path in ladder.draw(part, results, tmp_path / "figures")
    ]
    drawn = {path.stem.removeprefix("ladder-") for path in paths}
    assert drawn == {"curves", "magnitudes", "ingredients", "fashion"}
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
