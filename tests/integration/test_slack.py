"""Reconstruction from the few snapshots that count: what is read, and what is not."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posthoc_ema import (
    EMA,
    CorruptSnapshotError,
    Snapshot,
    SnapshotStore,
    predict_error,
    reconstruct,
)
from tests.integration.commands import MISUSE, invoke, invoke_json
from tests.integration.small_run import write_run

SLACK = 0.01
choice = import_module("posthoc_ema.choice")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("slack") / "ema", every=10, encoding="float16")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "ema"))


def by_use(folder: Path) -> tuple[list[Snapshot], list[Snapshot]]:
    """The snapshots that count for a length of 0.07, and the others."""
    used, unused = [], []
    coefficients = reconstruct(folder, 0.07, slack=SLACK).coefficients
    for snapshot, x in zip(SnapshotStore(folder).list(), coefficients, strict=True):
        (used if x else unused).append(snapshot)
    return used, unused


def damage(snapshot: Snapshot, bit: int = 0) -> None:
    """Flip a bit of a number; the lowest one so little that no estimate notices."""
    path = Path(str(snapshot.path))
    data = bytearray(path.read_bytes())
    place = snapshot.entries["net.bias"].offset + 2 * 50
    data[place + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_what_does_not_count_is_not_read(folder: Path) -> None:
    before = reconstruct(folder, 0.07, slack=SLACK)
    used, unused = by_use(folder)
    assert 1 < len(used) < len(unused)
    for snapshot in unused:
        damage(snapshot)
    after = reconstruct(folder, 0.07, slack=SLACK)
    for name, values in before.params.items():
        # The estimates took in the damage, of half a thousandth of a weight in a thousand.
        np.testing.assert_allclose(after.params[name], values, atol=1e-5)
    with pytest.raises(CorruptSnapshotError, match="damaged"):
        reconstruct(folder, 0.07, slack=0)


def test_what_counts_is_checked(folder: Path) -> None:
    used, _ = by_use(folder)
    damage(used[0])
    with pytest.raises(CorruptSnapshotError, match=used[0].path.name):
        reconstruct(folder, 0.07, slack=SLACK)


def test_damage_that_would_mislead_the_choice_is_found(folder: Path) -> None:
    """The highest bit of the exponent makes a number 65,536 times as large."""
    _, unused = by_use(folder)
    damage(unused[0], bit=14)
    with pytest.raises(CorruptSnapshotError, match=unused[0].path.name):
        reconstruct(folder, 0.07, slack=SLACK)


def test_large_runs_have_slack_and_small_ones_none(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = np.count_nonzero(reconstruct(made, 0.07).coefficients)
    assert every == len(SnapshotStore(made).list())
    monkeypatch.setattr(choice, "_WORTH_CHOOSING", 0)
    assert np.count_nonzero(reconstruct(made, 0.07).coefficients) < every / 2
    assert np.count_nonzero(reconstruct(made, 0.07, slack=0).coefficients) == every
    assert np.count_nonzero(reconstruct(made, 0.07, method="paper").coefficients) == every


def test_the_result_is_the_same_within_the_predicted_error(made: Path) -> None:
    exact, near = reconstruct(made, 0.07), reconstruct(made, 0.07, slack=SLACK)
    assert exact.predicted_error < near.predicted_error <= exact.predicted_error * (1 + SLACK)
    difference = np.concatenate([(near.params[n] - exact.params[n]).ravel() for n in exact.params])
    size = np.sqrt(np.mean(np.concatenate([v.ravel() for v in exact.params.values()]) ** 2))
    # What a share s more of error allows: √((1 + s)² - 1) of it, and the model is but a model.
    allowed = 2 * exact.predicted_error * np.sqrt((1 + SLACK) ** 2 - 1)
    assert np.sqrt(np.mean(difference**2)) <= allowed * size
    assert predict_error(made, 0.07, slack=SLACK) == near.predicted_error


@pytest.mark.parametrize("options", [{"encoding": "delta8"}, {"encoding": "float16"}, {}])
def test_whatever_the_encoding(tmp_path: Path, options: Any) -> None:
    folder = write_run(tmp_path / "ema", every=10, **options)
    exact, near = (reconstruct(folder, 0.03, slack=s) for s in (0, SLACK))
    assert np.count_nonzero(near.coefficients) < len(near.coefficients) / 2
    for name, values in exact.params.items():
        np.testing.assert_allclose(
            near.params[name], values, atol=6 * exact.predicted_error * np.abs(values).max()
        )


def test_slack_is_taken_where_it_spares_a_file(tmp_path: Path) -> None:
    """Of differences the last one needs all before it, so that leaving one out gains nothing."""
    folder = write_run(tmp_path / "ema", every=40, encoding="delta8")
    assert np.count_nonzero(reconstruct(folder, 0.07, slack=SLACK).coefficients) == 16
    folder = write_run(tmp_path / "whole", every=40, encoding="float16")
    assert np.count_nonzero(reconstruct(folder, 0.07, slack=SLACK).coefficients) < 16, "the twin"


def test_nothing_is_left_out_where_nothing_is_known(tmp_path: Path) -> None:
    """Without weights there is no movement to judge by."""
    ema = EMA(snapshots=tmp_path, every=1)
    for step in range(3):
        ema.update({"w": np.zeros((0, 3), np.float32), "step": np.array(step)})
    assert reconstruct(tmp_path, 0.07, slack=SLACK).params["w"].shape == (0, 3)


def test_lengths_for_patterns_and_parts(made: Path, tmp_path: Path) -> None:
    lengths = {"net.bias": 0.03, "*": 0.07}
    whole = reconstruct(made, lengths, slack=SLACK)
    used = {p: np.count_nonzero(x) for p, x in whole.coefficients.items()}
    assert used["net.bias"] != used["*"]
    found: dict[str, Any] = {}
    for k in (1, 2):
        part = reconstruct(made, lengths, slack=SLACK, part=(k, 2), out=tmp_path / "out")
        assert {p: np.count_nonzero(x) for p, x in part.coefficients.items()} == used
        found |= part.params
    assert found.keys() == whole.params.keys()
    for name, values in whole.params.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def test_only_kriging_knows_slack(made: Path) -> None:
    for method in ("paper", "plain"):
        with pytest.raises(ValueError, match='needs method="kriging"'):
            reconstruct(made, 0.07, method=method, slack=SLACK)
    with pytest.raises(ValueError, match="slack must be"):
        reconstruct(made, 0.07, slack=-1)


def test_the_command_says_how_many_count(made: Path, tmp_path: Path) -> None:
    command = ("reconstruct", made, "--sigma-rel", "0.07", "--out")
    said = invoke(*command, tmp_path / "a", "--slack", SLACK).stderr
    used = np.count_nonzero(reconstruct(made, 0.07, slack=SLACK).coefficients)
    assert f"{used} of 64 snapshots" in said
    assert "snapshots make up" not in invoke(*command, tmp_path / "b").stderr
    assert (
        "snapshots make up"
        not in invoke("reconstruct", made, "--sigma-rel", "0.05", "--out", tmp_path / "c").stderr
    )
    found = invoke_json(*command, tmp_path / "d", "--slack", SLACK)[0]["coefficients"]
    assert sum(c["coefficient"] != 0 for c in found) == used
    invoke(*command, tmp_path / "e", "--slack", -1, status=MISUSE)
