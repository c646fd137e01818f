"""A reconstruction divided among processes: the same tensors, and one index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from posthoc_ema import EMA, native, reconstruct
from posthoc_ema.cli import main
from posthoc_ema.cli.options import parse_part
from posthoc_ema.tensorfile import read_header


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    ema = EMA(snapshots=tmp_path / "ema", every=3)
    shapes = {"large": (300, 7), "middle": (90, 5), "small": (11,), "double": (40,), "empty": (0,)}
    weights: dict[str, Any] = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    weights["double"] = np.zeros(40)
    weights["count"] = np.array(0)
    for _ in range(12):
        for name in shapes:
            weights[name] += rng.normal(size=shapes[name]).astype(weights[name].dtype)
        weights["count"] += 1
        ema.update(weights)
    return tmp_path / "ema"


def tensors(path: Path) -> dict[str, bytes]:
    """All tensors of a result, found through its index if it has one."""
    index = path.with_name(path.name + ".index.json")
    files = {path}
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {path.with_name(name) for name in weight_map.values()}
    found = {}
    for file in files:
        raw = file.read_bytes()
        for name, entry in read_header(file).entries.items():
            found[name] = raw[entry.offset : entry.offset + entry.nbytes]
            assert not index.exists() or path.with_name(weight_map[name]) == file
    return found


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Raise unless both are the same tensors."""
    assert found.keys() == expected.keys()
    for name, raw in expected.items():
        if native.library() is not None or name == "count":
            assert found[name] == raw, name
        else:  # BLAS sums in an order of its own: some units in the last place
            kind = np.float64 if name == "double" else np.float32
            np.testing.assert_allclose(
                np.frombuffer(found[name], kind), np.frombuffer(raw, kind), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_parts_make_up_the_whole(run: Path, tmp_path: Path, number: int) -> None:
    reconstruct(run, [0.07, 0.2], out=tmp_path / "one")
    out = tmp_path / "parts"
    for k in reversed(range(1, number + 1)):
        assert not list(out.glob("*.index.json"))
        results = reconstruct(run, [0.07, 0.2], out=out, part=(k, number))
        assert [len(result.files) for result in results] == [1, 1]
        assert ("count" in results[0].buffers) == (k == 1)
    for name in ("sigma_rel=0.07.safetensors", "sigma_rel=0.2.safetensors"):
        assert_same(tensors(out / name), tensors(tmp_path / "one" / name))
        sizes = [path.stat().st_size for path in out.glob(f"{name[:-12]}-*")]
        assert len(sizes) == number


def test_only_parts_of_one_request_are_joined(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "x.safetensors"
    index = out.with_name("x.safetensors.index.json")
    for k in (1, 2):
        reconstruct(run, 0.07, out=out, part=(k, 2))
    assert index.exists()
    reconstruct(run, 0.08, out=out, part=(1, 2))
    assert not index.exists()  # half of it is another average now
    reconstruct(run, 0.08, out=out, part=(2, 2), t=9)
    assert not index.exists()
    reconstruct(run, 0.08, out=out, part=(2, 2))
    assert index.exists()
    reconstruct(run, 0.08, out=tmp_path / "one.safetensors")
    assert_same(tensors(out), tensors(tmp_path / "one.safetensors"))
    with pytest.raises(FileExistsError, match=r"x-00002-of-00002\.safetensors exists"):
        reconstruct(run, 0.08, out=out, part=(2, 2), overwrite=False)
    out.write_bytes(b"an older result under the other name")
    reconstruct(run, 0.08, out=out, part=(2, 2))
    assert not out.exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ((0, 2), r"part must be \(i, n\) with"),
        ((3, 2), r"part must be \(i, n\) with"),
        ((1, 6), "only 5 tensors to divide"),
    ],
)
def test_impossible_parts(run: Path, tmp_path: Path, part: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reconstruct(run, 0.07, out=tmp_path / "out", part=part)


def test_parts_need_a_place(run: Path) -> None:
    with pytest.raises(ValueError, match="part= needs out="):
        reconstruct(run, 0.07, part=(1, 2))


def test_command_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ["reconstruct", str(run), "--sigma-rel", "0.07", "--out", str(out)]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for part in ("1/2", "auto"):
        done = CliRunner().invoke(main, [*arguments, "--part", part])
        assert done.exit_code == 0, done.output
    assert (out / "sigma_rel=0.07.safetensors.index.json").exists()
    monkeypatch.delenv("RANK")
    for wrong, message in [
        ("auto", "needs RANK and WORLD_SIZE"),
        ("3/2", "numbered from 1 to"),
        ("two", "a part such as 2/8"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_part(wrong)
        assert CliRunner().invoke(main, [*arguments, "--part", wrong]).exit_code == 2
