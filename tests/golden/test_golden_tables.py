"""The committed tables are what their script writes: neither was changed alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from helpers import GOLDEN, load_golden

mpmath = pytest.importorskip("mpmath", reason="recomputes golden tables with mpmath")

from precompute import exact, tables  # noqa: E402


def _same(recomputed: Any, committed: Any) -> None:
    assert json.loads(json.dumps(recomputed)) == committed


@pytest.mark.parametrize("name", ["conversion", "updates"])
def test_quick_tables_whole(name: str) -> None:
    _same(tables.TABLES[name](), load_golden(name))


def _conversion_entry() -> None:
    committed = load_golden("conversion")["gamma"]
    _same([*committed[:-1], committed[-1] * (1 + 3e-16)], committed)


def _table_of_another_script() -> None:
    _same(tables.updates(), load_golden("conversion"))


@pytest.mark.parametrize("drift", [_conversion_entry, _table_of_another_script])
def test_drift_is_noticed(drift: Callable[[], None]) -> None:
    with pytest.raises(AssertionError):
        drift()


def test_some_inner_products() -> None:
    rows = load_golden("inner_products")["rows"]
    for t_a, profile_a, t_b, profile_b, value in [*rows[:80:9], rows[-1]]:
        a, b = (t_a, tuple(profile_a)), (t_b, tuple(profile_b))
        _same(float(exact.inner_product(a, b)), value)


def test_closed_form_is_the_integral() -> None:
    """Eq. 151 against direct quadrature of the two densities."""
    a, b = (3.0, ("power", 0.05)), (8.0, ("power", 0.13))
    integral = mpmath.quad(lambda tau: exact.density(a, tau) * exact.density(b, tau), [0, 1, 2, 3])
    assert abs(integral / exact.inner_product(a, b) - 1) < mpmath.mpf(10) ** -30


def test_survival_closed_form_is_the_integral() -> None:
    """The same for the products that kriging needs, with a rate that changes."""
    a, b = (3.0, ("power", 0.05)), (8.0, ("power", 0.13))

    def integrand(tau: Any) -> Any:
        return (1 - exact.cumulative(a, tau)) * (1 - exact.cumulative(b, tau))

    integral = 2 * mpmath.quad(integrand, [0, 0.5]) + 5 * mpmath.quad(integrand, [0.5, 2, 3])
    closed = exact.survival_product(a, b, [0.0, 0.5, 8.0], [2.0, 5.0])
    assert abs(integral / closed - 1) < mpmath.mpf(10) ** -30


def test_one_solve_of_each_kind() -> None:
    case = load_golden("paper_solves")["1 track"]
    _same(tables._paper_case(_tuples(case["inputs"]), _tuples(case["targets"])), case)
    case = load_golden("kriging_solves")["slowing down"]
    arguments = (case["edges"], case["rate"], case["noise"])
    _same(tables._kriging_case(_tuples(case["inputs"]), _tuples(case["targets"]), *arguments), case)


def test_a_row_of_the_accuracy_table() -> None:
    rows = [row for row in load_golden("paper_accuracy")["rows"] if row[0] == 8]
    inputs = tables._even(8, (0.05, 0.1))
    solved = exact.paper_solve(inputs, [(8.0, ("power", row[1])) for row in rows])
    _same([float(s["profile_error"]) for s in solved], [row[4] for row in rows])


def test_every_table_has_a_script() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(tables.TABLES)


def _tuples(averages: Any) -> list[Any]:
    return [(t, tuple(profile)) for t, profile in averages]
