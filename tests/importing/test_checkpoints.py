"""Plain checkpoints: numbered, listed, sharded, nested, raw or averaged; and what writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_equal, run_python
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from posthoc_ema import (
    EMA,
    CorruptSnapshotError,
    Exponential,
    ForeignSnapshotError,
    NonFiniteError,
    PowerFunction,
    SnapshotError,
    SnapshotStore,
    Uniform,
    import_snapshots,
    reconstruct,
)

RAW = Uniform(1, relative=False)


def weights(t: float) -> dict[str, Any]:
    rng = np.random.default_rng(int(t))
    return {
        "b.weight": rng.normal(size=(30, 7)).astype(np.float32),
        "a.half": rng.normal(size=90).astype(np.float16),
        "d": rng.normal(size=5),
        "steps": np.array(int(t)),
    }


def tensors(t: float) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in weights(t).items()}


def assert_holds(snapshot: Any, expected: Any) -> None:
    assert {*snapshot.averages, *snapshot.copies} == set(expected)
    assert set(snapshot.copies) == {"steps"}
    for name, values in expected.items():
        assert_equal(snapshot.read(name), np.asarray(values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three raw checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    for t in (100, 200, 300):
        save_file(weights(t), folder / f"model-step={t}-loss0.37.safetensors")
    (folder / "log.txt").write_text("beside them")
    return folder


def test_numbered(folder: Path, tmp_path: Path) -> None:
    done = import_snapshots(folder, tmp_path / "ema", profile=RAW)
    assert [(t, profile) for _, t, profile in done.files] == [(t, RAW) for t in (100, 200, 300)]
    for snapshot in done.snapshots:
        assert_holds(snapshot, weights(snapshot.t))
        assert list(snapshot.averages)[-1] == "a.half"


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (lambda state, path: torch.save(state, path), "checkpoint_{}.pt"),
        (lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path), "{}.ckpt"),
        (lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
         "step{}_v2.pth"),
        (lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
         "{}.bin"),
        (lambda state, path: save_torch_file(state, path), "epoch2-step{}.safetensors"),
    ],
)  # fmt: skip
def test_files_of_all_kinds(tmp_path: Path, save: Any, name: str) -> None:
    (tmp_path / "run").mkdir()
    save(tensors(7), tmp_path / "run" / name.format(7))
    (snapshot,) = import_snapshots(tmp_path / "run", tmp_path / "ema", profile=RAW).snapshots
    assert snapshot.t == 7
    assert_holds(snapshot, weights(7))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_folders(tmp_path: Path, suffix: str) -> None:
    for t in (10, 20):
        folder = tmp_path / "run" / f"checkpoint-{t}"
        folder.mkdir(parents=True)
        state = tensors(t)
        shards = [{k: state[k]} for k in state]
        index = {}
        for number, shard in enumerate(shards):
            name = f"model-{number + 1:05d}-of-{len(shards):05d}{suffix}"
            (save_torch_file if suffix == ".safetensors" else torch.save)(shard, folder / name)
            index |= dict.fromkeys(shard, name)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"model{suffix}.index.json").write_text(text)
        torch.save({"state": {0: {"m": torch.ones(2)}}}, folder / "optimizer.pt")
    done = import_snapshots(tmp_path / "run", tmp_path / "ema", profile=Exponential(50))
    assert [path.name for path, _, _ in done.files] == ["checkpoint-10", "checkpoint-20"]
    for snapshot in done.snapshots:
        assert snapshot.profile == Exponential(50)
        assert_holds(snapshot, weights(snapshot.t))
    (tmp_path / "run" / "checkpoint-10" / f"model-00002-of-00004{suffix}").unlink()
    with pytest.raises(CorruptSnapshotError, match="which is not beside it"):
        import_snapshots(tmp_path / "run", tmp_path / "ema2", profile=RAW)


def test_tied_weights(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shared = torch.ones(4, 3)
    state = {"embed": shared, "head": shared, "part": shared[1:], "turned": shared.t()}
    torch.save(state, tmp_path / "run" / "1.pt")
    (snapshot,) = import_snapshots(tmp_path / "run", tmp_path / "ema", profile=RAW).snapshots
    assert snapshot.aliases == {"head": "embed"}
    assert list(snapshot.averages) == ["embed", "part", "turned"]


def test_listed(folder: Path, tmp_path: Path) -> None:
    """Profiles of all kinds; a table beside the files, or elsewhere."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    rows = [("exponential:beta=0.99", ""), ("", "0.1"), ("raw:step=4", "")]
    lines = ["file, t, profile, sigma_rel"]
    lines += [f"{n},{t},{p},{s}" for n, t, (p, s) in zip(names, (1000, 2000.5, 3e3), rows,
                                                        strict=True)]  # fmt: skip
    text = "\n".join(lines)
    (folder / "list.csv").write_text(text)
    (tmp_path / "elsewhere.csv").write_text("\ufeff" + text, encoding="utf-8")
    inside = import_snapshots(folder / "list.csv", tmp_path / "a", unit="images")
    outside = import_snapshots(folder, tmp_path / "b", csv=tmp_path / "elsewhere.csv")
    assert (inside.kind, inside.unit, outside.unit) == ("list", "images", "steps")
    for done in (inside, outside):
        assert [(t, p) for _, t, p in done.files] == [
            (1000, Exponential.from_beta(0.99)),
            (2000.5, PowerFunction(0.1)),
            (3000, Uniform(4, relative=False)),
        ]
        assert_holds(done.snapshots[1], weights(200))
        assert len(reconstruct(done.snapshots[0].path.parent, 0.2).params) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,t\nx,1", r"list\.csv lacks the column file"),
        ("file,t\nmodel-step=100-loss0.37.safetensors,1", "line 2: it does not say how"),
        ("file,t,profile\nmodel-step=100-loss0.37.safetensors,0,raw", "line 2: t must be a finite"),
        ("file,t,profile\nmodel-step=100-loss0.37.safetensors,x,raw", "line 2: could not convert"),
        ("file,t,profile\nmodel-step=100-loss0.37.safetensors,1,raws", "line 2: 'raws' is no prof"),
        ("file,t,profile\ngone.safetensors,1,raw", r"line 2: .*gone\.safetensors does not exist"),
        ("file,t,profile\nlog.txt,1,raw", r"log\.txt"),
    ],
)
def test_tables_that_do_not_say_it(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (folder / "list.csv").write_text(text)
    with pytest.raises(SnapshotError, match=message):
        import_snapshots(folder / "list.csv", tmp_path / "ema")
    assert not (tmp_path / "ema").exists() or not list((tmp_path / "ema").glob("*.safetensors"))


def test_several_sets_of_weights(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    both = {"model": tensors(1), "ema": tensors(2), "optimizer": {"state": {}}, "step": 1}
    torch.save({**both, "deep": {"inner": tensors(3)}}, tmp_path / "run" / "1.pt")
    with pytest.raises(
        SnapshotError, match=r"holds 3 sets of weights \(model, ema, deep\.inner\); say"
    ):
        import_snapshots(tmp_path / "run", tmp_path / "ema", profile=RAW)
    for key, seed in (("ema", 2), ("deep.inner", 3)):
        done = import_snapshots(tmp_path / "run", tmp_path / key, profile=RAW, key=key)
        assert_holds(done.snapshots[0], weights(seed))
    with pytest.raises(
        SnapshotError, match="at 'optimizer'; its sets of weights are model, ema, d"
    ):
        import_snapshots(tmp_path / "run", tmp_path / "x", profile=RAW, key="optimizer")


# Going on, and refusing -----------------------------------------------------------------------


def test_going_on(folder: Path, tmp_path: Path) -> None:
    first = import_snapshots(folder, tmp_path / "ema", profile=RAW, encoding="delta16")
    stamps = {s.path: s.path.stat().st_mtime_ns for s in first.snapshots}
    save_file(weights(400), folder / "model-step=400.safetensors")
    second = import_snapshots(folder, tmp_path / "ema", profile=RAW, encoding="delta16")
    assert (first.skipped, second.skipped) == (0, 3)
    assert len(second.snapshots) == 4
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert len({s.run.run_id for s in second.snapshots}) == 1


def test_a_kill_between_the_files(folder: Path, tmp_path: Path) -> None:
    """What was noted but not written is written; what was written is not written again."""
    done = import_snapshots(folder, tmp_path / "ema", profile=RAW)
    done.snapshots[1].path.unlink()
    again = import_snapshots(folder, tmp_path / "ema", profile=RAW)
    assert again.skipped == 2
    assert_holds(again.snapshots[1], weights(200))


def test_a_file_that_changed(folder: Path, tmp_path: Path) -> None:
    import_snapshots(folder, tmp_path / "ema", profile=RAW)
    save_file(weights(1), folder / "model-step=200-loss0.37.safetensors")
    with pytest.raises(ForeignSnapshotError, match="is not what was imported as t=200"):
        import_snapshots(folder, tmp_path / "ema", profile=RAW)


def test_folders_that_hold_something_else(folder: Path, tmp_path: Path) -> None:
    ema = EMA(snapshots=tmp_path / "ours", every=1)
    ema.update({"w": np.ones(3)})
    with pytest.raises(ForeignSnapshotError, match="holds snapshots that were not imported"):
        import_snapshots(folder, tmp_path / "ours", profile=RAW)
    with pytest.raises(SnapshotError, match="holds snapshots of this library already"):
        import_snapshots(tmp_path / "ours", tmp_path / "ema", profile=RAW)
    import_snapshots(folder, tmp_path / "ema", profile=RAW)
    with pytest.raises(ForeignSnapshotError, match="holds checkpoints snapshots in steps, these"):
        import_snapshots(folder, tmp_path / "ema", profile=RAW, unit="images")
    with pytest.raises(ValueError, match="out must be another folder"):
        import_snapshots(folder, folder, profile=RAW)
    (tmp_path / "ema" / ".imported.json").write_text("{")
    with pytest.raises(SnapshotError, match=r"\.imported\.json is damaged"):
        import_snapshots(folder, tmp_path / "ema", profile=RAW)


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    done = import_snapshots(folder, tmp_path / "ema", profile=RAW, dry_run=True)
    assert len(done.files) == 3
    assert done.snapshots == ()
    assert not (tmp_path / "ema").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_not_finite(tmp_path: Path, bad: float, dtype: Any) -> None:
    (tmp_path / "run").mkdir()
    save_file({"w": np.array([1, bad], dtype)}, tmp_path / "run" / "5.safetensors")
    with pytest.raises(NonFiniteError, match=r"'w' holds NaN or infinity in .*5\.safetensors"):
        import_snapshots(tmp_path / "run", tmp_path / "ema", profile=RAW)


@pytest.mark.parametrize(
    ("files", "options", "error", "message"),
    [
        ((), {}, SnapshotError, "is empty"),
        (("a.txt",), {}, SnapshotError, r"nothing that is understood; .*a\.txt"),
        (("5.safetensors",), {}, SnapshotError, "do not say how they average: give"),
        (("x.safetensors",), {"profile": RAW}, SnapshotError, "does not say its time"),
        (("a5.safetensors", "b5.safetensors"), {"profile": RAW}, SnapshotError, "both hold t=5"),
        (("5.safetensors",), {"kind": "edm2"}, SnapshotError, "no snapshots of kind edm2"),
        (("5.safetensors",), {"kind": "magic"}, ValueError, "kind must be one of edm2, ema-py"),
        (("5.safetensors",), {"kind": "list"}, ValueError, "needs csv="),
        (("5.safetensors",), {"encoding": "magic"}, ValueError, "encoding must be one of"),
        (("5.safetensors",), {"update_every": 0}, ValueError, "update_every must be at least 1"),
    ],
)  # fmt: skip
def test_misuse(tmp_path: Path, files: Any, options: Any, error: Any, message: str) -> None:
    (tmp_path / "run").mkdir()
    for name in files:
        save_file(weights(1), tmp_path / "run" / name)
    with pytest.raises(error, match=message):
        import_snapshots(tmp_path / "run", tmp_path / "ema", **options)
    with pytest.raises(SnapshotError, match="is no file or folder that exists"):
        import_snapshots(tmp_path / "gone", tmp_path / "ema")


def test_no_framework_is_needed(tmp_path: Path) -> None:
    """Neither for files of torch.save, nor for anything else."""
    (tmp_path / "run").mkdir()
    torch.save(tensors(1), tmp_path / "run" / "1.pt")
    code = (
        "import sys; from posthoc_ema import *\n"
        "import_snapshots('run', 'ema', profile=Uniform(1, relative=False))\n"
        "print(bool({'torch', 'jax'} & set(sys.modules)))"
    )
    assert run_python("-c", code, cwd=tmp_path).strip() == "False"
    assert_holds(SnapshotStore(tmp_path / "ema").list()[0], weights(1))


def test_bfloat16_and_float8(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    state = {"b": torch.randn(500).bfloat16(), "f": torch.ones(3).to(torch.float8_e4m3fn)}
    torch.save(state, tmp_path / "run" / "1.pt")
    (snapshot,) = import_snapshots(tmp_path / "run", tmp_path / "ema", profile=RAW).snapshots
    for name, values in state.items():
        assert_equal(snapshot.read(name), values.float().numpy())
    # The spacing of numbers with 8 significant bits, over those of all weights.
    relative = (snapshot.statistics["rounding_square"] / snapshot.statistics["mean_square"]) ** 0.5
    assert_close(relative, 2**-8 / 3**0.5, rtol=0.5, reason="by where the mantissas are")
