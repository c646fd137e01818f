"""Training in micro-batches and in several processes is the same training."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posthoc_ema import SnapshotStore, reconstruct
from reference_model.checkpoint import load_checkpoint
from reference_model.ladder import LADDER
from reference_model.presets import preset
from reference_model.train import images_at_once, train
from tests.distributed.ranks import run_ranks
from tests.reference_model import parallel_work as work
from tests.reference_model.parallel_work import TINY


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(run_dir)
    assert checkpoint is not None
    return checkpoint["net"]


def stats(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def assert_close_states(a: Path, b: Path) -> None:
    """Weights, averages and statistics agree up to what rounding grows to."""
    first, second = load_checkpoint(a), load_checkpoint(b)
    assert first is not None
    assert second is not None
    assert first["nimg"] == second["nimg"]
    assert_close_tensors(first["net"], second["net"])
    for one, other in zip(first["ema"]["averages"], second["ema"]["averages"], strict=True):
        assert_close_tensors(one, other)
    for line, other in zip(stats(a), stats(b), strict=True):
        # Gradient norms and losses are sums over many weights and pixels, and differ less.
        assert other == pytest.approx(line, rel=1e-3)


def assert_close_runs(a: Path, b: Path) -> None:
    """So do the states of two runs, and all their snapshots."""
    assert_close_states(a, b)
    folders = [run_dir / "ema" for run_dir in (a, b)]
    kept = [sorted({(s.t, s.profile.sigma_rel) for s in SnapshotStore(f).list()}) for f in folders]
    assert kept[0] == kept[1]
    for t, sigma_rel in kept[0]:
        one, other = (reconstruct(f, sigma_rel, t=t, framework="torch") for f in folders)
        assert_close_tensors(one.state_dict(), other.state_dict())


def assert_close_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        # Eight steps of up to 0.03 from weights of about 1. Adam divides a gradient by its own
        # size, so that where it is nearly 0 the rounding of sums (1e-7 of other gradients)
        # decides about part of a step. A wrong image, mask or factor moves weights by 1e-2.
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-3)
        assert (other[name] - one[name]).square().mean().sqrt() < 1e-4


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, all images at once."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(TINY, run_dir, progress=False) == TINY.total_nimg
    return run_dir


@pytest.mark.parametrize("config", LADDER)
@pytest.mark.parametrize("at_once", [1, 5])
def test_gradients_do_not_depend_on_micro_batches(config: str, at_once: int) -> None:
    """Dropout belongs to images, and stored weights change once a step, in all networks."""
    found = work.gradients(work.alone(), at_once=at_once, config=config)
    work.assert_close_gradients(found, work.gradients(work.alone(), config=config))


def test_comparison_of_gradients_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: dropout drawn for batches, and weights normalised for each micro-batch, show."""
    expected = work.gradients(work.alone())
    with monkeypatch.context() as patch:
        patch.setattr("reference_model.parallel.weights_kept", lambda layers, keep: _nothing())
        with pytest.raises(AssertionError):
            work.assert_close_gradients(work.gradients(work.alone(), at_once=5), expected)
    monkeypatch.setattr("reference_model.train.image_seeds", lambda net, seeds: _nothing())
    with pytest.raises(AssertionError):
        work.assert_close_gradients(work.gradients(work.alone(), at_once=5), expected)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize(
    ("parallel", "number", "config"),
    [
        ("ddp", 2, "G"),
        ("fsdp", 3, "G"),
        pytest.param("ddp", 3, "A", marks=pytest.mark.slow),
        pytest.param("fsdp", 2, "A", marks=pytest.mark.slow),
        pytest.param("fsdp", 3, "D", marks=pytest.mark.slow),
    ],
)
def test_gradients_do_not_depend_on_processes(
    tmp_path: Path, parallel: str, number: int, config: str
) -> None:
    run_ranks(number, work.compare_gradients, tmp_path, parallel, 3, config)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_bad_gradients_of_one_process_are_zeroed_in_all(tmp_path: Path, parallel: str) -> None:
    run_ranks(2, work.compare_bad_gradients, tmp_path, parallel)


def test_resumed_runs_may_take_other_micro_batches(straight: Path, tmp_path: Path) -> None:
    train(TINY, tmp_path, progress=False, micro_batch=5, stop_at=4 * 12)
    train(TINY, tmp_path, progress=False, micro_batch=1)
    assert_close_runs(straight, tmp_path)


def test_same_micro_batch_resumes_to_the_bit(tmp_path: Path) -> None:
    train(TINY, tmp_path / "a", progress=False, micro_batch=5)
    train(TINY, tmp_path / "b", progress=False, micro_batch=5, stop_at=5 * 12)
    train(TINY, tmp_path / "b", progress=False, micro_batch=5)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    # Sums of an interval that the stop cut in two went through the checkpoint.
    assert stats(tmp_path / "a") == stats(tmp_path / "b")


def test_comparison_of_runs_can_fail(straight: Path, tmp_path: Path) -> None:
    """Twin: another dropout is another run."""
    other = replace(TINY, network=replace(TINY.network, dropout=0.21))
    train(other, tmp_path, progress=False)
    with pytest.raises(AssertionError):
        assert_close_runs(straight, tmp_path)


def test_two_processes_train_as_one_and_three_go_on(straight: Path, tmp_path: Path) -> None:
    options = {"stop_at": 4 * 12, "micro_batch": 4}
    run_ranks(2, work.train_part, tmp_path, TINY, options)
    run_ranks(3, work.train_part, tmp_path, TINY, {})
    assert_close_runs(straight, tmp_path / "run")
    starts = [json.loads(s) for s in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [(s["processes"], s["nimg"], s["micro_batch"]) for s in starts] == [
        (2, 0, 4),
        (3, 48, None),
    ]


def test_signal_to_one_process_stops_all_after_one_step(straight: Path, tmp_path: Path) -> None:
    run_ranks(2, work.stop_part, tmp_path, "ddp")
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint["nimg"] == 5 * 12
    train(TINY, tmp_path / "run", progress=False)  # one process goes on
    assert_close_runs(straight, tmp_path / "run")


@pytest.mark.parametrize("how", ["error", pytest.param("kill", marks=pytest.mark.slow)])
def test_failure_of_one_process_ends_all(tmp_path: Path, how: str) -> None:
    """None hangs, and the last checkpoint stays."""
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, work.fail_part, tmp_path, how)
    assert "hung" not in str(caught.value)
    assert ("an image is damaged" in str(caught.value)) == (how == "error")
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint["nimg"] == 3 * 12


def test_batch_must_be_divisible() -> None:
    assert images_at_once(12, 3, None) == 4
    assert images_at_once(12, 3, 5) == 4
    assert images_at_once(12, 3, 3) == 3
    with pytest.raises(ValueError, match="batch_size 12 cannot be divided among 5 processes"):
        images_at_once(12, 5, None)
    with pytest.raises(ValueError, match=r"micro_batch must be at least 1 \(got 0\)"):
        images_at_once(12, 1, 0)


def test_unknown_way_to_share_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel must be one of ddp, fsdp \(got 'dp'\)"):
        train(preset("digits-tiny"), tmp_path, progress=False, parallel="dp")


@pytest.mark.slow
def test_four_shards_train_as_one_process(tmp_path: Path, straight: Path) -> None:
    """Some hold nothing of a weight; a signal to one stops all."""
    run_ranks(4, work.stop_part, tmp_path, "fsdp")
    run_ranks(4, work.train_part, tmp_path, TINY, {"parallel": "fsdp"})
    assert_close_runs(straight, tmp_path / "run")


def test_sharded_runs_go_on_in_any_number_of_processes(tmp_path: Path, straight: Path) -> None:
    """From two shards to three, uneven both times, and to a whole."""
    run_dir = tmp_path / "run"
    sharded = {"parallel": "fsdp", "micro_batch": 4}
    run_ranks(2, work.train_part, tmp_path, TINY, {**sharded, "stop_at": 4 * 12})
    assert {p.name for p in run_dir.glob("checkpoint*/*")} == {"1-of-2.pt", "2-of-2.pt"}
    assert weights(run_dir).keys() == weights(straight).keys()
    run_ranks(3, work.train_part, tmp_path, TINY, {**sharded, "stop_at": 7 * 12})
    assert [p.name for p in run_dir.glob("checkpoint-*")] == ["checkpoint-84"]
    train(TINY, run_dir, progress=False)
    assert_close_runs(straight, run_dir)
    assert not list(run_dir.glob("checkpoint-*"))


def torchrun(number: int, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(number), "-m", "reference_model", "train"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_torchrun_trains_and_reports_a_misuse_once(tmp_path: Path) -> None:
    options = ["--preset", "digits-tiny", "--run-dir", str(tmp_path / "run"), "--threads", "1"]
    options += ["--batch-size", "12", "--total-nimg", "48", "--quiet"]
    done = torchrun(2, *options, "--micro-batch", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Finished after 48 of 48 images.\n"
    assert "Warning" not in done.stderr
    refused = torchrun(5, *options[:2], "--run-dir", str(tmp_path / "other"), *options[4:])
    assert refused.returncode == 1
    assert refused.stderr.count("Error: batch_size 12 cannot be divided among 5 processes") == 1
    assert not (tmp_path / "other").exists()
