"""Folders of ema-pytorch and pytorch-posthoc-ema: ``{track}.{step}.pt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_at_most, assert_equal

from posthoc_ema import (
    PowerFunction,
    SnapshotError,
    SnapshotStore,
    import_snapshots,
    reconstruct,
)

SIGMA_RELS = (0.05, 0.28)


def gammas() -> list[float]:
    return [PowerFunction(s).gamma for s in SIGMA_RELS]


def write_run(
    folder: Path,
    *,
    update_every: int = 1,
    wrapped: bool = True,
    steps: int = 600,
    every: int = 50,
    **more: Any,
) -> list[np.ndarray[Any, Any]]:
    """Their update rule and files, from its description; returns the weights of each step.

    Weights move smoothly, so that leaving out steps costs little beside the wrong profile.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    weights, velocity = rng.normal(size=1500), np.zeros(1500)
    averages: list[Any] = [None, None]
    path = []
    for step in range(steps):
        velocity = 0.95 * velocity + 0.002 * rng.normal(size=weights.shape)
        weights = weights + velocity
        path.append(weights)
        for track, gamma in enumerate(gammas()):
            if step % update_every:
                continue
            if averages[track] is None:
                averages[track] = weights
            beta = (1 - 1 / (step + 2)) ** (1 + gamma)
            averages[track] = beta * averages[track] + (1 - beta) * weights
        if (step + 1) % every == 0:
            for track, average in enumerate(averages):
                prefix = "ema_model." if wrapped else ""
                state = {
                    f"{prefix}w": torch.from_numpy(average),
                    f"{prefix}norm.num_batches_tracked": torch.tensor(200 * (step + 1)),
                    "initted": torch.tensor(True),
                    "step": torch.tensor(step + 1),
                }
                if wrapped:
                    state["online_model.w"] = torch.from_numpy(weights)
                half = {name: value.half() for name, value in state.items()}
                torch.save({**half, **more}, folder / f"{track}.{step + 1}.pt")
    return path


@pytest.mark.parametrize("wrapped", [True, False])
def test_names_times_and_lengths(tmp_path: Path, wrapped: bool) -> None:
    write_run(tmp_path / "run", wrapped=wrapped, steps=400, every=200)
    done = import_snapshots(tmp_path / "run", tmp_path / "ema", sigma_rel=SIGMA_RELS)
    assert (done.kind, done.unit) == ("ema-pytorch", "steps")
    assert [(t, p.sigma_rel) for _, t, p in done.files] == [
        (200, 0.05), (200, 0.28), (400, 0.05), (400, 0.28),
    ]  # fmt: skip
    for snapshot, (path, t, _) in zip(done.snapshots, done.files, strict=True):
        assert dict(snapshot.averages) == {"w": "F16"}
        stored = torch.load(path, weights_only=True)["ema_model.w" if wrapped else "w"]
        assert_equal(snapshot.read("w"), stored.float().numpy())
        # 200 · 400 overflows half precision; then the step is the best that is known.
        count = 200 * t if 200 * t < 65504 else t
        assert_equal(snapshot.read("norm.num_batches_tracked"), count)


@pytest.mark.parametrize("update_every", [1, 4])
def test_reconstruction_is_that_of_the_true_profile(tmp_path: Path, update_every: int) -> None:
    """Updates at every fourth step make other averages of the same γ, which must be known."""
    path = np.stack(write_run(tmp_path / "run", update_every=update_every))
    if update_every == 1:
        import_snapshots(tmp_path / "run", tmp_path / "ema", sigma_rel=SIGMA_RELS)
    else:
        import_track(tmp_path, update_every)
    t = SnapshotStore(tmp_path / "ema").list()[-1].t
    assert t == {1: 600, 4: 598.5}[update_every]  # the last update was at 597: of 597 to 600
    for sigma_rel in (0.1, 0.2):
        made = reconstruct(tmp_path / "ema", sigma_rel, framework="numpy")
        true = true_average(path, sigma_rel, t)
        error = np.linalg.norm(made.params["w"] - true) / np.linalg.norm(true)
        # Their clock, ahead by one step in 600, costs what is beyond the prediction.
        assert_at_most(error, 2 * made.predicted_error, reason="the bar of this project, and that")


def true_average(path: Any, sigma_rel: float, t: float) -> Any:
    grid = np.arange(len(path) + 1.0)
    return np.diff(PowerFunction(sigma_rel).cumulative(grid, t)) @ path


def import_track(tmp_path: Path, update_every: int) -> None:
    """Only the first track: the second one, updated so, is no power function."""
    for file in (tmp_path / "run").glob("1.*.pt"):
        file.unlink()
    done = import_snapshots(
        tmp_path / "run", tmp_path / "ema", sigma_rel=0.05, update_every=update_every
    )
    expected = (gammas()[0] + 1) / update_every - 1
    assert done.files[0][2] == PowerFunction(gamma=expected)
    assert done.remarks == ()


def test_the_wrong_interval_is_noticed(tmp_path: Path) -> None:
    """The guard of the test above: taken to be updated at every step, it is far off."""
    path = np.stack(write_run(tmp_path / "run", update_every=4))
    done = import_snapshots(tmp_path / "run", tmp_path / "ema", sigma_rel=SIGMA_RELS)
    assert "default is every 100th" in done.remarks[0]
    made = reconstruct(tmp_path / "ema", 0.1, framework="numpy")
    true = true_average(path, 0.1, 600)
    error = np.linalg.norm(made.params["w"] - true) / np.linalg.norm(true)
    assert error > 4 * made.predicted_error


def test_an_interval_that_leaves_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=100, every=100)
    with pytest.raises(SnapshotError, match=r"every 100th step weighs the beginning .*γ = -0\.82"):
        import_snapshots(tmp_path / "run", tmp_path / "ema", sigma_rel=SIGMA_RELS, update_every=100)


@pytest.mark.parametrize("stored", [0.05, torch.tensor(0.05).half()])
def test_a_stored_length(tmp_path: Path, stored: Any) -> None:
    write_run(tmp_path / "run", wrapped=False, steps=100, every=100, sigma_rel=stored)
    for file in (tmp_path / "run").glob("1.*.pt"):
        file.unlink()
    done = import_snapshots(tmp_path / "run", tmp_path / "ema")
    assert done.files[0][2] == PowerFunction(sigma_rel=0.05)
    assert list(done.snapshots[0].averages) == ["w"]


def test_a_length_that_nothing_says(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=100, every=100)
    with pytest.raises(SnapshotError, match=r"0\.100\.pt does not say its EMA length; give"):
        import_snapshots(tmp_path / "run", tmp_path / "ema")
    with pytest.raises(SnapshotError, match=r"holds tracks 0, 1, and sigma_rel gives 1 lengths"):
        import_snapshots(tmp_path / "run", tmp_path / "ema", sigma_rel=0.05)
