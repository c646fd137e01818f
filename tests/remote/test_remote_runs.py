"""Runs whose snapshots lie elsewhere: in memory and on a server; the same as in a local folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from helpers import assert_equal

from posthoc_ema import (
    EMA,
    ForeignSnapshotError,
    SnapshotError,
    SnapshotStore,
    convert,
    find_best,
    plan,
    predict_error,
    prune,
    reconstruct,
    sweep,
)
from tests.integration.commands import invoke, invoke_json
from tests.integration.small_run import flip_a_byte, write_run


@pytest.fixture(scope="module", params=["float32", "delta8"])
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a local folder, in each kind of encoding."""
    folder = tmp_path_factory.mktemp("local") / request.param
    return write_run(folder, every=80, encoding=request.param)


def copy_to(folder: Path, url: str) -> str:
    """The files of a folder, elsewhere."""
    fs, key = fsspec.core.url_to_fs(url)
    for path in folder.glob("*.safetensors"):
        fs.pipe_file(f"{key}/{path.name}", path.read_bytes())
    return url


def files(url: str) -> dict[str, bytes]:
    """All that lies in a folder, and in its folders."""
    fs, key = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name.removeprefix(f"{key}/"): fs.cat_file(name) for name in fs.find(key)}


def weights(step: float) -> dict[str, Any]:
    return {"w": np.full(500, step, np.float64), "n": np.array([int(step)])}


def train(ema: EMA, first: int, last: int) -> None:
    for step in range(first, last + 1):
        ema.update(weights(step))


def times(url: str) -> list[float]:
    return sorted({s.t for s in SnapshotStore(url).list()})


def assert_same(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_equal(found[name], wanted[name])


# Reading ---------------------------------------------------------------------------------------


def test_everything_reads_the_same(local: Path, url: str) -> None:
    copy_to(local, url)
    store, expected = SnapshotStore(url), SnapshotStore(local)
    assert [s.path.name for s in store.list()] == [s.path.name for s in expected.list()]
    assert sum(s.nbytes for s in store.verify()) == sum(s.nbytes for s in expected.list())
    for a, b in zip(store.list(), expected.list(), strict=True):
        assert_same({n: a.read(n) for n in a.entries}, {n: b.read(n) for n in b.entries})
    for t, names in ((None, None), (170, "*bias")):
        wanted = reconstruct(local, [0.07, 0.2], t=t, names=names)
        found = reconstruct(url, [0.07, 0.2], t=t, names=names)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a.state_dict(), b.state_dict())
            assert a.predicted_error == b.predicted_error
    by_pattern = {"*bias": 0.2, "*": 0.05}
    assert_same(
        reconstruct(url, by_pattern).state_dict(), reconstruct(local, by_pattern).state_dict()
    )
    assert_equal(predict_error(url, [0.05, 0.1]), predict_error(local, [0.05, 0.1]))
    assert len(files(url)) == len(list(local.glob("*.safetensors"))), "reading writes nothing"


def test_a_metric_over_lengths(memory: str, tmp_path: Path) -> None:
    local = write_run(tmp_path, every=80)
    copy_to(local, memory)

    def metric(weights: Any) -> float:
        return float(np.square(weights.params["net.bias"]).mean())

    lengths = [0.05, 0.1, 0.2]
    assert dict(sweep(memory, lengths, metric)) == dict(sweep(local, lengths, metric))
    cache = "memory://runs-cache/metric.json"
    found = find_best(memory, metric, budget=4, cache=cache)
    assert dict(found) == dict(find_best(memory, metric, budget=4, cache=cache))
    assert dict(found) == dict(find_best(local, metric, budget=4))
    plans = [plan(5, (0.05, 0.2), like=place, t_end=400).worst_error for place in (memory, local)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("out", ["one.safetensors", "one.pt", "folder"])
def test_results_go_there_too(local: Path, url: str, tmp_path: Path, out: str) -> None:
    copy_to(local, f"{url}/ema")
    lengths: Any = [0.07, 0.2] if out == "folder" else 0.07
    found: Any = reconstruct(f"{url}/ema", lengths, out=f"{url}/results/{out}")
    wanted: Any = reconstruct(local, lengths, out=tmp_path / out)
    for a, b in zip(np.atleast_1d(found), np.atleast_1d(wanted), strict=True):
        assert_same(a.state_dict(), b.state_dict())
        assert [p.name for p in a.files] == [p.name for p in b.files]
        if out != "one.pt":
            assert a.files[0].fetch(0, 1 << 20) == b.files[0].read_bytes()
    with pytest.raises(FileExistsError, match="delete it or give another"):
        reconstruct(f"{url}/ema", lengths, out=f"{url}/results/{out}", overwrite=False)
    with pytest.raises(SnapshotError, match="lies in the snapshot folder"):
        reconstruct(f"{url}/ema", [0.07, 0.2], out=f"{url}/ema")


def test_results_in_shards_and_parts(
    local: Path, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_to(local, f"{memory}/ema")
    parts = [reconstruct(f"{memory}/ema", 0.07, out=f"{memory}/parts", part=(k, 2)) for k in (1, 2)]
    assert "parts/model.safetensors.index.json" in files(memory)
    monkeypatch.setattr(sys.modules["posthoc_ema.reconstruct"], "MAX_SHARD_BYTES", 2000)
    reconstruct(f"{memory}/ema", 0.07, out=f"{memory}/shards")
    reconstruct(local, 0.07, out=tmp_path)
    there = {n.removeprefix("shards/"): d for n, d in files(memory).items() if "shards/" in n}
    assert there == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(parts[0].files) == 1


def test_an_empty_place(url: str, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"://.*runs does not exist; give the folder that"):
        SnapshotStore(url).list()
    EMA(snapshots=url).update(weights(1))
    assert files(url) == {}, "nothing is written before the first snapshot"


# Writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_a_run_is_written_resumed_and_its_lost_future_set_aside(url: str, background: bool) -> None:
    def tracker() -> EMA:
        return EMA(sigma_rel=(0.05, 0.1), snapshots=url, every=2, background=background)

    ema = tracker()
    train(ema, 1, 5)
    state = ema.state_dict()
    train(ema, 6, 10)
    ema.close()
    before = files(url)
    assert times(url) == [2, 4, 6, 8, 10]
    assert all(name.endswith(".safetensors") for name in before), "nothing else is left there"
    resumed = tracker()
    resumed.load_state_dict(state)
    train(resumed, 6, 7)
    resumed.close()
    after = files(url)
    assert times(url) == [2, 4, 6]
    aside = {k.rpartition("/")[2]: v for k, v in after.items() if k.startswith("abandoned/001-")}
    assert aside == {k: v for k, v in before.items() if int(k[2:14]) > 5}, "as they were"
    train(resumed, 8, 10)
    resumed.close()
    assert files(url) == {**before, **{k: v for k, v in after.items() if k.startswith("ab")}}
    SnapshotStore(url).verify()


def test_another_run_is_refused(url: str) -> None:
    train(EMA(sigma_rel=0.1, snapshots=url, every=1), 1, 2)
    before = files(url)
    with pytest.raises(ForeignSnapshotError, match=r"://.*belongs to another run"):
        train(EMA(sigma_rel=0.1, snapshots=url, every=1), 1, 1)
    assert files(url) == before


def test_the_old_process_of_a_run_is_told(url: str) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=url, every=1)
    train(ema, 1, 1)
    old, new = (EMA(sigma_rel=0.1, snapshots=url, every=1) for _ in range(2))
    old.load_state_dict(ema.state_dict())
    new.load_state_dict(ema.state_dict())
    train(old, 2, 2)
    new.update({"w": np.full(500, -2.0), "n": np.array([2])})
    with pytest.raises(ForeignSnapshotError, match=r"t=0*2_.*two processes"):
        train(old, 3, 3)


@pytest.mark.parametrize(("place", "encoding"), [("memory", "delta8"), ("bucket", "float32")])
def test_pruned_and_thinned(
    request: pytest.FixtureRequest, tmp_path: Path, place: str, encoding: str
) -> None:
    url = request.getfixturevalue(place)
    schedule = plan(4, (0.05, 0.2), tracks=(0.05, 0.1), every=40).schedule
    folders: list[Any] = [url, tmp_path / "ema"]
    for folder in folders:
        write_run(folder, every=None, schedule=schedule, encoding=encoding)
        prune(folder, [0.07], keep=2, delete=True)
    found, wanted = (SnapshotStore(folder).verify() for folder in folders)
    assert [(s.t, s.profile, s.rewrites) for s in found] == [
        (s.t, s.profile, s.rewrites) for s in wanted
    ]
    for a, b in zip(found, wanted, strict=True):
        assert_same({n: a.read(n) for n in a.entries}, {n: b.read(n) for n in b.entries})
    # What was replaced, and the refinements of what is not the newest, are gone.
    assert len(files(url)) == sum(len(s.files) for s in found)


def test_converted_there_and_back(local: Path, memory: str, tmp_path: Path) -> None:
    url = memory
    copy_to(local, f"{url}/ema")
    convert(f"{url}/ema", f"{url}/small", "delta6")
    convert(local, tmp_path / "small", "delta6")
    assert_same(
        reconstruct(f"{url}/small", 0.07).state_dict(),
        reconstruct(tmp_path / "small", 0.07).state_dict(),
    )
    convert(f"{url}/small", tmp_path / "back", "float32")
    SnapshotStore(tmp_path / "back").verify()
    with pytest.raises(ValueError, match="out must be another folder than"):
        convert(f"{url}/ema", f"{url}/ema/", "delta6")


def test_parts_of_several_processes(url: str, tmp_path: Path) -> None:
    """What FSDP2 processes do, one after the other: the store does not know the difference."""
    folders: list[Any] = [url, tmp_path / "ema"]
    for folder in folders:
        for _ in write_parts(SnapshotStore(folder)):
            pass
    found, wanted = (SnapshotStore(folder).verify() for folder in folders)
    for a, b in zip(found, wanted, strict=True):
        assert_equal(a.read("w"), b.read("w"))
    assert_same(reconstruct(url, 0.1).params, reconstruct(tmp_path / "ema", 0.1).params)
    assert sorted(files(url))[0].startswith("parts/")
    store = SnapshotStore(url)
    store.claim(store.list()[0].run, 1)
    assert times(url) == [1]
    assert sum("abandoned/001-after-t=1/parts/" in name for name in files(url)) == 4
    store.delete(store.list())
    assert [name for name in files(url) if "abandoned" not in name] == []


def write_parts(store: SnapshotStore) -> Iterator[Any]:
    """Snapshots of two halves of a matrix."""
    from posthoc_ema import PowerFunction
    from posthoc_ema.parts_writing import Division, Holding
    from posthoc_ema.snapshot_file import AverageSource, PartOf, RunIdentity

    run, profile = RunIdentity("0" * 16, "steps", "numpy", 1), PowerFunction(0.1)
    rng = np.random.default_rng(0)
    for t in (1, 2, 3):
        whole = rng.standard_normal((6, 4)).astype(np.float32)
        sources = [
            AverageSource(
                "w", (6, 2), "F32", "F32",
                lambda half=whole[:, k : k + 2]: [half.reshape(-1)], PartOf((0, k), (6, 4)),
            )
            for k in (0, 2)
        ]  # fmt: skip
        store.check_new(run, t, profile)
        held = [Holding.of(store.path, [source], [], [("w", "F32")]) for source in sources]
        sizes = Division.of(held).sizes
        written = [
            store.write_part(run, t, profile, [source], [], "float32", sizes, number, 2)
            for number, source in enumerate(sources)
        ]
        yield written
        store.join(run, t, profile, [("w", "F32")], [], {}, "float32", written, sizes)  # type: ignore[arg-type]


# The command line ------------------------------------------------------------------------------


def test_commands_take_urls(bucket: str, tmp_path: Path) -> None:
    local = write_run(tmp_path / "ema", every=100)
    copy_to(local, f"{bucket}/ema")
    for command in ("list", "verify", "error"):
        found, wanted = (invoke_json(command, folder) for folder in (f"{bucket}/ema", str(local)))
        for answer in (found, wanted):
            answer.pop("folder", None)
        assert found == wanted
    out = f"{bucket}/averages"
    invoke("reconstruct", f"{bucket}/ema", "--sigma-rel", "0.05,0.07", "--out", out)
    assert sorted(files(out)) == ["sigma_rel=0.05.safetensors", "sigma_rel=0.07.safetensors"]
    invoke("reconstruct", f"{bucket}/ema", "--sigma-rel", "0.07", "--out", out, status=2)
    invoke("convert", f"{bucket}/ema", f"{bucket}/small", "--encoding", "delta8")
    invoke("prune", f"{bucket}/small", "--keep", "2", "--yes")
    assert len(times(f"{bucket}/small")) == 2
    invoke("plot", "error", f"{bucket}/ema", "--out", tmp_path / "plot.png")
    refused = invoke("plot", "error", f"{bucket}/ema", "--out", f"{bucket}/plot.png", status=2)
    assert "is a URL; give a local file" in refused.stderr
    nothing = invoke("list", f"{bucket}/nothing", status=2)
    assert "does not exist; give the folder" in nothing.stderr
    lost = invoke("list", "s3:/bucket", status=2)
    assert "lost a slash" in lost.stderr


def test_imported_there(bucket: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for step in (10, 20):
        save_file({"w": np.full(9, step, np.float32)}, tmp_path / f"step-{step}.safetensors")
    for _ in range(2):
        invoke("import", tmp_path, f"{bucket}/ema", "--profile", "raw")
    assert times(f"{bucket}/ema") == [10, 20]
    record = files(f"{bucket}/ema")[".imported.json"]
    assert len(json.loads(record)["files"]) == 2


# Damage ----------------------------------------------------------------------------------------


def test_damage_is_found(local: Path, memory: str, tmp_path: Path) -> None:
    for path in local.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = sorted(tmp_path.iterdir())[0]
    flip_a_byte(victim)
    copy_to(tmp_path, memory)
    with pytest.raises(SnapshotError, match=rf"{memory}/{victim.name} is damaged"):
        reconstruct(memory, 0.07)
    with pytest.raises(SnapshotError, match=rf"{memory}/{victim.name} is damaged"):
        SnapshotStore(memory).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-3], r"it has \d+ bytes, expected \d+"),
        (lambda data: data + b"123", r"it has \d+ bytes, expected \d+"),
        (lambda data: data[:100], "its header would have"),
        (lambda data: b"", "its header would have"),
        (lambda data: data.replace(b'"F32"', b'"F16"', 1), "the table of tensors is wrong about"),
        (lambda data: data.replace(b"[33,30]", b"[30,30]", 1), "the table of tensors is wrong"),
        (lambda data: data[:8] + b"x" + data[9:], "is not a complete safetensors file"),
        (lambda data: data.replace(b'"I64"', b'"I65"', 1), "its header does not describe tensors"),
        (lambda data: data.replace(b"[33,30]", b"[33,3.]", 1), "is not a complete safetensors"),
        (lambda data: data.replace(b"[33,30]", b'"33,30"', 1), "does not describe tensors"),
        (lambda data: b"\2" + bytes(7) + b"[]", "its header does not describe tensors"),
        (lambda data: b"\2" + bytes(7) + b"{}" + data, r"it has \d+ bytes, expected 10"),
        (
            lambda data: b"\x16" + bytes(7) + b'{"__metadata__": null}',
            "but no snapshot of posthoc_ema",
        ),
    ],
)
def test_damaged_headers_are_found(memory: str, tmp_path: Path, change: Any, message: str) -> None:
    """The reference parser reads local files only: the same checks are made here."""
    store = SnapshotStore(write_run(tmp_path, every=320))
    path = Path(str(store.list()[0].path))
    path.write_bytes(change(path.read_bytes()))
    copy_to(tmp_path, memory)
    (problem,) = SnapshotStore(memory).scan()[1]
    assert path.name in str(problem)
    with pytest.raises(SnapshotError, match=message):
        raise problem
    (local_problem,) = SnapshotStore(tmp_path).scan()[1]
    assert type(problem) is type(local_problem)


# Processes -------------------------------------------------------------------------------------

AT_THE_END = """
import sys
import numpy as np
from posthoc_ema import EMA
ema = EMA(sigma_rel=0.1, snapshots=sys.argv[1], every=1, background=True)
for step in range(1, 4):
    ema.update({"w": np.full(100_000, float(step))})
"""


def test_the_last_snapshot_of_a_program_that_just_ends(bucket: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END, bucket], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert times(bucket) == [1, 2, 3]
