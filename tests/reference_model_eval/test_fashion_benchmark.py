"""The benchmark of the EMA length on real data, on a run of seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from reference_model.held_out_loss import LOSS
from reference_model.sweep_record import load_record

pytest.importorskip("matplotlib")


def test_it_measures_every_part_and_draws_every_figure(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from benchmarks import fashion_figures, fashion_mnist, harness

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["fashion_mnist", "--run-dir", str(run_dir), "--quick"])
    fashion_mnist.main()
    assert "| raw" in capsys.readouterr().out
    assert list(tmp_path.glob("*.json")) == [], "a quick run must not replace recorded results"
    record = load_record(run_dir)
    assert record is not None
    assert record.times == [200, 400, 800]
    assert {m.point.guide.guidance for m in record.guided if m.point.guide} == {1.5, 2}
    assert any(m.point.changed and LOSS in m.scores for m in record.measurements)
    rows = fashion_mnist.rows(record)
    assert [row["scores"] for row in rows] == [m.scores for m in record.measurements]

    out = tmp_path / "figures"
    monkeypatch.setattr(
        sys, "argv", ["fashion_figures", "--run-dir", str(run_dir), "--out", str(out)]
    )
    fashion_figures.main()
    names = {path.stem.removeprefix("fashion-") for path in out.glob("fashion-*.png")}
    assert names == {"curve", "samples", "times", "guidance", "tensors"}


def test_a_run_that_was_not_measured_is_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from benchmarks import fashion_figures

    (run_dir / "sweep.json").unlink()
    monkeypatch.setattr(sys, "argv", ["fashion_figures", "--run-dir", str(run_dir)])
    with pytest.raises(SystemExit):
        fashion_figures.main()
    assert "run benchmarks.fashion_mnist first" in capsys.readouterr().err
