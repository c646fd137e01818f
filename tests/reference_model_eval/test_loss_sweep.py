"""Sweeps of the held-out loss alone: nothing that judges images is needed, or made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from reference_model.cli import main
from reference_model.demo import QUICK
from reference_model.held_out_loss import LOSS
from reference_model.points import Point, grid
from reference_model.report import load_run, render
from reference_model.sweep import Sweep
from reference_model.sweep_record import DISTANCE, load_record


def test_latents_without_classes_or_autoencoder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "latents.npy", rng.standard_normal((80, 4, 8, 8)).astype(np.float32))
    run_dir = tmp_path / "run"
    options = {
        "train": f"--preset digits-tiny --data {tmp_path / 'latents.npy'} --encoder latents "
        "--img-channels 4 --label-dim 0 --total-nimg 96",
        "sweep": "--measure loss --sigma-rel 0.05,0.1 --images 40 --repeats 1",
    }
    for command, words in options.items():
        arguments = [command, "--run-dir", str(run_dir), "--quiet", *words.split()]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0].split() == ["sigma_rel", *LOSS.split(), "std", "error"]
    assert "nan" not in result.output  # one repeat has no spread
    assert not list(run_dir.glob("classifier-*"))
    page = (run_dir / "report.html").read_text()
    assert 'id="loss"' in page
    assert "no image was generated" in page


def test_a_run_that_trained_on_all_images_is_refused_before_averages_are_made(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "sweep.json").unlink()
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**config, "held_out": 0}))
    monkeypatch.setattr("reference_model.averages.reconstruct", lambda *args, **options: 1 / 0)
    run = Sweep(run_dir, QUICK.protocol, progress=False, images=False)
    with pytest.raises(ValueError, match="there are no held-out images to measure a loss on"):
        run.measure(grid([0.1], [800]), by=LOSS)


def test_images_and_losses_share_a_record(run_dir: Path) -> None:
    (run_dir / "sweep.json").unlink()
    points = grid([0.07, 0.2], [800])
    first = Sweep(run_dir, QUICK.protocol, progress=False, images=False)
    first.measure(points, by=LOSS)
    assert first.record.settings["judge"] is None
    with pytest.raises(ValueError, match="opened for losses alone"):
        first.measure(points)

    second = Sweep(run_dir, QUICK.protocol, progress=False)
    assert second.record.settings["judge"] is not None
    assert all(second.record.has(p, LOSS) for p in points)
    second.measure(points[:1])
    # The first knows nothing of the judge, and must not drop what was judged meanwhile.
    other = Point(0.1, 800)
    first.measure([other], by=LOSS)
    record = load_record(run_dir)
    assert record is not None
    assert record == first.record
    assert record.settings == second.record.settings
    assert record.has(points[0], DISTANCE)
    assert record.has(other, LOSS)
    assert render(load_run(run_dir)).count('id="quality"') == 1
    assert Sweep(run_dir, QUICK.protocol, progress=False, images=False).record == record
    assert not (run_dir / "sweep.old.json").exists()
