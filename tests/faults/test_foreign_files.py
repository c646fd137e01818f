"""Files that are intact but do not belong: other runs, duplicates, other structures, NaN."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from posthoc_ema import (
    EMA,
    CorruptSnapshotError,
    ForeignSnapshotError,
    NonFiniteError,
    PosthocEMAError,
    SnapshotError,
    SnapshotStore,
    SnapshotVersionError,
    StructureError,
    reconstruct,
)
from tests.faults.tools import Contents, last_of, rewrite, set_tensor, small_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_store(tmp_path / "ema")


def assert_refused(folder: Path, path: Path, kind: Any, message: str) -> None:
    for action in (lambda: SnapshotStore(folder).list(), lambda: reconstruct(folder, 0.07)):
        with pytest.raises(kind, match=message) as caught:
            action()
        if str(path) not in str(caught.value):
            raise AssertionError(f"{caught.value} does not name {path}")


# Files of other origin ------------------------------------------------------------------------


def test_a_plain_safetensors_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    for metadata in (None, {"format": "pt"}, {"posthoc_ema": "{}"}):
        save_file({"w": np.ones(2)}, path, metadata=metadata)
        assert_refused(folder, path, ForeignSnapshotError, r"no snapshot of posthoc_ema; move it")


@pytest.mark.parametrize("text", ["5", "[]", '["format_version"]', "null", '"x"', "{", "\x00"])
def test_metadata_that_is_not_ours(folder: Path, text: str) -> None:
    path = folder / "model.safetensors"
    save_file({"w": np.ones(2)}, path, metadata={"posthoc_ema": text})
    assert_refused(folder, path, SnapshotError, "damaged|no snapshot of posthoc_ema")


@pytest.mark.parametrize("content", [b"", b"text", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04zip"])
def test_what_is_no_safetensors_file(folder: Path, content: bytes) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    assert_refused(folder, path, CorruptSnapshotError, "not a complete safetensors file")


def test_a_dangling_link(folder: Path) -> None:
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    assert len(SnapshotStore(folder).list()) == 8


def test_a_snapshot_of_another_run(folder: Path, tmp_path: Path) -> None:
    other = small_store(tmp_path / "other", seed=1)
    source = SnapshotStore(other).list()[3]
    path = folder / "copied.safetensors"
    shutil.copy(source.path, path)
    assert_refused(folder, path, ForeignSnapshotError, "different runs .*move one run to another")


@pytest.mark.parametrize("which", [0, 3, 7])
def test_a_duplicate_under_another_name(folder: Path, which: int) -> None:
    snapshot = SnapshotStore(folder).list()[which]
    path = folder / "copy.safetensors"
    shutil.copy(snapshot.path, path)
    assert_refused(folder, path, ForeignSnapshotError, "both hold t=.*delete or move one")
    assert_refused(folder, snapshot.path, ForeignSnapshotError, "both hold t=")


def test_training_does_not_go_on_beside_foreign_files(tmp_path: Path) -> None:
    weights = {"w": np.ones(2)}
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, every=2)
    for _ in range(2):
        ema.update(weights)
    save_file(weights, tmp_path / "model.safetensors")
    ema.update(weights)
    with pytest.raises(ForeignSnapshotError, match=r"model\.safetensors"):
        ema.update(weights)
    # Taken away, the next update writes what is due.
    (tmp_path / "model.safetensors").unlink()
    ema.update(weights)
    assert [s.t for s in SnapshotStore(tmp_path).list()] == [2, 5]


# Versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 17, 0, "1", None, 1.5])
def test_other_format_versions(folder: Path, version: Any) -> None:
    snapshot = last_of(folder)
    rewrite(snapshot.path, lambda c: c.metadata.update(format_version=version))
    assert_refused(
        folder,
        snapshot.path,
        SnapshotVersionError,
        "this library reads 1 and 2; upgrade posthoc-ema",
    )


def test_unknown_profiles(folder: Path) -> None:
    snapshot = last_of(folder)
    rewrite(snapshot.path, lambda c: c.metadata.update(profile={"kind": "cosine"}))
    assert_refused(folder, snapshot.path, SnapshotError, "unknown profile kind 'cosine'")


@pytest.mark.parametrize(
    "field", ["run_id", "t", "profile", "averages", "statistics", "aliases", "encoding", "t_first"]
)
def test_missing_fields(folder: Path, field: str) -> None:
    snapshot = last_of(folder)
    rewrite_without = lambda c: c.metadata.pop(field)  # noqa: E731
    if field == "averages":
        rewrite_without = lambda c: c.metadata.update(averages=[["w", "F32"]])  # noqa: E731
    rewrite(snapshot.path, rewrite_without)
    with pytest.raises(PosthocEMAError, match=re.escape(str(snapshot.path))):
        reconstruct(folder, 0.07)


# Structure -----------------------------------------------------------------------------------


def _rename(c: Contents) -> None:
    c.metadata["averages"] = [["w2" if n == "w" else n, d] for n, d in c.metadata["averages"]]
    c.tensors = {("w2" if n == "w" else n): t for n, t in c.tensors.items()}


def _remove(c: Contents) -> None:
    c.metadata["averages"] = [[n, d] for n, d in c.metadata["averages"] if n != "w"]
    del c.tensors["w"]


def _add(c: Contents) -> None:
    c.metadata["averages"].append(["extra", "F32"])
    c.tensors["extra"] = ("F32", [2], b"\0" * 8)


def _reshape(c: Contents) -> None:
    dtype, shape, data = c.tensors["w"]
    c.tensors["w"] = (dtype, shape[::-1], data)


def _flatten(c: Contents) -> None:
    dtype, _, data = c.tensors["w"]
    c.tensors["w"] = (dtype, [45], data)


@pytest.mark.parametrize("which", [0, 4, 7])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, "lacks '(w|w2)'"),
        (_remove, "lacks 'w'"),
        (_add, "lacks 'extra'"),
        (_reshape, r"w has shape \(\d, \d\) in .* but \(\d, \d\) in"),
        (_flatten, r"w has shape .*45"),
    ],
    ids=["renamed", "removed", "added", "reshaped", "flattened"],
)
def test_snapshots_of_one_run_must_agree(
    folder: Path, change: Any, message: str, which: int
) -> None:
    snapshot = SnapshotStore(folder).list()[which]
    rewrite(snapshot.path, change)
    with pytest.raises(StructureError, match=message) as caught:
        reconstruct(folder, 0.07)
    assert str(folder) in str(caught.value)


def test_order_within_a_file_may_differ(folder: Path) -> None:
    expected = reconstruct(folder, 0.07)
    snapshot = SnapshotStore(folder).list()[4]

    def reverse(c: Contents) -> None:
        c.tensors = dict(reversed(c.tensors.items()))

    rewrite(snapshot.path, reverse)
    found = reconstruct(folder, 0.07)
    for name, value in expected.params.items():
        np.testing.assert_allclose(found.params[name], value, rtol=0, atol=1e-5)  # other blocks


def test_integer_averages_are_refused(folder: Path) -> None:
    # An average stored as integers cannot be; decoding its bytes as floats would be silent.
    snapshot = last_of(folder)

    def disguise(c: Contents) -> None:
        _, shape, data = c.tensors["w"]
        c.tensors["w"] = ("I32", shape, data)

    rewrite(snapshot.path, disguise)
    with pytest.raises(PosthocEMAError, match=re.escape(str(snapshot.path))):
        reconstruct(folder, 0.10)


# NaN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float32", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sigma_rel", [0.07, 0.10])
def test_nan_written_by_other_hands(
    tmp_path: Path, encoding: str, bad: float, sigma_rel: float
) -> None:
    folder = small_store(tmp_path / "ema", encoding)
    snapshot = last_of(folder)
    values = snapshot.read("w")
    values[3, 2] = bad
    rewrite(snapshot.path, lambda c: set_tensor(c, "w", values))
    with pytest.raises(NonFiniteError, match=r"'w' is not finite.*delete such a") as caught:
        reconstruct(folder, sigma_rel)
    assert str(snapshot.path) in str(caught.value)
    SnapshotStore(folder).delete([snapshot])
    assert np.isfinite(reconstruct(folder, sigma_rel).params["w"]).all()


def test_nan_written_to_files_by_out_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    snapshot = last_of(folder)
    values = snapshot.read("w")
    values[0, 0] = np.nan
    rewrite(snapshot.path, lambda c: set_tensor(c, "w", values))
    with pytest.raises(NonFiniteError):
        reconstruct(folder, 0.07, out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_reading_never_runs_code(folder: Path) -> None:
    # Nothing in the reading path can unpickle.
    import ast

    import posthoc_ema

    root = Path(posthoc_ema.__file__).parent
    for source in root.rglob("*.py"):
        names = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse(source.read_text()))
            if isinstance(node, ast.Attribute | ast.Name)
        }
        assert not names & {"pickle", "dill", "cloudpickle", "eval", "exec", "marshal"}, source
