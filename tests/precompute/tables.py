"""What each golden table holds. Each function returns one table, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from mpmath import mp

from precompute import exact
from precompute.exact import Average

SIGMA_REL_MAX = 12**-0.5

Table = dict[str, Any]


def numbers(values: Iterable[Any]) -> list[float]:
    """Nearest float64 of each."""
    return [float(value) for value in values]


def conversion() -> Table:
    """γ of σ_rel over the whole domain, densest where γ → 0, and σ_rel of γ."""
    spread = [10 ** (-4 + k * (math.log10(SIGMA_REL_MAX) + 4) / 60) for k in range(60)]
    printed = [0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.13, 0.15, 0.2, 0.25, 0.28]
    near_end = [SIGMA_REL_MAX - 10.0**-k for k in range(2, 17)]
    last = [SIGMA_REL_MAX]
    for _ in range(20):
        last.append(math.nextafter(last[-1], 0))
    sigma_rels = sorted({*spread, *printed, *near_end, *last})
    gammas = [0.0, *(10.0**k for k in range(-18, 9)), 0.5, 1.0, 6.94, 16.97, 96.99]
    return {
        "sigma_rel": sigma_rels,
        "gamma": numbers(map(exact.gamma_of, sigma_rels)),
        "given_gamma": gammas,
        "sigma_rel_of_gamma": numbers(map(exact.sigma_rel_of, gammas)),
    }


def updates() -> Table:
    """β and 1-β at many steps, from the second update to 2²⁰, and over uneven intervals."""
    steps = [(float(n), 1.0) for n in (2, 3, 10, 100, 1000, 4096, 2**20)]
    # t_next - t_delta is exact in float64, so that either may be passed on.
    uneven = [(7.5, 7.25), (1e9, 2048.0), (2.0**31, 8.0), (2.0**-10, 2.0**-24), (3.0, 2.0**-40)]
    rows = []
    for sigma_rel in (0.01, 0.05, 0.1, 0.2, 0.28, SIGMA_REL_MAX):
        for t_next, t_delta in steps + uneven:
            value = exact.beta(sigma_rel, t_next, t_delta)
            rows.append([sigma_rel, t_next, t_delta, float(value), float(1 - value)])
    return {"columns": ["sigma_rel", "t_next", "t_delta", "beta", "one_minus_beta"], "rows": rows}


def inner_products() -> Table:
    """⟨p_a, p_b⟩ of power functions, and of the other profiles with them and each other."""
    power = [
        (1.0, 0.05), (1.0, 0.1), (2.0, 0.05), (2.0, 0.1), (3.0, 0.05), (7.0, 0.1),
        (8.0, 0.13), (8.0, 0.2), (0.5, 0.05), (8.0, 0.05), (8.0, 0.01), (8.0, 0.28),
    ]  # fmt: skip
    averages: list[Average] = [(t, ("power", s)) for t, s in power]
    pairs = [(a, b) for i, a in enumerate(averages) for b in averages[: i + 1]]
    others: list[Average] = [
        (8.0, ("exponential", 0.5)),
        (8.0, ("exponential", 20.0)),
        (5.0, ("exponential", 1.0)),
        (8.0, ("uniform", 0.25)),
        (6.0, ("uniform", 1.0)),
    ]
    partners: list[Average] = [
        (1.0, ("power", 0.05)), (6.5, ("power", 0.1)), (8.0, ("power", 0.02)),
        (8.0, ("power", 0.28)), (9.0, ("power", 0.2)),
    ]  # fmt: skip
    pairs += [(a, b) for a in others for b in [*partners, *others]]
    return {
        "columns": ["t_a", "profile_a", "t_b", "profile_b", "value"],
        "rows": [[*a, *b, float(exact.inner_product(a, b))] for a, b in pairs],
    }


def _even(n: int, sigma_rels: tuple[float, ...]) -> list[Average]:
    """``n`` evenly spaced times, the last at 8."""
    return [(8.0 * k / n, ("power", s)) for k in range(1, n + 1) for s in sigma_rels]


# Times as they come from a run: a batch size that fits no round number, and pauses.
_IRREGULAR = [0.37, 0.9, 1.0, 1.71, 2.9, 3.3, 4.6, 5.05, 6.2, 7.0, 7.93, 8.61]


def _three_tracks() -> list[Average]:
    return [(t, ("power", s)) for t in _IRREGULAR for s in (0.03, 0.08, 0.2)]


def paper_solves() -> Table:
    """Coefficients of Algorithm 3, raw and rescaled."""
    cases = {
        "8 times, 2 tracks": (_even(8, (0.05, 0.1)), 8.0, [0.03, 0.075, 0.13, 0.2]),
        "32 times, 2 tracks": (_even(32, (0.05, 0.1)), 8.0, [0.01, 0.02, 0.03, 0.075, 0.2, 0.25]),
        "12 irregular times, 3 tracks": (_three_tracks(), 8.61, [0.015, 0.05, 0.14, 0.26]),
        "between two times": (_three_tracks()[:24], 5.5, [0.02, 0.05, 0.14]),
        "1 track": (_even(16, (0.1,)), 8.0, [0.05, 0.13, 0.2]),
    }
    return {
        name: _paper_case(inputs, [(t, ("power", s)) for s in sigma_rels])
        for name, (inputs, t, sigma_rels) in cases.items()
    }


def _paper_case(inputs: list[Average], targets: list[Average]) -> Table:
    solved = exact.paper_solve(inputs, targets)
    return {
        "inputs": inputs,
        "targets": targets,
        **{key: numbers(s[key] for s in solved) for key in _PAPER_SCALARS},
        "raw": [numbers(s["raw"]) for s in solved],
        "coefficients": [numbers(s["coefficients"]) for s in solved],
    }


_PAPER_SCALARS = ("sum", "raw_profile_error", "profile_error")


def paper_accuracy() -> Table:
    """Profile error and norms of the coefficients for n evenly spaced times of two tracks."""
    targets: list[Average] = [
        (8.0, ("power", s)) for s in (0.015, 0.02, 0.03, 0.075, 0.13, 0.2, 0.25)
    ]
    rows = []
    for n in (8, 32, 128, 256):
        for (_, (_, sigma_rel)), solved in zip(
            targets, exact.paper_solve(_even(n, (0.05, 0.1)), targets), strict=True
        ):
            x = solved["coefficients"]
            rows.append(
                [
                    n,
                    sigma_rel,
                    *numbers(solved[key] for key in _PAPER_SCALARS),
                    float(mp.fsum(map(abs, x))),
                    float(mp.sqrt(mp.fdot(x, x))),
                ]
            )
    return {"columns": ["n", "sigma_rel", *_PAPER_SCALARS, "l1_norm", "l2_norm"], "rows": rows}


def kriging_solves() -> Table:
    """Coefficients and expected squared error under a given movement and noise."""
    two, three = (0.05, 0.1), _three_tracks()
    spread: list[Average] = [(8.0, ("power", s)) for s in (0.01, 0.03, 0.075, 0.2, 0.25)]
    other: list[Average] = [
        (8.0, ("exponential", 0.4)),
        (8.0, ("uniform", 0.3)),
        (8.0, ("uniform", 1.0)),
    ]
    return {
        name: _kriging_case(*case)
        for name, case in {
            "8 times": (_even(8, two), spread, [0.0, 8.0], [1.0], [1e-7]),
            "32 times, noise of float16": (_even(32, two), spread, [0.0, 8.0], [1.0], [1e-6]),
            "32 times, noise of float32": (_even(32, two), spread, [0.0, 8.0], [1.0], [8e-14]),
            "noise that differs": (
                _even(8, two), spread, [0.0, 8.0], [2.5], [1e-5 * (1 + i % 3) for i in range(16)],
            ),
            "3 tracks at irregular times": (
                three,
                [(8.61, ("power", s)) for s in (0.015, 0.05, 0.14, 0.26)],
                [0.0, 8.61], [0.7], [1e-9],
            ),
            "between two times": (
                three[:24],
                [(5.5, ("power", s)) for s in (0.02, 0.05, 0.14)],
                [0.0, 5.5], [1.0], [1e-8],
            ),
            "slowing down": (
                _even(8, two), spread,
                [0.0, 1.0, 2.5, 4.0, 8.0], [9.0, 3.0, 0.5, 0.02], [1e-7],
            ),
            "other profiles": (_even(8, two), other, [0.0, 8.0], [1.0], [1e-7]),
        }.items()
    }  # fmt: skip


def _kriging_case(
    inputs: list[Average],
    targets: list[Average],
    edges: list[float],
    rate: list[float],
    noise: list[float],
) -> Table:
    noise = noise if len(noise) > 1 else noise * len(inputs)
    solved = exact.kriging_solve(inputs, targets, edges, rate, noise)
    return {
        "inputs": inputs,
        "targets": targets,
        "edges": edges,
        "rate": rate,
        "noise": noise,
        "coefficients": [numbers(s["coefficients"]) for s in solved],
        "expected_square": numbers(s["expected_square"] for s in solved),
    }


def kriging_accuracy() -> Table:
    """Expected squared error and norms of the coefficients for 256 times of two tracks."""
    inputs = _even(256, (0.05, 0.1))
    targets: list[Average] = [(8.0, ("power", s)) for s in (0.01, 0.02, 0.075, 0.13, 0.25, 0.28)]
    rows = []
    for noise in (8e-14, 1e-6):
        solved = exact.kriging_solve(inputs, targets, [0.0, 8.0], [1.0], [noise] * len(inputs))
        for (_, (_, sigma_rel)), s in zip(targets, solved, strict=True):
            x = s["coefficients"]
            norms = float(mp.fsum(map(abs, x))), float(mp.sqrt(mp.fdot(x, x)))
            rows.append([noise, sigma_rel, float(s["expected_square"]), *norms])
    columns = ["noise", "sigma_rel", "expected_square", "l1_norm", "l2_norm"]
    return {"columns": columns, "rows": rows}


TABLES: dict[str, Callable[[], Table]] = {
    "conversion": conversion,
    "updates": updates,
    "inner_products": inner_products,
    "paper_solves": paper_solves,
    "paper_accuracy": paper_accuracy,
    "kriging_solves": kriging_solves,
    "kriging_accuracy": kriging_accuracy,
}
