"""``SnapshotStore``: what lies in a folder, in which order, and what resuming does to it."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from posthoc_ema import (
    EMA,
    Exponential,
    ForeignSnapshotError,
    PowerFunction,
    SnapshotError,
    SnapshotStore,
    reconstruct,
)
from tests.parity.runs import record


def weights(step: float) -> dict[str, Any]:
    return {"w": np.full(5, step, np.float64), "n": np.array([int(step)])}


def times(folder: Path) -> list[float]:
    return sorted({s.t for s in SnapshotStore(folder).list()})


def train(ema: EMA, first: int, last: int) -> None:
    for step in range(first, last + 1):
        ema.update(weights(step))


# Listing -------------------------------------------------------------------------------------


def test_listed_by_time_then_by_length_not_by_file_time_or_name(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=(0.20, 0.05, 0.10), snapshots=tmp_path)
    for t in (2, 10, 9.5 + 1, 100, 1e6, 2**40):
        ema.update(weights(t), t=t)
        ema.snapshot()
    for number, path in enumerate(sorted(tmp_path.glob("*.safetensors"), reverse=True)):
        os.utime(path, (number, number))
    found = [(s.t, s.profile.sigma_rel) for s in SnapshotStore(tmp_path).list()]
    assert found == [(t, s) for t in (2, 10, 10.5, 100, 1e6, 2**40) for s in (0.05, 0.10, 0.20)]


def test_a_snapshot_knows_everything_about_itself(tmp_path: Path) -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    net["b"].weight = net["a"].weight
    net["a"].bias.data = net["a"].bias.data.bfloat16()
    ema = EMA(sigma_rel=0.05, snapshots=tmp_path / "new" / "ema", unit="images", encoding="float16")
    ema.update(net, t=2048)
    ema.update(net, t=4096)
    [written] = ema.snapshot()
    [read] = SnapshotStore(tmp_path / "new" / "ema").list()
    assert read == written
    assert read.t == 4096
    assert read.profile == PowerFunction(0.05)
    assert read.run.unit == "images"
    assert read.run.framework == "torch"
    assert read.run.t_first == 2048
    assert read.encoding == "float16"
    assert read.aliases == {"b.weight": "a.weight"}
    assert read.averages["a.bias"] == "BF16", "the model's own type"
    assert set(read.copies) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert read.nbytes == read.path.stat().st_size
    assert read.statistics["count"] == 9 + 3 + 3 + 3 + 3
    np.testing.assert_array_equal(read.read("b.weight"), read.read("a.weight"))
    with pytest.raises(KeyError, match="holds no tensor 'c'"):
        read.read("c")


def test_renamed_files_keep_their_identity(tmp_path: Path) -> None:
    # Identity lies inside the file; its name is a convenience.
    run = record(tmp_path / "ema", steps=24, every=12)
    before = SnapshotStore(run.folder).list()
    for number, snapshot in enumerate(reversed(before)):
        snapshot.path.rename(run.folder / f"copy {number}.safetensors")
    after = SnapshotStore(run.folder).list()
    assert [(s.t, s.profile) for s in after] == [(s.t, s.profile) for s in before]
    np.testing.assert_array_equal(
        reconstruct(run.folder, 0.05).params["enc.w"], after[-2].read("enc.w")
    )


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    run = record(tmp_path / "ema", steps=24, every=12)
    (run.folder / "README.txt").write_text("notes")
    (run.folder / "checkpoint.pt").write_bytes(b"\x00")
    (run.folder / ".hidden.safetensors").write_bytes(b"unfinished")
    (run.folder / ".t=1.safetensors.123.tmp").write_bytes(b"unfinished")
    (run.folder / "folder.safetensors").mkdir()
    assert len(SnapshotStore(run.folder).list()) == 4
    SnapshotStore(run.folder).verify()


@pytest.mark.parametrize(
    "name", ["with space", "ünïcode-σ_rel", "quote'\"s", "a=b,c", "[x]*?", "-dash", "a" * 100]
)
def test_folders_of_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "ema"
    ema = EMA(sigma_rel=(0.05, 0.1), snapshots=str(folder), every=2)
    train(ema, 1, 4)
    assert times(folder) == [2, 4]
    result = reconstruct(str(folder), 0.07, out=tmp_path / name / "out")
    np.testing.assert_array_equal(
        result.params["w"], reconstruct(SnapshotStore(folder), 0.07).params["w"]
    )


def test_folders_behind_a_link_and_relative_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path / "link", every=1)
    train(ema, 1, 2)
    assert times(tmp_path / "real") == [1, 2]
    with pytest.raises(SnapshotError, match="lies in the snapshot folder"):
        reconstruct(tmp_path / "real", 0.1, out=tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    assert times(Path("link")) == [1, 2]
    train(ema, 3, 3)
    assert times(Path("real")) == [1, 2, 3]


def test_writing_the_same_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    # Nothing in a file depends on hash seeds, clocks or the order of a dictionary.
    first = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path / "a", every=5)
    train(first, 1, 3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path / "b", every=5)
    second.load_state_dict(first.state_dict())
    train(first, 4, 10)
    train(second, 4, 10)
    for a, b in zip(*(sorted((tmp_path / x).glob("*.safetensors")) for x in "ab"), strict=True):
        assert a.name == b.name
        assert a.read_bytes() == b.read_bytes()


def test_metadata_is_one_key_of_sorted_json(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.05, snapshots=tmp_path)
    train(ema, 1, 1)
    raw = ema.snapshot()[0].path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    text = header["__metadata__"]["posthoc_ema"]
    data = json.loads(text)
    assert list(data) == sorted(data)
    assert data["format_version"] == 1
    assert data["t"] == 1
    assert data["profile"]["sigma_rel"] == 0.05


def test_classical_tracks_are_stored_too(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=(0.1, Exponential(halflife=3)), snapshots=tmp_path, every=3)
    train(ema, 1, 9)
    assert {s.profile for s in SnapshotStore(tmp_path).list()} == {
        PowerFunction(0.1),
        Exponential(3),
    }
    result = reconstruct(tmp_path, target=Exponential(halflife=3))
    np.testing.assert_array_equal(result.params["w"], ema.average(Exponential(3))["w"])


# Deleting and verifying -----------------------------------------------------------------------


def test_deleting_frees_what_it_says(tmp_path: Path) -> None:
    run = record(tmp_path / "ema")
    store = SnapshotStore(run.folder)
    doomed = [s for s in store.list() if s.t % 24]
    size = sum(s.path.stat().st_size for s in doomed)
    assert store.delete(doomed) == size
    assert times(run.folder) == [24, 48, 72, 96]
    reconstruct(store, 0.07)


def test_only_snapshots_of_the_folder_are_deleted(tmp_path: Path) -> None:
    first, second = record(tmp_path / "a"), record(tmp_path / "b")
    with pytest.raises(SnapshotError, match="is not in"):
        SnapshotStore(first.folder).delete(SnapshotStore(second.folder).list()[:1])
    assert len(SnapshotStore(second.folder).list()) == 16


def test_verify_reads_every_byte(tmp_path: Path) -> None:
    run = record(tmp_path / "ema", steps=24, every=12)
    read: list[int] = []
    store = SnapshotStore(run.folder)
    assert store.verify(read.append) == store.list()
    data = sum(entry.nbytes for s in store.list() for entry in s.entries.values())
    assert sum(read) == data


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    # Headers are remembered; a store that is kept must notice what others do.
    run = record(tmp_path / "ema", steps=24, every=12)
    store = SnapshotStore(run.folder)
    first = store.list()[0]
    other = record(tmp_path / "other", steps=24, every=12, seed=1)
    shutil.copy(SnapshotStore(other.folder).list()[0].path, first.path)
    with pytest.raises(ForeignSnapshotError, match="different runs"):
        store.list()


# Resuming ------------------------------------------------------------------------------------


def test_the_abandoned_future_is_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "ema"
    ema = EMA(sigma_rel=(0.05, 0.1), snapshots=folder, every=2)
    train(ema, 1, 5)
    checkpoint = ema.state_dict()
    train(ema, 6, 11)
    future = {s.path.name: s.path.read_bytes() for s in SnapshotStore(folder).list() if s.t > 5}

    resumed = EMA(sigma_rel=(0.05, 0.1), snapshots=folder, every=2)
    resumed.load_state_dict(checkpoint)
    assert times(folder) == [2, 4, 6, 8, 10], "nothing happens before the first update"
    resumed.update(weights(600))
    assert times(folder) == [2, 4, 6]
    train(resumed, 7, 8)
    assert times(folder) == [2, 4, 6, 8]
    [aside] = (folder / "abandoned").iterdir()
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == future
    # Set aside, not lost: the folder is a store of its own.
    assert times(aside) == [6, 8, 10]
    SnapshotStore(aside).verify()
    reconstruct(aside, 0.07)
    # Nothing of it is in what is reconstructed now.
    last = SnapshotStore(folder).list()[-1]
    np.testing.assert_array_equal(resumed.average(0.1)["w"], last.read("w"))


def test_resuming_again_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "ema"
    ema = EMA(sigma_rel=0.1, snapshots=folder, every=1)
    train(ema, 1, 2)
    checkpoint = ema.state_dict()
    for attempt in range(4):
        train(ema, 3, 4 + attempt)
        ema = EMA(sigma_rel=0.1, snapshots=folder, every=1)
        ema.load_state_dict(checkpoint)
    ema.update(weights(3))
    asides = sorted((folder / "abandoned").iterdir())
    assert [len(list(aside.iterdir())) for aside in asides] == [2, 3, 4, 5]
    assert times(folder) == [1, 2, 3]
    shutil.rmtree(asides[0])  # a user makes room; the next must still find a name
    train(ema, 4, 6)
    ema = EMA(sigma_rel=0.1, snapshots=folder, every=1)
    ema.load_state_dict(checkpoint)
    ema.update(weights(3))
    assert len(list((folder / "abandoned").iterdir())) == 4


def test_resuming_where_nothing_was_lost_sets_nothing_aside(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, every=2)
    train(ema, 1, 4)
    resumed = EMA(sigma_rel=0.1, snapshots=tmp_path, every=2)
    resumed.load_state_dict(ema.state_dict())
    train(resumed, 5, 6)
    assert times(tmp_path) == [2, 4, 6]
    assert not (tmp_path / "abandoned").exists()


def test_resuming_from_before_the_first_update(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, every=1)
    checkpoint = ema.state_dict()
    train(ema, 1, 3)
    resumed = EMA(sigma_rel=0.1, snapshots=tmp_path, every=1)
    resumed.load_state_dict(checkpoint)
    resumed.update(weights(1))
    assert times(tmp_path) == [1]
    assert times(next((tmp_path / "abandoned").iterdir())) == [1, 2, 3]


def test_resuming_in_the_same_process_sets_aside_too(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, every=1)
    train(ema, 1, 2)
    checkpoint = ema.state_dict()
    train(ema, 3, 4)
    ema.load_state_dict(checkpoint)
    ema.update(weights(30))
    assert times(tmp_path) == [1, 2, 3]


def test_resuming_with_every_process_crash_between_tracks(tmp_path: Path) -> None:
    # One track of t=4 was written, then the machine stopped; the checkpoint is of t=3.
    ema = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path, every=2)
    train(ema, 1, 3)
    checkpoint = ema.state_dict()
    train(ema, 4, 4)
    store = SnapshotStore(tmp_path)
    store.delete(store.list()[-1:])
    resumed = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path, every=2)
    resumed.load_state_dict(checkpoint)
    train(resumed, 4, 4)
    assert [(s.t, s.profile.sigma_rel) for s in store.list()] == [
        (2, 0.05), (2, 0.1), (4, 0.05), (4, 0.1),
    ]  # fmt: skip


def test_a_new_run_does_not_mix_into_an_old_folder(tmp_path: Path) -> None:
    train(EMA(sigma_rel=0.1, snapshots=tmp_path, every=2), 1, 4)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    fresh = EMA(sigma_rel=0.1, snapshots=tmp_path, every=2)
    expected = r"belongs to another run.*EMA\.load_state_dict before the first update; for a new"
    with pytest.raises(ForeignSnapshotError, match=expected):
        fresh.update(weights(1))  # at once, not when hours of training are done
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before


# While another process works in the folder ----------------------------------------------------


def test_reading_while_another_thread_writes(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path, every=1)
    train(ema, 1, 2)
    failures: list[BaseException] = []

    def write() -> None:
        try:
            train(ema, 3, 40)
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while writer.is_alive():
        snapshots = SnapshotStore(tmp_path).verify()
        seen.append(len(snapshots))
        reconstruct(tmp_path, 0.07)
    writer.join()
    assert failures == []
    assert seen == sorted(seen)
    assert len(SnapshotStore(tmp_path).list()) == 80


def test_a_file_that_vanishes_while_the_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pruned, or set aside by a resumed run, between listing and opening.
    run = record(tmp_path / "ema", steps=24, every=6)
    from posthoc_ema import Snapshot

    original = Snapshot.open
    doomed = SnapshotStore(run.folder).list()[2].path

    def open_late(path: Any) -> Snapshot:
        if path == doomed:
            doomed.unlink(missing_ok=True)
        return original(path)

    monkeypatch.setattr(Snapshot, "open", staticmethod(open_late))
    assert len(SnapshotStore(run.folder).list()) == 7


def test_stores_show_their_folder(tmp_path: Path) -> None:
    assert repr(SnapshotStore("run/ema")) == "SnapshotStore('run/ema')"
    assert SnapshotStore(str(tmp_path)).path == tmp_path


def test_a_module_on_its_way_to_disk_is_not_copied_as_a_whole(tmp_path: Path) -> None:
    import tracemalloc

    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, encoding="float16")
    model = {f"w{k}": np.zeros(1_000_000, np.float32) for k in range(20)}
    ema.update(model)
    ema.update(model)
    tracemalloc.start()
    ema.snapshot()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 80 MB of averages; a chunk of a million values takes 4 MB in each of a few buffers.
    assert peak < 40e6


def test_torch_averages_stream_too(tmp_path: Path) -> None:
    net = {"a": torch.zeros(3_000_000), "t": torch.zeros(1000, 1500).t()}
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path)
    ema.update(net)
    [snapshot] = ema.snapshot()
    assert snapshot.nbytes > 17_000_000
    snapshot.verify()
