"""Converting between encodings: complete, resumable, honest about what rounding took."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from posthoc_ema import SnapshotStore, convert, predict_error, reconstruct
from posthoc_ema.cli import main
from posthoc_ema.encoding import ENCODINGS
from tests.parity.runs import record


@pytest.mark.parametrize("first", ["float32", "float16", "delta8"])
@pytest.mark.parametrize("second", list(ENCODINGS))
def test_there_and_back(tmp_path: Path, first: str, second: str) -> None:
    run = record(tmp_path / "a", steps=48, every=6, encoding=first, shapes={"w": (40, 50), "s": ()})
    written = convert(run.folder, tmp_path / "b", second, progress=False)
    original = SnapshotStore(run.folder).list()
    assert [(s.t, s.profile, s.aliases) for s in written] == [
        (s.t, s.profile, s.aliases) for s in original
    ]
    assert SnapshotStore(tmp_path / "b").verify()
    for old, new in zip(original, written, strict=True):
        assert new.encoding == second
        error = np.sqrt(np.mean((old.read("w").astype(np.float64) - new.read("w")) ** 2))
        added = new.statistics["rounding_square"] - old.statistics["rounding_square"]
        # What the new encoding rounds, measured on all tensors; plus float32 sums along chains.
        assert added >= 0
        assert error <= 1.2 * np.sqrt(added) + 4e-6
    if second == "float32":
        pairs = zip(
            reconstruct(run.folder, 0.07).params.values(),
            reconstruct(tmp_path / "b", 0.07).params.values(),
            strict=True,
        )
        for a, b in pairs:
            np.testing.assert_allclose(a, b, atol=1e-5)
        # Bytes that hold rounded numbers do not promise more than those.
        assert predict_error(tmp_path / "b", 0.07) == pytest.approx(
            predict_error(run.folder, 0.07), rel=0.05
        )


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "a", steps=48, every=6)
    take, calls = SnapshotStore.take, 0

    def failing(self, *arguments):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return take(self, *arguments)

    monkeypatch.setattr(SnapshotStore, "take", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(run.folder, tmp_path / "b", "delta8")
    assert len(SnapshotStore(tmp_path / "b").verify()) == 5
    monkeypatch.undo()
    assert len(convert(run.folder, tmp_path / "b", "delta8")) == 16


def test_misuse(tmp_path: Path) -> None:
    run = record(tmp_path / "a", steps=12, every=6)
    with pytest.raises(ValueError, match="another folder"):
        convert(run.folder, run.folder, "delta8")
    with pytest.raises(ValueError, match="encoding must be one of"):
        convert(run.folder, tmp_path / "b", "int3")


def test_the_command(tmp_path: Path) -> None:
    run = record(tmp_path / "a", steps=48, every=6, shapes={"w": (100, 100)})
    arguments = ["convert", str(run.folder), str(tmp_path / "b"), "--encoding", "delta8"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["bytes"] < report["bytes_before"] / 2.5
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0
    assert "16 snapshots" in again.output
