"""Grids on a real run: times, guidance, single tensors, searches; and nothing is measured twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc_ema import reconstruct
from reference_model.averages import Averages, Weights
from reference_model.checkpoint import RunDirError, load_config, load_network
from reference_model.demo import QUICK
from reference_model.held_out_loss import LOSS, LossMeter
from reference_model.judge import Judge
from reference_model.points import Point, PointGuide, grid
from reference_model.report import load_run, render
from reference_model.sweep import Sweep
from reference_model.sweep_grids import (
    Guides,
    even_times,
    given_times,
    guided_grid,
    sensitivity_grid,
)
from reference_model.sweep_record import DISTANCE, load_record
from reference_model.sweep_search import find_best


@pytest.fixture
def run(run_dir: Path) -> Sweep:
    return Sweep(run_dir, QUICK.protocol, progress=False)


@pytest.fixture
def count_scores(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Options of every call of the judge."""
    calls: list[dict[str, object]] = []
    score = Judge.score

    def counted(self: Judge, *args: object, **options: object) -> object:
        calls.append(options)
        return score(self, *args, **options)

    monkeypatch.setattr(Judge, "score", counted)
    return calls


def test_several_times_are_the_averages_as_of_those_times(run: Sweep, run_dir: Path):
    record = run.measure(grid([0.07, 0.2], [320, 800]))
    assert record.times == [320, 800]
    assert [m.sigma_rel for m in record.curve(320)] == [0.07, 0.2]
    found = record.find(Point(0.2, 320))
    assert found is not None
    inputs = record.inputs_at(320)
    assert max(t for t, _ in inputs) == 320
    assert len(found.coefficients) == len(inputs)
    # By hand, from the library alone.
    weights = reconstruct(run_dir / "ema", sigma_rel=0.2, t=320, framework="torch")
    judge = Judge(load_config(run_dir), QUICK.protocol, run_dir, progress=False)
    score = judge.score(load_network(run_dir, weights.state_dict()))
    assert found.distances == score.distances
    # The report draws both curves, and only those of one time under the slider.
    page = render(load_run(run_dir))
    assert 'id="times"' in page
    assert "320" in page


def test_guidance_is_recorded_by_strength_and_guide(
    run: Sweep, run_dir: Path, count_scores: list[dict[str, object]]
):
    points = guided_grid(run, [0.07, 0.2], [run.end], Guides((1, 2), (0.2,)))
    # 0.2 cannot guide itself; without guidance both were measured by the demo.
    assert [p for p in points if p.guide] == [
        Point(0.07, 800, PointGuide(2, 0.2, 800, run.record.settings["run_id"]))
    ]
    record = run.measure(points)
    assert [c["guidance"] for c in count_scores] == [2]
    (found,) = record.guided
    nets = [
        load_network(run_dir, w.state_dict())
        for w in reconstruct(run_dir / "ema", [0.07, 0.2], framework="torch")
    ]
    judge = Judge(load_config(run_dir), QUICK.protocol, run_dir, progress=False)
    assert found.distances == judge.score(nets[0], gnet=nets[1], guidance=2).distances
    alone = record.find(Point(0.07, 800))
    assert alone is not None
    assert found.distances != alone.distances, "the guide did something"
    page = render(load_run(run_dir))
    assert 'id="guidance"' in page
    assert "w = 2" in page
    assert "--guidance 2 --guidance-sigma-rel 0.2" in page


def test_a_guide_of_another_run_is_known_wherever_it_lies(run: Sweep, tmp_path: Path):
    other = Path(shutil.copytree(run.run_dir, tmp_path / "other"))
    # A copy is the same run: no other guide.
    (same,) = Guides((2.0,), (0.2,), other).of(run, 800, 0.1)
    assert same.run_dir == ""
    (own_time,) = Guides((2.0,), (), other, (0.5,), (0.1, 2.0)).of(run, 800, 0.1)
    assert (own_time.t, own_time.sigma_rel, own_time.interval) == (400, 0.1, (0.1, 2.0))
    with pytest.raises(ValueError, match="every guide is the network that it is to guide"):
        guided_grid(run, [0.1], [800], Guides((2.0,)))


def test_single_tensors_of_another_length(run: Sweep, run_dir: Path):
    points = sensitivity_grid(run, 0.1, (0.2,), patterns=["unet.enc.*"])
    assert points[0] == Point(0.1, 800)
    assert len(points) > 3
    record = run.measure(points, by=LOSS)
    assert all(record.has(p, LOSS) for p in points)
    # By hand: the library's own mixture of lengths.
    pattern, length = points[1].changed[0]
    mixed = reconstruct(run_dir / "ema", {pattern: length, "*": 0.1}, framework="torch")
    loss = LossMeter(load_config(run_dir), QUICK.protocol).measure
    found, base = record.find(points[1]), record.find(points[0])
    assert found is not None
    assert base is not None
    # Reconstructed in another company, sums round otherwise: 1e-7 of the weights.
    expected = loss(load_network(run_dir, mixed.state_dict()))
    assert found.scores[LOSS] == pytest.approx(expected, rel=1e-5)
    assert found.scores[LOSS] != base.scores[LOSS], "the change did something"
    assert not found.distances
    # The base keeps the distance that the demo measured.
    assert DISTANCE in base.scores
    page = render(load_run(run_dir))
    assert 'id="sensitivity"' in page
    assert "enc.8x8_block0" in page


def test_sensitivity_starts_from_the_best_length_and_names_wrong_patterns(run: Sweep):
    best = run.record.best
    assert best is not None
    points = sensitivity_grid(run, None)
    assert points[0].sigma_rel == best.sigma_rel
    lengths = {length for p in points for _, length in p.changed}
    assert lengths == {round((best.sigma_rel or 0) / 2, 4), min(2 * (best.sigma_rel or 0), 0.28)}
    with pytest.raises(ValueError, match=r"no tensor matches 'decoder\*'; names are like 'unet"):
        sensitivity_grid(run, 0.1, patterns=["decoder*"])
    run.record.measurements.clear()
    with pytest.raises(ValueError, match="Give one --sigma-rel, or sweep first"):
        sensitivity_grid(run, None)


def test_held_out_loss_is_paired_and_tells_good_weights_from_bad(finished_demo: Path):
    loss = LossMeter(load_config(finished_demo), QUICK.protocol).measure
    trained, untrained = load_network(finished_demo), load_network(finished_demo)
    with torch.no_grad():
        untrained.unet.out["gain"].weight.zero_() if isinstance(
            untrained.unet.out, torch.nn.ModuleDict
        ) else untrained.unet.out.gain.weight.zero_()
    assert loss(trained) == loss(trained)
    assert len(loss(trained)) == QUICK.protocol.repeats
    assert max(loss(trained)) < min(loss(untrained))


def test_search_measures_few_lengths_and_goes_on_after_an_interruption(
    run: Sweep,
    run_dir: Path,
    count_scores: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
):
    counted = Judge.score

    def interrupted(self: Judge, *args: object, **options: object) -> object:
        if len(count_scores) == 2:
            raise KeyboardInterrupt
        return counted(self, *args, **options)

    monkeypatch.setattr(Judge, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_best(run, (0.02, 0.25), 4)
    assert len(count_scores) == 2
    monkeypatch.setattr(Judge, "score", counted)
    again = Sweep(run_dir, QUICK.protocol, progress=False)
    result = find_best(again, (0.02, 0.25), 4)
    assert len(count_scores) <= 4, "the interrupted search's measurements count"
    for s, distance in result.items():
        found = again.record.find(Point(s, 800))
        assert found is not None
        assert found.distance == distance
    # What the demo had measured is used, and costs nothing.
    assert {0.03, 0.07, 0.1, 0.2} <= set(result)
    calls = len(count_scores)
    assert find_best(again, (0.02, 0.25), 4).best == result.best
    assert len(count_scores) == calls


def test_times_of_a_run_that_goes_on_extend_the_record(
    finished_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    running = Path(shutil.copytree(finished_demo, tmp_path / "running"))
    (running / "sweep.json").unlink()
    snapshots = (running / "ema").glob("t=*")
    later = [path for path in snapshots if int(path.name[2:].split("_")[0]) > 400]
    for path in later:
        path.unlink()
    run = Sweep(running, QUICK.protocol, progress=False)
    assert run.end == 384
    assert even_times(run, 4) == [192, 384]  # snapshots nearest to 200 and 400
    assert given_times(run, [0.25, 320, 1]) == [200, 320]
    assert "Not reached yet, left out: 800 images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="snapshots up to 384 images; give a time that it has"):
        given_times(run, [0.9])
    run.measure(grid([0.1], [384]))

    for path in later:
        shutil.copy(finished_demo / "ema" / path.name, path)
    run = Sweep(running, QUICK.protocol, progress=False)
    assert run.end == 800
    assert even_times(run, 4) == [192, 384, 608, 800]
    assert run.record.times == [384], "what was measured while it ran is kept"
    record = run.measure(grid([0.1], [800]))
    assert record.times == [384, 800]


def test_other_snapshots_of_the_same_run_start_anew(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    first = min((run_dir / "ema").glob("t=*"))
    first.unlink()
    assert Sweep(run_dir, QUICK.protocol, progress=False).record.measurements == []
    assert "Measuring anew: snapshots" in capsys.readouterr().err
    assert (run_dir / "sweep.old.json").exists()


def test_a_record_of_an_older_format_is_set_aside_once_for_each(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("sweep.old.json", "sweep.old2.json"):
        (run_dir / "sweep.json").write_text('{"version": 1, "measurements": []}')
        assert load_record(run_dir) is None
        message = capsys.readouterr().err
        assert f"format version 1, now 2. The earlier record is {run_dir / name}" in message
        assert json.loads((run_dir / name).read_text())["version"] == 1
    assert not (run_dir / "sweep.json").exists()


def test_impossible_points_are_refused_before_anything_is_measured(
    run: Sweep, count_scores: list[dict[str, object]]
):
    for point, message in (
        (Point(None, 400), r"raw weights are kept at the last checkpoint alone, after 800 images"),
        (Point(0.1, 900), r"snapshots from 32 to 800 images \(asked for an average after 900\)"),
        (Point(0.1, 1), "asked for an average after 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run.measure([Point(0.15, 800), point])
    with pytest.raises(RunDirError, match=r"config\.json does not exist"):
        run.measure([Point(0.1, 800, PointGuide(2.0, 0.2, 800, "x", run_dir="/nowhere"))])
    guided = Point(0.1, 800, PointGuide(2.0, 0.2, 800, "x"))
    with pytest.raises(ValueError, match="guidance changes samples, not the loss"):
        run.measure([guided], by=LOSS)
    assert count_scores == []


def test_two_sweeps_of_one_run_at_a_time_keep_what_both_measured(
    run_dir: Path, count_scores: list[dict[str, object]]
):
    first = Sweep(run_dir, QUICK.protocol, progress=False)
    second = Sweep(run_dir, QUICK.protocol, progress=False)
    first.measure([Point(0.15, 800), Point(0.05, 800)])
    second.measure([Point(0.25, 800), Point(0.15, 800)])
    assert len(count_scores) == 3, "the second learned of 0.15 when it recorded 0.25"
    record = load_record(run_dir)
    assert record == second.record
    assert record is not None
    assert [m.sigma_rel for m in record.averages] == [0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25]


def test_averages_need_few_passes_and_little_memory(
    finished_demo: Path, monkeypatch: pytest.MonkeyPatch
):
    from reference_model import averages

    passes: list[int] = []

    def counted(snapshots: Path, lengths: list[float], **options: object) -> object:
        passes.append(len(lengths))
        return reconstruct(snapshots, lengths, **options)

    monkeypatch.setattr(averages, "reconstruct", counted)
    wanted = [Weights(finished_demo, s, t) for t in (400, 800) for s in (0.05, 0.1, 0.2)]
    together = Averages(wanted)
    expected = [together.get(w)[0].state_dict() for w in wanted]
    assert passes == [3, 3], "one pass for each time"

    passes.clear()
    size = sum(w.nbytes for w in together.get(wanted[0])[0].params.values())
    passes.clear()
    tight = Averages(wanted, max_bytes=2 * size)
    for w, state in zip(wanted, expected, strict=True):
        made = tight.get(w)[0].state_dict()
        for name, tensor in state.items():
            # Reconstructed in another company, sums round otherwise.
            np.testing.assert_allclose(made[name], tensor, rtol=1e-5, atol=1e-6)
        assert len(tight._held) <= 2
    assert passes == [2, 1, 2, 1]
    # Needed together, they are held together, whatever the bound.
    assert len(Averages(wanted[:3], max_bytes=1).get(*wanted[:3])) == 3
