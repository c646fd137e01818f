"""Pictures: what they show is what the library computed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, run_python
from small_run import write_run

from posthoc_ema import Custom, Exponential, PowerFunction, Uniform, predict_error, reconstruct
from posthoc_ema.plots import TRUSTED_ERROR, plot_coefficients, plot_error, plot_profiles

Figure = pytest.importorskip("matplotlib.figure").Figure


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "ema", unit="images")


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def curves(axes: Any, points: int) -> list[Any]:
    """Coordinates ``[2, n]`` of the lines with at least so many points."""
    data = [np.array(line.get_data(), dtype=float) for line in axes.get_lines()]
    return [line for line in data if line.shape[1] >= points]


def test_profiles_of_exact_averages_lie_on_the_wanted_ones(run: Path) -> None:
    """At a tracked length the combination is one snapshot: its profile, in log time."""
    axes = plot_profiles(run, 0.1)
    (curve,) = curves(axes, 1000)
    age, weight = curve
    expected = PowerFunction(0.1).density(320 * (1 - age), 320) * 320 * age
    assert_close(weight, expected, rtol=1e-12, reason="the same formula")
    assert legend(axes)[0].endswith("profile error 0.0 %")


def test_profiles_show_what_a_combination_misses(run: Path) -> None:
    """The twin of the test above: two snapshots cannot give a uniform profile."""
    axes = plot_profiles(run, Uniform(0.2))
    assert not legend(axes)[0].endswith("profile error 0.0 %")


def test_areas_are_weights(run: Path) -> None:
    """Equal areas on the logarithmic axis are equal weight: each curve encloses about one."""
    for age, weight in curves(plot_profiles(run, [0.03, 0.07, 0.15]), 1000):
        area = np.diff(np.log(age)) @ (weight[1:] + weight[:-1]) / 2
        # At ages below 0.0015, 1 - (1 - 0.0015)**31 = 4.5 % of the shortest average are cut off.
        assert_close(area, 0.975, atol=0.025, reason="the tail that is not drawn")


def test_profiles_of_every_kind_have_a_name(run: Path) -> None:
    axes = plot_profiles(
        run, [0.03, Exponential(30), Uniform(0.2), Custom(lambda tau, t: (tau / t) ** 2)]
    )
    names = [text.split(":")[0] for text in legend(axes)]
    assert names == [
        r"$\sigma_\mathrm{rel}$ 0.03",
        "exponential, half-life 30",
        "uniform, window 0.2",
        "custom profile",
        "snapshot times",
    ]


def test_coefficients_are_those_of_the_solution(run: Path) -> None:
    weights = reconstruct(run, 0.07)
    axes = plot_coefficients(run, 0.07)
    drawn = curves(axes, 16)
    assert_close(
        np.sort(np.concatenate([y for _, y in drawn])),
        np.sort(weights.coefficients),
        rtol=1e-12,
        reason="the same computation",
    )
    assert [list(x) for x, _ in drawn] == [list(range(20, 321, 20))] * 2
    assert f"Σ|x| = {weights.diagnostics['l1_norm']:.3g}" in legend(axes)[0]


def test_results_can_be_drawn_instead_of_a_folder(run: Path) -> None:
    results = reconstruct(run, [0.03, 0.07])
    for plot in (plot_profiles, plot_coefficients):
        from_results, from_folder = plot(results), plot(run, [0.03, 0.07])
        assert legend(from_results) == legend(from_folder)
    by_name = reconstruct(run, {"*.bias": 0.03, "*": 0.07})
    assert legend(plot_coefficients(by_name))[0].startswith("*.bias: ")
    with pytest.raises(TypeError, match="a result has its own"):
        plot_profiles(results, 0.07)


def test_error_curve_and_trusted_range(run: Path) -> None:
    limit = float(predict_error(run, 0.03))
    axes = plot_error(run, [0.02, 0.2], max_error=limit)
    curve = max(curves(axes, 100), key=lambda line: line.shape[1])
    sigma_rel, error = curve
    assert (sigma_rel[0], sigma_rel[-1]) == (0.02, 0.2)
    expected = predict_error(run, sigma_rel.tolist())
    assert_close(error, expected, rtol=1e-12, reason="the same computation")
    (shaded,) = axes.collections
    trusted = sigma_rel[error <= limit]
    assert 10 < len(trusted) < len(sigma_rel) - 10, "the run must have both kinds of lengths"
    edges = shaded.get_paths()[0].vertices[:, 0]
    assert (edges.min(), edges.max()) == (trusted.min(), trusted.max())
    assert legend(axes) == [f"trusted: at most {limit:g}", "tracked lengths"]


def test_error_has_bounds_and_a_limit_of_its_own(run: Path) -> None:
    axes = plot_error(run)
    assert axes.get_xlim() == (0.01, 0.25)
    assert f"trusted: at most {TRUSTED_ERROR:g}" in legend(axes)


@pytest.mark.parametrize("lengths", [[0.07], [0.07, 0.07]])
def test_error_needs_two_lengths(run: Path, lengths: list[float]) -> None:
    with pytest.raises(ValueError, match=r"give two or more \(got 0.07\)"):
        plot_error(run, lengths)


def test_labels_say_what_and_in_which_unit(run: Path) -> None:
    for plot in (plot_profiles, plot_coefficients, plot_error):
        axes = plot(run)
        assert axes.get_title(loc="left")
        assert "fraction" in axes.get_xlabel() or "(images)" in axes.get_xlabel()
        assert axes.get_ylabel()


def test_one_snapshot_and_weights_at_rest(tmp_path: Path) -> None:
    """Nothing to predict from, and nothing to predict: still pictures, without a warning."""
    one = write_run(tmp_path / "one", every=320, sigma_rel=0.05)
    axes = plot_error(one)
    axes.figure.savefig(tmp_path / "one.png")
    assert any("a single snapshot cannot tell" in text.get_text() for text in axes.texts)
    plot_profiles(one).figure.savefig(tmp_path / "one.png")
    plot_coefficients(one).figure.savefig(tmp_path / "one.png")


def test_given_axes_are_drawn_on(run: Path, tmp_path: Path) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, plot in zip(
        figure.subplots(1, 3), (plot_profiles, plot_coefficients, plot_error), strict=True
    ):
        assert plot(run, axes=axes) is axes
    figure.savefig(tmp_path / "three.png")


def test_no_state_of_pyplot_is_touched(run: Path) -> None:
    printed = run_python(
        "-c",
        "import sys\n"
        "from posthoc_ema.plots import plot_error\n"
        "plot_error(sys.argv[1])\n"
        "print('matplotlib.pyplot' in sys.modules)",
        str(run),
    )
    assert printed.strip() == "False"


def test_importing_the_module_loads_no_matplotlib() -> None:
    code = "import sys, posthoc_ema.plots; print('matplotlib' in sys.modules)"
    assert run_python("-c", code).strip() == "False"


def test_without_matplotlib_the_error_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'posthoc-ema\[plots\]'"):
        plot_error(run)
