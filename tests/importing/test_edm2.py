"""Pickles as the official EDM2 code writes them, read without that code."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edm2_runs import NAMES, SHAPES, random_weights, state_dict, write_pickles
from helpers import assert_at_most, assert_close, assert_equal

from posthoc_ema import (
    CorruptSnapshotError,
    PowerFunction,
    SnapshotError,
    import_snapshots,
    reconstruct,
)
from posthoc_ema.importing.edm2 import image_count

PROTOCOLS = (2, 3, 4, 5)
TIMES, TRACKS = 16, (0.05, 0.10)
STEPS = 640
KIMG_EACH = 4194  # of 4,096 × 1,024 images, written as thousands


@pytest.fixture(scope="module")
def pickles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two times, two tracks, in every protocol."""
    folder = tmp_path_factory.mktemp("pickles")
    rng = np.random.default_rng(0)
    names = [f"network-snapshot-{k:07d}-{s:.3f}.pkl" for k in (8, 16) for s in TRACKS]
    write_pickles(folder, {name: random_weights(rng) for name in names}, PROTOCOLS)
    return folder


@pytest.mark.parametrize("protocol", [*PROTOCOLS, "saved"])
def test_every_protocol(pickles: Path, tmp_path: Path, protocol: int | str) -> None:
    done = import_snapshots(pickles / str(protocol), tmp_path / "ema", encoding="float16")
    assert done.kind == "edm2"
    assert done.unit == "images"
    found = [(t, profile.sigma_rel) for _, t, profile in done.files]
    assert found == [(8192, 0.05), (8192, 0.1), (16384, 0.05), (16384, 0.1)]
    for (path, _, _), snapshot in zip(done.files, done.snapshots, strict=True):
        expected = state_dict(pickles, path.name)
        assert {*snapshot.averages, *snapshot.copies, *snapshot.aliases} == set(expected)
        for name, values in expected.items():
            assert_equal(snapshot.read(name).astype(np.float32), values)
        assert snapshot.copies == ("unet.emb_fourier.freqs", "unet.emb_fourier.phases")
        assert snapshot.aliases == {"unet.dec.tied.weight": "unet.enc.64x64_conv.weight"}
        assert list(snapshot.averages) == [n for n in expected if n in snapshot.averages]
    assert "EXECUTED" not in os.environ
    assert not {"torch_utils", "torch_utils.persistence", "dnnlib"} & set(sys.modules)


def test_the_state_dict_is_that_of_the_network(pickles: Path, tmp_path: Path) -> None:
    import_snapshots(pickles / "4", tmp_path / "ema")
    state = reconstruct(tmp_path / "ema", 0.05).state_dict()
    expected = state_dict(pickles, "network-snapshot-0000016-0.050.pkl")
    assert set(state) == set(expected)
    for name, values in expected.items():
        assert tuple(state[name].shape) == values.shape
        assert_equal(state[name].float().numpy(), values)  # a stored average is itself


@pytest.mark.parametrize(
    ("kimg", "images"),
    [(8, 8192), (16, 16384), (1049, 1049600), (134217, 134217728), (2147483, 2147483648)],
)
def test_image_counts_are_exact(kimg: int, images: int) -> None:
    """Multiples of 1,024, of which the name holds the thousands, rounded down."""
    assert image_count(kimg) == images
    assert images % 1024 == 0
    assert images // 1000 == kimg


def test_rounding_to_half_precision_is_on_record(pickles: Path, tmp_path: Path) -> None:
    """Predicted errors would be too small without."""
    rng = np.random.default_rng(0)
    weights = random_weights(rng)  # those of the first pickle
    done = import_snapshots(pickles / "5", tmp_path / "ema", encoding="float16")
    read = {short: done.snapshots[0].read(name) for short, name in NAMES.items()}
    lost = np.concatenate([(read[k] - weights[k]).ravel() for k in SHAPES])
    # 6,247 errors, uniform within their spacing: their mean square is known to about 1 %.
    recorded = done.snapshots[0].statistics["rounding_square"]
    assert_close(recorded, np.mean(lost**2), rtol=0.06, reason="five deviations")


def copy_named(pickles: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(pickles / "4" / "network-snapshot-0000008-0.050.pkl", folder / name)
    return folder


def test_names_of_all_kinds(pickles: Path, tmp_path: Path) -> None:
    for number, name in enumerate(
        ["phema-0134217-0.135.pkl", "edm2-img512-xs-0134217-0.135.pkl", "a-134217-.135.pkl"]
    ):
        done = import_snapshots(copy_named(pickles, tmp_path / f"{number}", name), tmp_path / "x")
        ((_, t, profile),) = done.files
        assert (t, profile) == (134217728, PowerFunction(0.135))
        shutil.rmtree(tmp_path / "x")


def test_what_was_made_from_the_snapshots_is_left_out(pickles: Path, tmp_path: Path) -> None:
    names = ("network-snapshot-0000008-0.050.pkl", "phema-0000008-0.070.pkl")
    done = import_snapshots(copy_named(pickles, tmp_path / "run", *names), tmp_path / "ema")
    assert len(done.snapshots) == 1
    assert done.remarks == (
        "1 phema files were left out: they were made from the snapshots beside them",
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a-0000008-0.050.pkl", "b-0000008-0.050.pkl"), r"belong to 2 runs \(a, b\)"),
        (("a-0000008-0.050.pkl", "a-8-0.050.pkl"), "both hold t=8192"),
        (("a-0000000-0.050.pkl",), "belong to 0 runs"),
    ],
)
def test_names_that_do_not_fit(
    pickles: Path, tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SnapshotError, match=message):
        import_snapshots(copy_named(pickles, tmp_path / "run", *names), tmp_path / "ema")


def test_a_name_that_says_nothing(pickles: Path, tmp_path: Path) -> None:
    folder = copy_named(pickles, tmp_path / "run", "network.pkl")
    with pytest.raises(SnapshotError, match=r"network\.pkl does not say which average it is"):
        import_snapshots(folder, tmp_path / "ema", kind="edm2")


def test_truncated_at_any_place(pickles: Path, tmp_path: Path) -> None:
    """The file is named, and nothing of it is in the store."""
    name = "network-snapshot-0000008-0.050.pkl"
    whole = (pickles / "3" / name).read_bytes()
    folder = tmp_path / "run"
    folder.mkdir()
    for size in [0, 1, 2, 100, *np.linspace(200, len(whole) - 1, 20).astype(int).tolist()]:
        (folder / name).write_bytes(whole[:size])
        with pytest.raises(CorruptSnapshotError, match=name):
            import_snapshots(folder, tmp_path / "ema", dry_run=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, Any]]:
    """Two tracks × 16 snapshots in half precision, and true averages of other lengths."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(1)
    wanted = (0.02, 0.03, 0.04, 0.07, 0.13, 0.2, 0.25)
    weights = random_weights(rng)
    profiles = {s: PowerFunction(s) for s in (*TRACKS, *wanted)}
    averages = {s: {name: np.zeros(shape) for name, shape in SHAPES.items()} for s in profiles}
    files = {}
    for step in range(1, STEPS + 1):
        pace = 0.02 * min(1, (60 / step) ** 0.5)
        for name, shape in SHAPES.items():
            weights[name] = weights[name] + pace * rng.normal(size=shape)
        for s, profile in profiles.items():
            keep = float(profile.cumulative(step - 1, step))
            for name in SHAPES:
                averages[s][name] = keep * averages[s][name] + (1 - keep) * weights[name]
        if step % (STEPS // TIMES) == 0:
            images = 4096 * 1024 * (step // (STEPS // TIMES))
            for s in TRACKS:
                name = f"network-snapshot-{images // 1000:07d}-{s:.3f}.pkl"
                files[name] = {k: v.copy() for k, v in averages[s].items()}
    write_pickles(folder, files, [4])
    return folder / "4", {s: averages[s] for s in wanted}


def test_a_whole_run_beats_least_squares(
    run: tuple[Path, dict[float, Any]], tmp_path: Path
) -> None:
    """With the method of the paper on the same files, against averages tracked in float64."""
    folder, true = run
    done = import_snapshots(folder, tmp_path / "ema", encoding="float16")
    assert len(done.snapshots) == 2 * TIMES
    gains = []
    for sigma_rel, averages in true.items():
        expected = np.concatenate([averages[name].ravel() for name in SHAPES])
        errors = {}
        for method in ("kriging", "paper"):
            made = reconstruct(tmp_path / "ema", sigma_rel, method=method, framework="numpy")
            values = np.concatenate([made.params[NAMES[name]].ravel() for name in SHAPES])
            errors[method] = np.linalg.norm(values - expected) / np.linalg.norm(expected)
            if method == "kriging":  # the bar of this project
                assert_at_most(made.predicted_error, 1.5 * errors[method], reason="predicted")
                assert_at_most(errors[method], 1.5 * made.predicted_error, reason="predicted")
        assert_at_most(errors["kriging"], 1.01 * errors["paper"], reason="the bar of this project")
        gains.append(errors["paper"] / errors["kriging"])
    assert_at_most(1.3, np.exp(np.mean(np.log(gains))), reason="what the estimate is for")
