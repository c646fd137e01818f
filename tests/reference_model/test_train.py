"""Training runs: resume to the bit, signals, crashes, refusals, what a run leaves behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import reference_model.train as train_module
from posthoc_ema import SnapshotStore, reconstruct
from reference_model.checkpoint import (
    RunDirError,
    load_checkpoint,
    load_config,
    load_network,
    start_run,
)
from reference_model.parallel import zero_bad_gradients
from reference_model.presets import preset
from reference_model.train import passed_multiple, train

TINY = replace(
    preset("digits-tiny"),
    batch_size=16,
    total_nimg=20 * 16,
    snapshot_nimg=4 * 16,
    checkpoint_nimg=6 * 16,
    stats_nimg=2 * 16,
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(TINY, run_dir, progress=False) == TINY.total_nimg
    return run_dir


def assert_equal_tensors(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


def assert_same_run(a: Path, b: Path) -> None:
    """Raw weights, optimiser, averages and every snapshot agree to the bit."""
    first, second = load_checkpoint(a), load_checkpoint(b)
    assert first is not None
    assert second is not None
    assert first["nimg"] == second["nimg"]
    assert_equal_tensors(first["net"], second["net"])
    for i, state in first["optimizer"]["state"].items():
        assert_equal_tensors(state, second["optimizer"]["state"][i])
    for x, y in zip(first["ema"]["averages"], second["ema"]["averages"], strict=True):
        assert_equal_tensors(x, y)
    snapshots = [
        {(s.t, s.profile): s.path for s in SnapshotStore(run / "ema").list()} for run in (a, b)
    ]
    assert snapshots[0].keys() == snapshots[1].keys()
    for key, path in snapshots[0].items():
        assert_equal_tensors(load_file(path), load_file(snapshots[1][key]))


def stats(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]


def at_nimg(monkeypatch: pytest.MonkeyPatch, nimg: int, act: Callable[[], None]) -> None:
    """Do something in the middle of the step that starts at `nimg`."""
    original = train_module.learning_rate

    def learning_rate(at: int, *args: Any) -> float:
        if at == nimg:
            act()
        return original(at, *args)

    monkeypatch.setattr(train_module, "learning_rate", learning_rate)


@pytest.mark.parametrize("stop_at", [16, 6 * 16, 9 * 16])
def test_stopped_and_resumed_run_is_the_same_to_the_bit(
    straight: Path, tmp_path: Path, stop_at: int
) -> None:
    assert train(TINY, tmp_path, progress=False, stop_at=stop_at) == stop_at
    assert train(TINY, tmp_path, progress=False) == TINY.total_nimg
    assert_same_run(straight, tmp_path)


def test_comparison_of_runs_can_fail(straight: Path, tmp_path: Path) -> None:
    """Twin: another seed is another run."""
    train(replace(TINY, seed=1), tmp_path, progress=False)
    with pytest.raises(AssertionError):
        assert_same_run(straight, tmp_path)


def test_crashed_run_repeats_what_was_not_saved(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshots written after the last checkpoint are replaced by equal ones."""

    class CrashError(Exception):
        pass

    def crash() -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        at_nimg(patch, 10 * 16, crash)
        with pytest.raises(CrashError):
            train(TINY, tmp_path, progress=False)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint["nimg"] == 6 * 16
    train(TINY, tmp_path, progress=False)
    assert_same_run(straight, tmp_path)
    assert [line["nimg"] for line in stats(tmp_path)] == list(range(32, 321, 32))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_nimg(patch, 8 * 16, lambda: os.kill(os.getpid(), number))
        assert train(TINY, tmp_path, progress=False) == 9 * 16  # the step is finished
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint["nimg"] == 9 * 16
    assert signal.getsignal(number) is before
    train(TINY, tmp_path, progress=False)
    assert_same_run(straight, tmp_path)


def test_finished_run_is_left_alone(straight: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}
    assert train(TINY, straight, progress=False) == TINY.total_nimg
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert not changed


def test_run_of_another_config_is_refused(straight: Path) -> None:
    other = replace(TINY, batch_size=32, network=replace(TINY.network, dropout=0.5))
    with pytest.raises(RunDirError) as caught:
        train(other, straight, progress=False)
    assert str(caught.value) == (
        f"{straight} was started with network.dropout=0.0 (now 0.5), batch_size=16 (now 32); "
        "continue it with the same options, or choose another run directory"
    )


def test_run_directory_remembers_its_config(straight: Path, tmp_path: Path) -> None:
    assert load_config(straight) == TINY
    with pytest.raises(RunDirError, match=r"config\.json does not exist; start a run with"):
        load_config(tmp_path)
    start_run(tmp_path, TINY)
    with pytest.raises(RunDirError, match="has no checkpoint yet"):
        load_network(tmp_path)


def test_config_of_another_version_is_named(tmp_path: Path) -> None:
    start_run(tmp_path, TINY)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY.to_dict() | {"warp": 9}))
    with pytest.raises(RunDirError, match=r"config\.json is not a config.*\['warp'\]"):
        load_config(tmp_path)
    path.write_text("{")
    with pytest.raises(RunDirError, match=r"config\.json is not a config"):
        load_config(tmp_path)


def test_training_lowers_the_loss(straight: Path) -> None:
    losses = [line["loss"] for line in stats(straight)]
    # From 5.1 to 1.3 with this seed.
    assert losses[-1] < 0.6 * losses[0]


def test_network_loads_with_raw_and_reconstructed_weights(straight: Path) -> None:
    raw = load_network(straight)
    checkpoint = load_checkpoint(straight)
    assert checkpoint is not None
    assert_equal_tensors(raw.state_dict(), checkpoint["net"])
    assert not raw.training
    weights = reconstruct(straight / "ema", sigma_rel=0.07, framework="torch").state_dict()
    averaged = load_network(straight, weights)
    assert_equal_tensors(dict(averaged.named_buffers()), dict(raw.named_buffers()))
    name = "unet.enc.8x8_block0.residual.conv0.weight"
    assert (averaged.state_dict()[name] - raw.state_dict()[name]).abs().max() > 1e-3


def test_reconstruction_agrees_with_a_length_tracked_directly(tmp_path: Path) -> None:
    """Tracks 0.05 and 0.10 predict 0.15, which this run tracked too."""
    train(TINY, tmp_path, progress=False, ema_sigma_rel=(0.05, 0.10, 0.15))
    snapshots = SnapshotStore(tmp_path / "ema").list()
    last = [s for s in snapshots if s.t == TINY.total_nimg]
    direct = next(s for s in last if abs(s.profile.sigma_rel - 0.15) < 1e-9)
    truth = load_file(direct.path)
    moved = load_file(next(s for s in last if abs(s.profile.sigma_rel - 0.05) < 1e-9).path)
    for s in snapshots:
        if abs(s.profile.sigma_rel - 0.15) < 1e-9:
            s.path.unlink()
    made = reconstruct(tmp_path / "ema", sigma_rel=0.15, framework="torch").state_dict()

    def distance(weights: dict[str, Any]) -> float:
        return sum(float((weights[k] - truth[k]).square().sum()) for k in truth) ** 0.5

    # Five snapshot times of two tracks, far closer than the nearest average that was kept.
    assert distance(made) < 0.15 * distance(moved)


def test_tracked_lengths_can_be_chosen(tmp_path: Path) -> None:
    train(TINY, tmp_path, progress=False, ema_sigma_rel=[0.2], stop_at=4 * 16)
    assert load_config(tmp_path).ema_sigma_rel == (0.2,)
    assert {round(s.profile.sigma_rel, 9) for s in SnapshotStore(tmp_path / "ema").list()} == {0.2}


def test_last_weights_are_in_a_snapshot_whatever_the_interval(tmp_path: Path) -> None:
    train(replace(TINY, snapshot_nimg=13 * 16), tmp_path, progress=False)
    assert sorted({s.t for s in SnapshotStore(tmp_path / "ema").list()}) == [13 * 16, 20 * 16]


def test_bad_gradients_are_zeroed_and_counted() -> None:
    net = nn.Linear(3, 1)
    net.weight.grad = torch.tensor([[float("nan"), 2.0, float("-inf")]])
    net.bias.grad = torch.tensor([float("inf")])
    gradients = [net.weight.grad, net.bias.grad]
    assert zero_bad_gradients(gradients) == 3
    assert net.weight.grad.tolist() == [[0, 2, 0]]
    assert net.bias.grad.tolist() == [0]
    assert zero_bad_gradients(gradients) == 0


def test_bad_gradients_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "zero_bad_gradients", lambda gradients: 5)
    train(TINY, tmp_path, progress=False, stop_at=2 * 16)
    assert [line["bad_gradients"] for line in stats(tmp_path)] == [10]


def test_first_step_has_rate_zero_and_changes_nothing_but_norms(tmp_path: Path) -> None:
    train(TINY, tmp_path, progress=False, stop_at=16)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint["net"]["unet.out.gain.weight"] == 0
    assert checkpoint["optimizer"]["state"]["unet.out.gain.weight"]["step"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_channels": 3}, r"takes images of shape \(3, 8, 8\), data set 'digits' has \(1, 8"),
        ({"label_dim": 7}, "takes 7 classes, data set 'digits' has 10"),
    ],
)
def test_network_must_fit_the_data(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(replace(TINY, network=replace(TINY.network, **change)), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_unconditional_network_trains(tmp_path: Path) -> None:
    config = replace(TINY, network=replace(TINY.network, label_dim=0))
    assert train(config, tmp_path, progress=False, stop_at=32) == 32


def test_intervals_are_passed_once() -> None:
    passed = [n for n in range(3, 31, 3) if passed_multiple(n, 3, 10)]
    assert passed == [12, 21, 30]
