"""What a run directory says about its run, and which changes of its surroundings it bears."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import reference_model.train as train_module
from posthoc_ema import SnapshotStore
from reference_model.averages import Weights, load_networks
from reference_model.checkpoint import RunDirError, load_checkpoint, load_config
from reference_model.cli import main
from reference_model.data import open_source
from reference_model.presets import preset
from reference_model.run_record import SAMPLE, describe_data
from reference_model.train import train
from tests.reference_model.data_sets import pixels

# TensorBoard's own protocol buffers; and what NumPy says of types that it still uses.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*")

TINY = replace(
    preset("digits-tiny"),
    batch_size=8,
    total_nimg=12 * 8,
    snapshot_nimg=3 * 8,
    checkpoint_nimg=3 * 8,
    stats_nimg=2 * 8,
)


def save_set(path: Path, images: Any, labels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture
def arrays() -> tuple[Any, Any]:
    return pixels(200, 8, 8), np.arange(200) % 10


def config_for(data: Path) -> Any:
    return replace(TINY, data=str(data))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_start_is_recorded(tmp_path: Path) -> None:
    train(TINY, tmp_path, progress=False, stop_at=16)
    train(TINY, tmp_path, progress=False, micro_batch=3)
    train(TINY, tmp_path, progress=False)  # finished: nothing starts
    first, second = lines(tmp_path / "starts.jsonl")
    assert (first["nimg"], second["nimg"]) == (0, 16)
    assert (first["micro_batch"], second["micro_batch"]) == (None, 3)
    assert first["machine"]["torch"] == torch.__version__
    assert first["command"] == sys.argv
    assert first["machine"]["cpus"] == os.cpu_count()


def test_changed_data_is_refused(tmp_path: Path, arrays: tuple[Any, Any]) -> None:
    images, labels = arrays
    data = save_set(tmp_path / "set.npz", images, labels)
    run_dir = tmp_path / "run"
    train(config_for(data), run_dir, progress=False, stop_at=8)
    before = (run_dir / "checkpoint.pt").read_bytes()

    save_set(data, images[:190], labels[:190])
    with pytest.raises(RunDirError) as caught:
        train(config_for(data), run_dir, progress=False)
    assert str(caught.value) == (
        f"the data set {str(data)!r} is not the one that {run_dir} was started on: images=190 "
        "(then 200); bring that back, give the path where it is now as data, or choose another "
        "run directory"
    )
    save_set(data, 255 - images, labels)
    with pytest.raises(RunDirError, match="other images or classes, of the same number and shape"):
        train(config_for(data), run_dir, progress=False)
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    save_set(data, images, labels)
    assert train(config_for(data), run_dir, progress=False, stop_at=16) == 16


def test_moved_data_is_found_by_option(tmp_path: Path, arrays: tuple[Any, Any]) -> None:
    images, labels = arrays
    old = save_set(tmp_path / "old" / "set.npz", images, labels)
    run_dir = tmp_path / "run"
    train(config_for(old), run_dir, progress=False, stop_at=8)
    # As another kind of files, too: what counts is what is in them.
    new = tmp_path / "new"
    new.mkdir()
    np.save(new / "images.npy", images)
    np.save(new / "labels.npy", labels)
    old.unlink()

    command = ["train", "--run-dir", str(run_dir), "--quiet"]
    lost = CliRunner().invoke(main, command)
    assert lost.exit_code == 1
    assert f"there is no data set at '{old}'" in lost.output
    found = CliRunner().invoke(main, [*command, "--data", str(new)])
    assert found.exit_code == 0, found.output
    assert load_config(run_dir).data == str(new)
    assert CliRunner().invoke(main, command).exit_code == 0  # remembered

    other = save_set(tmp_path / "other.npz", 255 - images, labels)
    refused = CliRunner().invoke(main, [*command, "--data", str(other)])
    assert refused.exit_code == 1
    assert "is not the one that" in refused.output
    assert load_config(run_dir).data == str(new)


@pytest.mark.parametrize("change", ["first", "last", "label", "order"])
def test_digest_covers_both_ends_and_all_classes(
    tmp_path: Path, arrays: tuple[Any, Any], change: str
) -> None:
    images, labels = (array.copy() for array in arrays)
    before = describe_data(open_source(str(save_set(tmp_path / "a.npz", images, labels))))
    if change == "label":
        labels[[100, 101]] = labels[[101, 100]]
    elif change == "order":
        images = images[::-1]
    else:
        images[0 if change == "first" else -1, 3, 3] ^= 1
    after = describe_data(open_source(str(save_set(tmp_path / "b.npz", images, labels))))
    assert after["digest"] != before["digest"]
    assert {**after, "digest": 0} == {**before, "digest": 0}


def test_digest_reads_few_images(tmp_path: Path) -> None:
    source = open_source(str(save_set(tmp_path / "a.npz", pixels(500, 2, 2), np.zeros(500, int))))
    read: list[int] = []

    def counted(indices: Any) -> Any:
        read.extend(indices)
        return source.read(indices)

    described = describe_data(replace(source, read=counted))
    assert described == describe_data(source)
    assert len(read) == SAMPLE
    assert (read[0], read[-1]) == (0, 499)


def test_runs_of_the_first_version_load_and_go_on(tmp_path: Path) -> None:
    """No data.json, no starts; optimiser state by number; no sums of an open interval."""
    train(TINY, tmp_path / "new", progress=False, stop_at=48)
    checkpoint = load_checkpoint(tmp_path / "new")
    assert checkpoint is not None
    old_dir = tmp_path / "old"
    (tmp_path / "new").rename(old_dir)
    for name in ("data.json", "starts.jsonl"):
        (old_dir / name).unlink()
    names = [n for n in checkpoint["net"] if n in checkpoint["optimizer"]["state"]]
    by_number = {i: checkpoint["optimizer"]["state"][name] for i, name in enumerate(names)}
    group = {"lr": 0.01, "betas": (0.9, 0.99), "params": list(range(len(names)))}
    old = {**checkpoint, "optimizer": {"state": by_number, "param_groups": [group]}}
    del old["window"]
    torch.save(old, old_dir / "checkpoint.pt")

    load_networks([Weights(old_dir, None), Weights(old_dir, 0.08)])
    data = save_set(tmp_path / "set.npz", pixels(40, 8, 8), np.arange(40) % 10)
    with pytest.raises(RunDirError, match=r"was started with data='digits' \(now "):
        train(config_for(data), old_dir, progress=False)
    train(TINY, tmp_path / "straight", progress=False)
    assert train(TINY, old_dir, progress=False) == TINY.total_nimg
    assert (old_dir / "data.json").exists()
    a, b = load_checkpoint(tmp_path / "straight"), load_checkpoint(old_dir)
    assert a is not None
    assert b is not None
    assert all(torch.equal(a["net"][name], b["net"][name]) for name in a["net"])


def at_nimg(monkeypatch: pytest.MonkeyPatch, nimg: int, act: Callable[[], None]) -> None:
    original = train_module.learning_rate

    def learning_rate(at: int, *args: Any) -> float:
        if at == nimg:
            act()
        return original(at, *args)

    monkeypatch.setattr(train_module, "learning_rate", learning_rate)


def crash() -> None:
    raise RuntimeError("crash")


def test_tensorboard_shows_each_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        at_nimg(patch, 9 * 8, crash)  # lines at 64 and 72, checkpoint at 48
        with pytest.raises(RuntimeError, match="crash"):
            train(replace(TINY, checkpoint_nimg=48), tmp_path, progress=False, tensorboard=True)
    train(replace(TINY, checkpoint_nimg=48), tmp_path, progress=False, tensorboard=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = lines(tmp_path / "stats.jsonl")
    for name in ("loss", "lr", "bad_gradients", "grad_norm", "images_per_second"):
        points = events.Scalars(f"train/{name}")
        assert [p.step for p in points] == [line["nimg"] for line in written]
        # float32 in the files of TensorBoard
        assert [p.value for p in points] == pytest.approx([line[name] for line in written], 1e-6)


def test_tensorboard_is_asked_for(tmp_path: Path) -> None:
    train(TINY, tmp_path, progress=False, stop_at=16)
    assert not (tmp_path / "tensorboard").exists()


def test_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'posthoc-ema\[tensorboard\]'"):
        train(TINY, tmp_path, progress=False, tensorboard=True)


def start(run_dir: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "reference_model", "train", "--run-dir", str(run_dir)]
    for name in ("batch_size", "total_nimg", "snapshot_nimg", "checkpoint_nimg", "stats_nimg"):
        command += [f"--{name.replace('_', '-')}", str(getattr(LONG, name))]
    return subprocess.Popen([*command, "--preset", "digits-tiny", "--threads", "1", *options])


LONG = replace(TINY, total_nimg=150 * 8, checkpoint_nimg=4 * 8, snapshot_nimg=10 * 8)


def kill_repeatedly(run_dir: Path, kills: int, *options: str) -> None:
    """Kill a run at moments spread by a seed, each time after it has made some way."""
    rng = np.random.default_rng(0)
    for _ in range(kills):
        before = progress(run_dir)
        process = start(run_dir, "--quiet", *options)
        while process.poll() is None and progress(run_dir) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()


def progress(run_dir: Path) -> int:
    path = run_dir / "stats.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bits(tmp_path: Path, kills: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: sums over threads round differently
    try:
        train(LONG, tmp_path / "straight", progress=False)
        kill_repeatedly(tmp_path / "run", kills)
        assert train(LONG, tmp_path / "run", progress=False) == LONG.total_nimg
    finally:
        torch.set_num_threads(threads)
    assert len(lines(tmp_path / "run" / "starts.jsonl")) == kills + 1
    a, b = load_checkpoint(tmp_path / "straight"), load_checkpoint(tmp_path / "run")
    assert a is not None
    assert b is not None
    assert all(torch.equal(a["net"][name], b["net"][name]) for name in a["net"])
    for one, other in zip(a["ema"]["averages"], b["ema"]["averages"], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    kept = [
        {(s.t, s.profile) for s in SnapshotStore(tmp_path / name / "ema").list()}
        for name in ("straight", "run")
    ]
    assert kept[0] == kept[1]
    measured = [
        [
            {k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
            for line in lines(tmp_path / name / "stats.jsonl")
        ]
        for name in ("straight", "run")
    ]
    assert measured[0] == measured[1]
