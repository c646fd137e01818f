"""``reconstruct``: what comes out is what the files, the coefficients and the request say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posthoc_ema import (
    EMA,
    Custom,
    Exponential,
    PowerFunction,
    Reconstruction,
    SnapshotError,
    SnapshotStore,
    Uniform,
    predict_error,
    reconstruct,
    solve,
)
from tests.parity.runs import SHAPES, Run, combine, record, relative_rms

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return record(tmp_path_factory.mktemp("run") / "ema")


def assert_combination(result: Reconstruction, folder: Path) -> None:
    """The result is Σ coefficient·snapshot of its own inputs, to float32 rounding."""
    by_identity = {(s.t, s.profile): s for s in SnapshotStore(folder).list()}
    files = [by_identity[identity] for identity in result.inputs]
    for name, value in result.params.items():
        expected = combine(files, result.coefficients, name)
        # Coefficients and products are rounded once each, sums of n terms at most n times.
        largest = max(np.abs(f.read(name)).max() for f in files)
        bound = (len(files) + 2) * EPS * largest * np.abs(result.coefficients).sum()
        error = np.abs(np.asarray(value) - expected).max()
        if not error <= bound:
            raise AssertionError(f"{name} is off by {error:.3g}, allowed {bound:.3g}")


# What a result is ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kriging", "paper"])
@pytest.mark.parametrize("sigma_rel", [0.02, 0.07, 0.15, 0.25])
def test_a_result_is_its_coefficients_times_the_files(
    run: Run, sigma_rel: float, method: str
) -> None:
    result = reconstruct(run.folder, sigma_rel, method=method)
    assert_combination(result, run.folder)
    assert abs(result.coefficients.sum() - 1) < 1e-12  # float64 sum of 16 numbers near one
    assert result.t == 96
    assert result.profile == PowerFunction(sigma_rel)
    assert list(result.params) == list(SHAPES), "in the model's order"
    assert {name: w.shape for name, w in result.params.items()} == SHAPES
    assert {w.dtype for w in result.params.values()} == {np.dtype(np.float32)}


def test_the_comparison_above_can_fail(run: Run) -> None:
    result = reconstruct(run.folder, 0.07)
    result.params["enc.w"][0, 0] += 1e-3
    with pytest.raises(AssertionError, match=r"enc\.w is off"):
        assert_combination(result, run.folder)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.13, 0.2])
def test_it_comes_near_the_directly_tracked_average(run: Run, sigma_rel: float) -> None:
    result = reconstruct(run.folder, sigma_rel)
    true = run.true_average(PowerFunction(sigma_rel))
    names = ["enc.w", "enc.b", "dec.w"]
    found = np.concatenate([result.params[n].ravel() for n in names])
    error = relative_rms(found, np.concatenate([true[n].ravel() for n in names]))
    # The walk is what the prediction assumes; 650 weights give its RMS to a few percent.
    assert error == pytest.approx(result.predicted_error, rel=0.35)
    # The nearest stored average is much farther off: there was something to gain.
    near = min(
        relative_rms(s.read("dec.w"), true["dec.w"]) for s in SnapshotStore(run.folder).list()
    )
    assert error < near / 2


def test_predict_error_says_the_same_without_reconstructing(run: Run) -> None:
    targets = [0.03, 0.07, 0.2]
    errors = predict_error(run.folder, targets)
    assert errors.shape == (3,)
    for sigma_rel, error in zip(targets, errors, strict=True):
        assert reconstruct(run.folder, sigma_rel).predicted_error == pytest.approx(error, rel=1e-9)
    assert isinstance(predict_error(run.folder, 0.07), float)


def test_diagnostics(run: Run) -> None:
    result = reconstruct(run.folder, 0.15)
    diagnostics = result.diagnostics
    x = result.coefficients
    assert diagnostics["l1_norm"] == pytest.approx(np.abs(x).sum())
    assert diagnostics["l2_norm"] == pytest.approx(np.sqrt((x**2).sum()))
    assert diagnostics["condition_number"] >= 1
    assert 0 <= diagnostics["profile_error"] < 1
    assert len(diagnostics["noise"]) == len(result.inputs) == 16
    solved = solve(
        result.inputs,
        (96, 0.15),
        movement=diagnostics["movement"],
        noise=diagnostics["noise"],
    )
    np.testing.assert_allclose(solved.coefficients, x, rtol=1e-9, atol=1e-12)


# Stored averages -----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float32", "float16", "bfloat16"])
def test_a_stored_average_comes_back_to_the_last_bit(tmp_path: Path, encoding: str) -> None:
    run = record(tmp_path / "ema", encoding=encoding)
    for snapshot in SnapshotStore(run.folder).list():
        result = reconstruct(run.folder, snapshot.profile.sigma_rel, t=snapshot.t)
        assert np.count_nonzero(result.coefficients) == 1
        for name in SHAPES:
            stored = snapshot.read(name)
            assert result.params[name].tobytes() == stored.tobytes(), name


def test_also_among_other_targets_and_the_sign_of_zero(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path)
    for step in range(6):
        ema.update({"w": np.array([-0.0, 0.0, step, 1e-42, -3e38], np.float32)})
        ema.snapshot()
    last = SnapshotStore(tmp_path).list()[-1]
    alone = reconstruct(tmp_path, 0.10)
    among = reconstruct(tmp_path, [0.07, 0.10, 0.2])[1]
    for result in (alone, among):
        assert result.params["w"].tobytes() == last.read("w").tobytes()


def test_constant_weights_come_back_as_they_are(tmp_path: Path) -> None:
    # Coefficients that do not sum to one would give 1.189 for 1.2346.
    value = np.float32(1.2346)
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path, every=10)
    for _ in range(100):
        ema.update({"w": np.full(5, value)})
    for method in ("kriging", "paper"):
        for result in reconstruct(tmp_path, [0.015, 0.03, 0.07, 0.2, 0.28], method=method):
            np.testing.assert_array_equal(result.params["w"], value)


# Several at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kriging", "paper"])
def test_several_in_one_pass_equal_single_ones(run: Run, method: str) -> None:
    wanted = [0.02, 0.05, 0.07, 0.10, 0.13, 0.2, 0.28]
    together = reconstruct(run.folder, wanted, method=method)
    assert [r.profile for r in together] == [PowerFunction(s) for s in wanted]
    for sigma_rel, result in zip(wanted, together, strict=True):
        alone = reconstruct(run.folder, sigma_rel, method=method)
        np.testing.assert_allclose(result.coefficients, alone.coefficients, rtol=1e-9, atol=1e-13)
        for name in SHAPES:
            # The same products summed in another order.
            bound = 20 * EPS * 10 * result.diagnostics["l1_norm"]
            assert np.abs(result.params[name] - alone.params[name]).max() <= bound


@pytest.mark.parametrize("form", [list, tuple, np.array])
def test_any_sequence_gives_a_list(run: Run, form: Any) -> None:
    assert isinstance(reconstruct(run.folder, form([0.07, 0.1])), list)
    assert isinstance(reconstruct(run.folder, form([0.07])), list)
    assert isinstance(reconstruct(run.folder, np.float64(0.07)), Reconstruction)


def test_different_lengths_for_different_tensors(run: Run) -> None:
    result = reconstruct(run.folder, {"enc.*": 0.03, "dec.w": 0.2, "*": Uniform(0.25)})
    single = {
        "enc.w": reconstruct(run.folder, 0.03),
        "enc.b": reconstruct(run.folder, 0.03),
        "dec.w": reconstruct(run.folder, 0.2),
        "scale": reconstruct(run.folder, target=Uniform(0.25)),
    }
    for name, expected in single.items():
        bound = 20 * EPS * 10 * expected.diagnostics["l1_norm"]
        assert np.abs(result.params[name] - expected.params[name]).max() <= bound, name
    assert set(result.coefficients) == set(result.profile) == {"enc.*", "dec.w", "*"}
    np.testing.assert_allclose(result.coefficients["dec.w"], single["dec.w"].coefficients)
    assert result.diagnostics["l1_norm"]["enc.*"] == pytest.approx(
        single["enc.w"].diagnostics["l1_norm"]
    )
    # The error of all is that of the parts, weighted by their number of weights.
    shares = {"enc.w": 280, "enc.b": 40, "dec.w": 330, "scale": 1}
    mean = sum(n * single[name].predicted_error ** 2 for name, n in shares.items()) / 651
    assert result.predicted_error == pytest.approx(mean**0.5, rel=1e-6)


def test_the_first_pattern_that_matches_decides(run: Run) -> None:
    first = reconstruct(run.folder, {"*.w": 0.05, "*": 0.10})
    second = reconstruct(run.folder, {"*": 0.10, "*.w": 0.05})
    last = {s.profile.sigma_rel: s for s in SnapshotStore(run.folder).list()}
    np.testing.assert_array_equal(first.params["enc.w"], last[0.05].read("enc.w"))
    np.testing.assert_array_equal(first.params["enc.b"], last[0.10].read("enc.b"))
    np.testing.assert_array_equal(second.params["enc.w"], last[0.10].read("enc.w"))


def test_every_tensor_must_get_a_length(run: Run) -> None:
    with pytest.raises(ValueError, match=r"no pattern matches dec\.w, scale; add '\*'"):
        reconstruct(run.folder, {"enc.*": 0.03})


def test_only_some_names(run: Run) -> None:
    whole = reconstruct(run.folder, 0.07)
    part = reconstruct(run.folder, 0.07, names=["enc.b", "dec.*"])
    assert list(part.params) == ["enc.b", "dec.w"]
    assert part.buffers == {}
    bound = 20 * EPS * 10 * whole.diagnostics["l1_norm"]  # other blocks, other order of sums
    for name, value in part.params.items():
        assert np.abs(value - whole.params[name]).max() <= bound
    assert list(reconstruct(run.folder, 0.07, names="scale").params) == ["scale"]
    with pytest.raises(ValueError, match=r"names: nothing matches 'encoder\.\*'.*enc\.w"):
        reconstruct(run.folder, 0.07, names="encoder.*")


# Other profiles ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "profile",
    [
        Exponential(halflife=10),
        Uniform(0.3),
        Uniform(40),
        PowerFunction(gamma=4.2),
        Custom(cumulative=lambda tau, t: (tau / t) ** 3),
    ],
    ids=repr,
)
@pytest.mark.parametrize("method", ["kriging", "paper"])
def test_any_profile_as_target(run: Run, profile: Any, method: str) -> None:
    result = reconstruct(run.folder, target=profile, method=method)
    assert_combination(result, run.folder)
    assert result.profile is profile
    error = relative_rms(result.params["dec.w"], run.true_average(profile)["dec.w"])
    # Averages over a few dozen steps of a walk of 0.1 a step, from 16 snapshots: the worst of
    # these, the hard edges of a uniform window, are off by some percent.
    assert error < 0.08


def test_a_cubic_custom_profile_is_a_power_function(run: Run) -> None:
    custom = reconstruct(run.folder, target=Custom(cumulative=lambda tau, t: (tau / t) ** 3))
    power = reconstruct(run.folder, target=PowerFunction(gamma=2))
    np.testing.assert_allclose(custom.coefficients, power.coefficients, rtol=0, atol=1e-6)


def test_several_profiles(run: Run) -> None:
    results = reconstruct(run.folder, target=[Uniform(0.2), PowerFunction(0.07)])
    assert [r.profile for r in results] == [Uniform(0.2), PowerFunction(0.07)]


# Time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [36, 40, 47.5, 59.99, 60])
def test_an_earlier_time_uses_no_snapshot_from_the_future(run: Run, t: float) -> None:
    result = reconstruct(run.folder, 0.07, t=t)
    assert result.t == t
    assert max(s for s, _ in result.inputs) <= t
    assert_combination(result, run.folder)
    past = [(s.t, s.profile) for s in SnapshotStore(run.folder).list() if s.t <= t]
    assert list(result.inputs) == past


def test_an_earlier_time_is_the_same_as_asking_then(run: Run, tmp_path: Path) -> None:
    import shutil

    later = reconstruct(run.folder, 0.07, t=60)
    shutil.copytree(run.folder, tmp_path / "then")
    store = SnapshotStore(tmp_path / "then")
    store.delete(s for s in store.list() if s.t > 60)
    then = reconstruct(tmp_path / "then", 0.07)
    assert then.t == 60
    np.testing.assert_array_equal(later.coefficients, then.coefficients)
    for name in SHAPES:
        np.testing.assert_array_equal(later.params[name], then.params[name])


def test_an_earlier_time_comes_near_the_average_of_that_time(run: Run) -> None:
    for t in (48, 60):
        found = reconstruct(run.folder, 0.15, t=t).params["dec.w"]
        right = relative_rms(found, run.true_average(PowerFunction(0.15), t)["dec.w"])
        wrong = relative_rms(found, run.true_average(PowerFunction(0.15), t - 12)["dec.w"])
        assert right < wrong / 5


@pytest.mark.parametrize("t", [96.5, 97, 1000, 11.9, 0, -5, float("nan"), float("inf")])
def test_times_outside_the_snapshots_are_refused(run: Run, t: float) -> None:
    with pytest.raises(ValueError, match=r"outside the snapshots of .* from t=12 to t=96 steps"):
        reconstruct(run.folder, 0.07, t=t)


def test_the_unit_of_time_does_not_matter(run: Run, tmp_path: Path) -> None:
    images = record(tmp_path / "images", unit=2048)
    a, b = reconstruct(run.folder, 0.07), reconstruct(images.folder, 0.07)
    np.testing.assert_allclose(a.coefficients, b.coefficients, rtol=0, atol=1e-9)
    assert b.t == 96 * 2048
    assert b.predicted_error == pytest.approx(a.predicted_error, rel=1e-6)


# Few snapshots -------------------------------------------------------------------------------


def test_one_snapshot_is_all_there_is(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path)
    ema.update({"w": np.arange(4.0)})
    ema.snapshot()
    result = reconstruct(tmp_path, 0.07)
    np.testing.assert_array_equal(result.params["w"], np.arange(4.0))
    assert np.isnan(result.predicted_error), "one snapshot cannot tell how weights move"
    assert any("one snapshot" in remark for remark in result.diagnostics["remarks"])


def test_one_track_works_less_well(tmp_path: Path) -> None:
    run = record(tmp_path / "one", sigma_rel=(0.10,))
    result = reconstruct(run.folder, 0.07)
    assert_combination(result, run.folder)
    error = relative_rms(result.params["dec.w"], run.true_average(PowerFunction(0.07))["dec.w"])
    assert error == pytest.approx(result.predicted_error, rel=0.35)  # as for two tracks


def test_uneven_tracks_are_used_as_they_are(run: Run, tmp_path: Path) -> None:
    # A kill between the two files of one time leaves one track without its last snapshot.
    import shutil

    shutil.copytree(run.folder, tmp_path / "cut")
    store = SnapshotStore(tmp_path / "cut")
    store.delete(store.list()[-1:])
    result = reconstruct(store, 0.07)
    assert result.t == 96
    assert len(result.inputs) == 15
    assert_combination(result, store.path)


# Misuse --------------------------------------------------------------------------------------


def test_folders_without_snapshots(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"missing does not exist; give the folder that EMA"):
        reconstruct(tmp_path / "missing", 0.07)
    with pytest.raises(SnapshotError, match="holds no snapshots"):
        reconstruct(tmp_path, 0.07)


def test_arguments_are_checked(run: Run) -> None:
    wrong: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (None, {}, TypeError, "either sigma_rel or target"),
        (0.07, {"target": Uniform(0.2)}, TypeError, "either sigma_rel or target"),
        (0.0, {}, ValueError, r"must be in \(0, 0\.288675\]"),
        (0.3, {}, ValueError, "no average is longer"),
        (-0.1, {}, ValueError, "must be in"),
        (float("nan"), {}, ValueError, "must be finite"),
        ([0.07, 0.4], {}, ValueError, r"got \[0\.4\]"),
        ([], {}, ValueError, "no targets"),
        ({}, {}, ValueError, "mapping .* is empty"),
        ("long", {}, TypeError, "must be a number"),
        (0.07, {"method": "magic"}, ValueError, "method must be one of kriging, paper"),
        (0.07, {"framework": "tensorflow"}, ValueError, "framework must be one of numpy, torch"),
    ]
    for sigma_rel, arguments, kind, message in wrong:
        with pytest.raises(kind, match=message):
            reconstruct(run.folder, sigma_rel, **arguments)


def test_nothing_is_printed_unless_asked(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    reconstruct(run.folder, 0.07)
    reconstruct(run.folder, 0.07, progress=False)
    assert capfd.readouterr() == ("", "")
