"""The sweep: what it records, that it resumes, and that its comparisons are what they claim."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from posthoc_ema import reconstruct
from reference_model.averages import Weights
from reference_model.checkpoint import RunDirError, load_checkpoint, load_config, load_network
from reference_model.demo import QUICK
from reference_model.direct_check import direct_averages, relative_error
from reference_model.evaluate import evaluate
from reference_model.judge import Judge
from reference_model.parallel_generation import generate_in_parallel
from reference_model.points import Point
from reference_model.protocol import Protocol
from reference_model.sampler import generate_images
from reference_model.sweep import sweep
from reference_model.sweep_record import (
    AGREEMENT,
    DISTANCE,
    Measurement,
    SweepRecord,
    clearly_worse,
    load_record,
    paired_difference,
)


def measurement(sigma_rel: float | None, *distances: float) -> Measurement:
    return Measurement(Point(sigma_rel, 5.0), {DISTANCE: distances})


def test_the_record_holds_every_length_and_the_raw_weights(finished_demo: Path):
    record = load_record(finished_demo)
    assert record is not None
    assert [m.sigma_rel for m in record.measurements] == [None, *QUICK.sigma_rels]
    for m in record.measurements:
        assert len(m.distances) == len(m.scores[AGREEMENT]) == QUICK.protocol.repeats
        assert all(math.isfinite(d) and d > 0 for d in m.distances)
        assert len(m.read_as) == len(record.shown) == 40
    for m in record.averages:
        assert len(m.coefficients) == len(record.inputs)
        # Coefficients sum to one up to the rounding of a sum of 50.
        assert sum(m.coefficients) == pytest.approx(1.0, abs=1e-9)
    assert len(record.real) == QUICK.protocol.repeats
    assert record.machine["torch"] == torch.__version__


def test_a_recorded_distance_is_that_of_images_made_by_hand(finished_demo: Path):
    record = load_record(finished_demo)
    assert record is not None
    sigma_rel, protocol = 0.07, QUICK.protocol
    weights = reconstruct(finished_demo / "ema", sigma_rel=sigma_rel, framework="torch")
    net = load_network(finished_demo, weights.state_dict())
    judge = Judge(load_config(finished_demo), protocol, finished_demo, progress=False)
    seeds = range(protocol.images, 2 * protocol.images)  # those of the second repeat
    classes = torch.arange(protocol.images) % 10
    images = generate_images(net, seeds, classes, batch_size=7, num_steps=protocol.num_steps)
    found = record.find(Point(sigma_rel, 800))
    assert found is not None
    # Another batch size sums in another order: a pixel may round to the next of 255 levels.
    assert judge.judge(images, classes)[0] == pytest.approx(found.distances[1], rel=1e-2)
    (score,) = evaluate(
        finished_demo, [Weights(finished_demo, sigma_rel)], protocol, progress=False
    )
    assert score.distances == found.distances


def test_measured_lengths_are_kept_and_only_new_ones_are_measured(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    before = load_record(run_dir)
    assert before is not None
    scored = []
    real_score = Judge.score

    def counting_score(self: Judge, *args: object, **options: object) -> object:
        scored.append(1)
        return real_score(self, *args, **options)

    monkeypatch.setattr(Judge, "score", counting_score)
    record = sweep(run_dir, (0.07, 0.15), QUICK.protocol, progress=False)
    assert len(scored) == 1
    assert [m.sigma_rel for m in record.averages] == [0.03, 0.07, 0.1, 0.15, 0.2]
    assert record.find(Point(0.07, 800)) == before.find(Point(0.07, 800))
    assert load_record(run_dir) == record


def test_an_interrupted_sweep_keeps_what_it_measured(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    (run_dir / "sweep.json").unlink()
    real_score, scored = Judge.score, []

    def interrupted_score(self: Judge, *args: object) -> object:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(1)
        return real_score(self, *args)

    monkeypatch.setattr(Judge, "score", interrupted_score)
    with pytest.raises(KeyboardInterrupt):
        sweep(run_dir, QUICK.sigma_rels, QUICK.protocol, progress=False)
    record = load_record(run_dir)
    assert record is not None
    assert [m.sigma_rel for m in record.measurements] == [None, 0.03]

    monkeypatch.setattr(Judge, "score", real_score)
    complete = sweep(run_dir, QUICK.sigma_rels, QUICK.protocol, progress=False)
    assert [m.sigma_rel for m in complete.measurements] == [None, *QUICK.sigma_rels]


def test_other_settings_start_anew_and_keep_the_earlier_record(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    other = Protocol(images=44, repeats=2, num_steps=2)
    record = sweep(run_dir, (0.1,), other, progress=False)
    assert [m.sigma_rel for m in record.measurements] == [None, 0.1]
    assert "protocol.images 40, now 44" in capsys.readouterr().err
    old = json.loads((run_dir / "sweep.old.json").read_text())
    assert len(old["measurements"]) == 1 + len(QUICK.sigma_rels)


def test_reconstructions_are_compared_with_the_averages_training_kept(finished_demo: Path):
    record = load_record(finished_demo)
    config, checkpoint = load_config(finished_demo), load_checkpoint(finished_demo)
    assert record is not None
    assert checkpoint is not None
    tracked = direct_averages(checkpoint, config.direct_sigma_rel)
    assert set(tracked) == set(QUICK.sigma_rels)
    for m in record.averages:
        assert m.direct is not None
        weights = reconstruct(finished_demo / "ema", sigma_rel=m.sigma_rel, framework="torch")
        error = relative_error(weights.state_dict(), tracked[m.sigma_rel])
        # One target sums in another order than four do: 1e-7 of the weights in an error of 1e-5.
        # Where rounding is all there is, it differs by its own size.
        assert error == pytest.approx(m.direct.error, rel=2e-2, abs=2e-7)
        # A snapshot at every step: only float32 rounding is left at lengths in between.
        assert error < 1e-3
    # The check can fail: the averages of two lengths differ by much more than that.
    assert relative_error(tracked[0.03], tracked[0.2]) > 1e-2


def test_relative_error_is_an_rms_ratio_over_all_tensors():
    truth = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]]), "n": torch.tensor(7)}
    other = {"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([[0.0]]), "n": torch.tensor(8)}
    assert relative_error(other, truth) == pytest.approx(1.0, rel=1e-15)  # 5 / 5
    assert relative_error(truth, truth) == 0.0


def test_real_images_score_better_than_an_untrained_network(finished_demo: Path):
    record = load_record(finished_demo)
    assert record is not None
    assert record.raw is not None
    assert max(record.real) < min(record.raw.distances)


def test_paired_differences_ignore_what_is_common_to_a_repeat():
    a, b = measurement(0.1, 1.0, 2.0, 9.0), measurement(0.2, 1.1, 2.2, 9.15)
    difference, error = paired_difference(b, a)
    assert difference == pytest.approx(0.15)
    assert error < 0.03 < a.error  # far below the spread of either
    assert clearly_worse(b, a)
    assert not clearly_worse(a, b)
    assert not clearly_worse(measurement(0.3, 1.3, 1.9, 9.0), a)
    assert not clearly_worse(measurement(0.3, 5.0), measurement(0.1, 1.0)), "one repeat: unknown"


def test_the_record_survives_a_round_trip(tmp_path: Path):
    record = SweepRecord({"t": 5.0}, shown=(0, 1), inputs=((5.0, 0.05),), real=(0.1, 0.2))
    record.add(measurement(0.2, 3.0, 4.0))
    record.add(measurement(None, 9.0, 9.5))
    record.add(measurement(0.1, 2.0, 2.5))
    record.add(measurement(0.2, 1.0, 1.5))  # replaces
    record.save(tmp_path)
    assert load_record(tmp_path) == record
    assert [m.sigma_rel for m in record.measurements] == [None, 0.1, 0.2]
    assert record.best == measurement(0.2, 1.0, 1.5)
    assert load_record(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("{}", "'version'"),
        ('{"version": 99}', "format version 99, this package reads 2"),
        ('{"version": 2, "measurements": [{}], "inputs": []}', "point"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, text: str, reason: str):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(RunDirError, match=rf"sweep\.json cannot be read \(.*{reason}.*remove it"):
        load_record(tmp_path)


def test_too_few_images_are_refused_before_anything_is_trained_or_drawn(run_dir: Path):
    for path in run_dir.glob("classifier-*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"at least 33 images in each repeat \(got 32\)"):
        sweep(run_dir, (0.1,), Protocol(images=32), progress=False)
    assert not list(run_dir.glob("classifier-*"))


@pytest.mark.parametrize("field", ["images", "repeats", "num_steps", "batch_size"])
def test_protocol_values_are_checked(field: str):
    with pytest.raises(ValueError, match=rf"{field} must be at least 1 \(got 0\)"):
        Protocol(**{field: 0})
    with pytest.raises(ValueError, match=r"first_seed must be at least 0 \(got -1\)"):
        Protocol(first_seed=-1)


def test_repeats_use_disjoint_seeds():
    protocol = Protocol(images=5, repeats=3, first_seed=100)
    assert [list(protocol.seeds(r)) for r in range(3)] == [
        [100, 101, 102, 103, 104],
        [105, 106, 107, 108, 109],
        [110, 111, 112, 113, 114],
    ]
    assert protocol.classes(3) == [0, 1, 2, 0, 1]


def test_threads_change_neither_the_images_nor_the_thread_count(finished_demo: Path):
    net = load_network(finished_demo)
    protocol = Protocol(images=30, num_steps=2, batch_size=8)
    classes = torch.tensor(protocol.classes(10))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = generate_in_parallel(net, protocol, 1, classes)
        torch.set_num_threads(3)
        together = generate_in_parallel(net.train(), protocol, 1, classes)
        assert torch.get_num_threads() == 3
        assert net.training
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    expected = generate_images(net, protocol.seeds(1), classes, batch_size=30, num_steps=2)
    # Another batch size sums in another order: a pixel may round to the next of 255 levels.
    torch.testing.assert_close(together.int(), expected.int(), rtol=0, atol=1)
