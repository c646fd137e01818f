"""Snapshots that several processes write together: read as if one had written them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import assert_equal
from ranks import perturb, run_ranks, sharded_model, small_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from posthoc_ema import (
    EMA,
    CorruptSnapshotError,
    ForeignSnapshotError,
    NonFiniteError,
    Snapshot,
    SnapshotStore,
    SnapshotWriteError,
    convert,
    prune,
    reconstruct,
)

SIGMA = (0.05, 0.1)


def tracker(folder: Path, **options: Any) -> EMA:
    return EMA(sigma_rel=SIGMA, snapshots=folder, **{"every": 2, **options})


def train(model: nn.Module, ema: EMA, start: int, stop: int) -> None:
    for step in range(start, stop):
        perturb(model, step)
        ema.update(model)


def one_process(folder: Path, stop: int, **options: Any) -> None:
    """The same run as those of several."""
    train(small_model(), tracker(folder, **options), 0, stop)


def assert_same_snapshots(folder: Path, expected: Path) -> None:
    """Raise unless the folders hold the same weights, to the bit, as far as readers can tell."""
    found, wanted = SnapshotStore(folder).verify(), SnapshotStore(expected).verify()
    assert [(s.t, s.profile) for s in found] == [(s.t, s.profile) for s in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert list(a.averages.items()) == list(b.averages.items())
        assert {n: e.shape for n, e in a.entries.items()} == {
            n: e.shape for n, e in b.entries.items()
        }
        assert {n: e.dtype for n, e in a.entries.items()} == {
            n: e.dtype for n, e in b.entries.items()
        }
        assert a.aliases == b.aliases
        for name in b.entries:
            assert_equal(a.read(name), b.read(name))
        for key, value in b.statistics.items():
            # Sums of the same numbers in another order.
            np.testing.assert_allclose(a.statistics[key], value, rtol=1e-6)


# What several processes write -----------------------------------------------------------------


def write(rank: int, number: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (number,))
    for encoding in ("float32", "float16"):
        model = sharded_model(mesh)
        with torch.no_grad():
            model[2].bias.to_local()[:1].mul_(1e6)  # too large for float16 on some ranks only
        train(model, tracker(folder / encoding, encoding=encoding), 0, 7)


@pytest.mark.parametrize("number", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_snapshots_equal_those_of_one_process(tmp_path: Path, number: int) -> None:
    """Five and three rows among two or four: on four, some hold nothing of a tensor."""
    run_ranks(number, write, tmp_path)
    for encoding in ("float32", "float16"):
        model = small_model()
        with torch.no_grad():
            cut = model[2].bias.chunk(number)
            for piece in cut:
                piece[:1].mul_(1e6)
        train(model, tracker(tmp_path / "one", encoding=encoding), 0, 7)
        assert_same_snapshots(tmp_path / encoding, tmp_path / "one")
        parts = list((tmp_path / encoding / "parts").iterdir())
        assert len(parts) == 6 * min(number, 3)  # the fourth holds nothing at all
        ours = reconstruct(tmp_path / encoding, sigma_rel=[0.07, 0.05])
        theirs = reconstruct(tmp_path / "one", sigma_rel=[0.07, 0.05])
        for a, b in zip(ours, theirs, strict=True):
            assert list(a.state_dict()) == list(b.state_dict())
            for name, value in b.state_dict().items():
                torch.testing.assert_close(a.state_dict()[name], value, rtol=1e-6, atol=1e-6)
        for path in (tmp_path / "one").glob("*.safetensors"):
            path.unlink()


def write_on_meshes(rank: int, number: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    train(sharded_model(mesh), tracker(folder / "hsdp"), 0, 3)

    value = torch.arange(35.0).reshape(5, 7)
    model = {
        "both": distribute_tensor(value, mesh, [Shard(0), Shard(1)]),
        "columns": distribute_tensor(value, mesh, [Shard(1), Shard(1)]),
        "complex": distribute_tensor(value * (1 + 2j), mesh["shard"], [Shard(0)]),
        "double": distribute_tensor(value.double(), mesh["shard"], [Shard(1)]),
        "integers": distribute_tensor(value.long(), mesh["shard"], [Shard(0)]),
        "none": distribute_tensor(torch.ones(0, 3), mesh["shard"], [Shard(0)]),
        "plain": torch.tensor(3.0),
    }
    ema = tracker(folder / "mapping")
    ema.update(model)
    written = ema.snapshot()
    assert [s.path.name for s in written] == [s.path.name for s in ema.store.list()]
    assert ema.snapshot() == []


def test_other_meshes_and_types(tmp_path: Path) -> None:
    run_ranks(4, write_on_meshes, tmp_path)
    one_process(tmp_path / "one", 3)
    assert_same_snapshots(tmp_path / "hsdp", tmp_path / "one")
    assert len(list((tmp_path / "hsdp" / "parts").iterdir())) == 2 * 2  # replicas write nothing

    value = torch.arange(35.0).reshape(5, 7)
    ema = tracker(tmp_path / "one mapping")
    ema.update(
        {
            "both": value, "columns": value, "complex": value * (1 + 2j), "double": value.double(),
            "integers": value.long(), "none": torch.ones(0, 3), "plain": torch.tensor(3.0),
        }
    )  # fmt: skip
    ema.snapshot()
    assert_same_snapshots(tmp_path / "mapping", tmp_path / "one mapping")
    weights = reconstruct(tmp_path / "mapping", sigma_rel=0.05).state_dict()
    assert torch.equal(weights["complex"], value * (1 + 2j))
    assert torch.equal(weights["integers"], value.long())


def write_alike(rank: int, number: int, folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(small_model())
    ema = tracker(folder / "ddp")
    train(model.module, ema, 0, 1)
    for step in range(1, 5):
        perturb(model.module, step)
        ema.update(model)
    assert len(ema.snapshot()) == (0 if rank else 2)
    # A common checkpoint keeps the state of whichever process: the folder must know it.
    ids: list[Any] = [None] * number
    torch.distributed.all_gather_object(ids, ema.state_dict()["run_id"])
    assert len(set(ids)) == 1
    other = tracker(folder / "other")
    other.update(model)
    assert other.state_dict()["run_id"] != ids[0]
    with pytest.raises(ValueError, match="'delta8' is not for sharded weights; use float32"):
        tracker(folder / "no", encoding="delta8").update(
            sharded_model(init_device_mesh("cpu", (number,)))
        )


def test_of_whole_models_the_first_process_writes(tmp_path: Path) -> None:
    run_ranks(2, write_alike, tmp_path)
    one_process(tmp_path / "one", 5, every=1)
    SnapshotStore(tmp_path / "one").delete(
        s for s in SnapshotStore(tmp_path / "one").list() if s.t in (1, 3)
    )
    assert_same_snapshots(tmp_path / "ddp", tmp_path / "one")
    assert not (tmp_path / "ddp" / "parts").exists()


# What goes wrong --------------------------------------------------------------------------------


def die(rank: int, number: int, folder: Path) -> None:
    model = sharded_model(init_device_mesh("cpu", (number,)))
    ema = tracker(folder / "run")
    train(model, ema, 0, 3)
    if rank == 1:
        write_part = SnapshotStore.write_part

        def killed(*args: Any, **options: Any) -> Any:
            write_part(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        SnapshotStore.write_part = killed  # type: ignore[method-assign]
    perturb(model, 3)
    with pytest.raises(SnapshotWriteError, match="another process of the group failed or was kil"):
        ema.update(model)


def test_a_killed_process_leaves_nothing_visible(tmp_path: Path) -> None:
    run_ranks(3, die, tmp_path, killed=1)
    store = SnapshotStore(tmp_path / "run")
    assert [s.t for s in store.verify()] == [2, 2]
    leftovers = {p.name for p in (tmp_path / "run" / "parts").iterdir() if "0004" in p.name}
    assert leftovers

    # The next run of the folder, in one process, removes them.
    model, ema = small_model(), tracker(tmp_path / "run")
    train(model, EMA(sigma_rel=SIGMA), 0, 2)
    whole = EMA(sigma_rel=SIGMA)
    train(small_model(), whole, 0, 2)
    ema.load_state_dict({**whole.state_dict(), "run_id": store.list()[0].run.run_id})
    train(model, ema, 2, 6)
    assert not {p.name for p in (tmp_path / "run" / "parts").iterdir()} & leftovers
    one_process(tmp_path / "one", 6)
    assert_same_snapshots(tmp_path / "run", tmp_path / "one")


def fail(rank: int, number: int, folder: Path) -> None:
    model = sharded_model(init_device_mesh("cpu", (number,)))
    ema = tracker(folder / "run")
    train(model, ema, 0, 3)
    write_part = SnapshotStore.write_part
    if rank == 1:

        def full(*args: Any, **options: Any) -> Any:
            raise SnapshotWriteError(28, "no space left")

        SnapshotStore.write_part = full  # type: ignore[method-assign]
    perturb(model, 3)
    with pytest.raises(SnapshotWriteError, match="no space left") as caught:
        ema.update(model)
    assert getattr(caught.value, "__notes__", []) == ([] if rank == 1 else ["(raised on rank 1)"])
    assert ema.t == 4
    SnapshotStore.write_part = write_part  # type: ignore[method-assign]
    train(model, ema, 4, 5)  # tries again

    other = tracker(folder / "run")
    with pytest.raises(ForeignSnapshotError, match="belongs to another run"):
        other.update(model)

    # One bad number on one process is seen by all.
    if rank == 1:
        with torch.no_grad():
            model[0].weight.to_local()[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the average of '0\.weight' holds NaN"):
        ema.update(model)

    # Other tensors in one of them.
    weight = sharded_model(init_device_mesh("cpu", (number,)))[0].weight
    names = {"w": weight, f"own{rank}": torch.ones(2)}
    with pytest.raises(ValueError, match="process 1 of the group tracks other tensors"):
        tracker(folder / "other", every=1).update(names)


def test_an_error_of_one_process_is_one_of_all(tmp_path: Path) -> None:
    run_ranks(2, fail, tmp_path)
    assert [s.t for s in SnapshotStore(tmp_path / "run").verify()] == [2, 2, 5, 5]
    with pytest.raises(ValueError, match="holds no snapshots"):
        SnapshotStore(tmp_path / "other").list()


def write_in_background(rank: int, number: int, folder: Path) -> None:
    model = sharded_model(init_device_mesh("cpu", (number,)))
    ema = tracker(folder / "run", background=True)
    write_part = SnapshotStore.write_part
    train(model, ema, 0, 5)
    ema.close()
    if rank == 1:

        def full(*args: Any, **options: Any) -> Any:
            raise SnapshotWriteError(28, "no space left")

        SnapshotStore.write_part = full  # type: ignore[method-assign]
    train(model, ema, 5, 7)  # the snapshot at 6 fails, which no step in between says
    perturb(model, 7)
    with pytest.raises(SnapshotWriteError, match="no space left"):
        ema.update(model)  # but, in all processes, that at which the next one falls due
    SnapshotStore.write_part = write_part  # type: ignore[method-assign]
    train(model, ema, 8, 9)
    ema.close()


def test_several_processes_in_the_background(tmp_path: Path) -> None:
    run_ranks(2, write_in_background, tmp_path)
    whole = SnapshotStore(tmp_path / "run").verify()
    assert [s.t for s in whole] == [2, 2, 4, 4, 9, 9]
    model, ema = small_model(), EMA(sigma_rel=SIGMA)
    train(model, ema, 0, 9)
    for snapshot in whole[-2:]:
        for name, value in ema.average(snapshot.profile).items():
            assert_equal(snapshot.read(name), value.numpy())


# On another number of processes -----------------------------------------------------------------


def begin(rank: int, number: int, folder: Path) -> None:
    model = sharded_model(init_device_mesh("cpu", (number,)))
    ema = tracker(folder / "run")
    train(model, ema, 0, 5)
    dcp.save({"ema": ema}, checkpoint_id=folder / "checkpoint")
    train(model, ema, 5, 9)  # a future that will be given up


def resume(rank: int, number: int, folder: Path) -> None:
    model = sharded_model(init_device_mesh("cpu", (number,)))
    for step in range(5):
        perturb(model, step)
    ema = tracker(folder / "run")
    ema.bind(model)
    dcp.load({"ema": ema}, checkpoint_id=folder / "checkpoint")
    train(model, ema, 5, 7)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, resumed by three, and ended by one."""
    folder = tmp_path_factory.mktemp("resumed")
    run_ranks(2, begin, folder)
    run_ranks(3, resume, folder)
    return folder


def test_snapshots_of_all_kinds_make_one_run(resumed: Path, tmp_path: Path) -> None:
    one_process(tmp_path / "one", 7)
    assert_same_snapshots(resumed / "run", tmp_path / "one")
    names = {p.stem.split("-", 1)[1] for p in (resumed / "run" / "parts").iterdir()}
    assert names == {f"{k:05d}-of-{n:05d}" for n in (2, 3) for k in range(1, n + 1)}
    (aside,) = (resumed / "run" / "abandoned").iterdir()
    assert {s.t for s in SnapshotStore(aside).verify()} == {6, 8}


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder / "run", target / "run")
    return target / "run"


def test_converting_and_pruning(resumed: Path, tmp_path: Path) -> None:
    run = copied(resumed, tmp_path)
    convert(run, tmp_path / "small", "delta16")
    whole = SnapshotStore(run).list()
    for a, b in zip(SnapshotStore(tmp_path / "small").verify(), whole, strict=True):
        for name in b.averages:
            # Half a step of the narrowest residuals, 12 bits, at the size of these weights.
            np.testing.assert_allclose(a.read(name), b.read(name), atol=1e-2)
    total = sum(p.stat().st_size for p in run.rglob("*.safetensors") if "abandoned" not in str(p))
    assert sum(s.nbytes for s in whole) == total
    pruned = prune(run, SIGMA, keep=1, delete=True)
    assert [s.t for s in SnapshotStore(run).verify()] == [6, 6]
    assert {len(s.files) for s in pruned.kept} == {4}
    assert len(list((run / "parts").iterdir())) == 6
    left = sum(p.stat().st_size for p in run.rglob("*.safetensors") if "abandoned" not in str(p))
    assert pruned.bytes_freed == total - left


def test_moving_aside_survives_a_kill(
    resumed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(resumed, tmp_path)
    store = SnapshotStore(run)
    before = {p.name for s in store.list() for p in s.files}
    replace, moves = os.replace, 0

    def killed(source: Any, target: Any) -> None:
        nonlocal moves
        moves += "abandoned" in str(target)
        if moves == 3:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.claim(store.list()[0].run, 2)
    monkeypatch.undo()
    kept = SnapshotStore(run).verify()
    assert [s.t for s in kept] == [2, 2]
    aside = max((run / "abandoned").iterdir())
    moved = SnapshotStore(aside).verify()
    assert {p.name for s in (*kept, *moved) for p in s.files} == before


# Damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_a_flipped_byte_is_found(resumed: Path, tmp_path: Path, number: int) -> None:
    run = copied(resumed, tmp_path)
    snapshot = SnapshotStore(run).list()[-1]
    path = snapshot.files[1 + number]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for check in (snapshot.verify, lambda: reconstruct(run, sigma_rel=0.07)):
        with pytest.raises(CorruptSnapshotError, match=f"{path.name} is damaged: the digest of"):
            check()


def test_missing_and_foreign_parts(resumed: Path, tmp_path: Path) -> None:
    run = copied(resumed, tmp_path)
    first, second = SnapshotStore(run).list()[0].files[1:3]
    other = SnapshotStore(run).list()[2].files[1]

    content = first.read_bytes()
    first.write_bytes(content[:-1])
    with pytest.raises(CorruptSnapshotError, match=rf"needs .*{first.name}, which has \d+ bytes"):
        SnapshotStore(run).list()
    first.unlink()
    with pytest.raises(CorruptSnapshotError, match=f"needs .*{first.name}, which is missing"):
        SnapshotStore(run).list()

    assert other.stat().st_size == len(content)  # another time: a file as good as this one
    first.write_bytes(other.read_bytes())
    with pytest.raises(CorruptSnapshotError, match="is not the file that"):
        SnapshotStore(run).list()[0].verify()

    first.write_bytes(content)
    SnapshotStore(run).verify()
    stray = run / "stray.safetensors"
    stray.write_bytes(second.read_bytes())
    with pytest.raises(ForeignSnapshotError, match="is the part of a snapshot that one process"):
        Snapshot.open(stray)
