"""The small linear problem: which combination of stored averages comes nearest to a target.

Three methods. ``"paper"`` minimises the squared distance of the *densities* (Eq. 151), which
takes the weights for white noise over time. ``"kriging"`` minimises the expected squared
error of the *weights*: that of the cumulative profiles, weighted by how fast the weights
move, plus what storage rounding adds. ``"plain"`` takes the inputs for all there was of
training, as LAWA and SWA do with raw checkpoints. No files, numpy only, always in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.kriging import Kriging
from posthoc_ema.movement import Movement
from posthoc_ema.profiles import (
    PowerFunction,
    Profile,
    Uniform,
    as_profile,
    inner_product,
    power_inner_products,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

METHODS = ("kriging", "paper", "plain")


@dataclass(frozen=True, eq=False)
class Solution:
    """Coefficients for one target (arrays without the leading axis) or for ``k`` targets.

    Attributes:
        coefficients: ``[k, n]`` float64, aligned with the inputs; each row sums to one. Inputs
            later than the target have exactly 0.
        profile_error: ``[k]`` L2 distance of the combined density from the target's, relative
            to the target's norm. NaN where a profile has no density of finite norm.
        expected_square: ``[k]`` expected squared error per weight under the movement and noise
            given, in squared units of the weights (of r = 1 where none was given).
        condition_number: ``[k]`` of the equilibrated system.
        nearest_square: ``[k]`` the same as ``expected_square`` for the best single input.
    """

    coefficients: NDArray[np.float64]
    profile_error: NDArray[np.float64]
    expected_square: NDArray[np.float64]
    condition_number: NDArray[np.float64]
    nearest_square: NDArray[np.float64]

    @property
    def l1_norm(self) -> NDArray[np.float64]:
        """Σ|x|: bounds how much the largest error of any input is amplified."""
        return np.abs(self.coefficients).sum(-1)

    @property
    def l2_norm(self) -> NDArray[np.float64]:
        """√Σx²: amplification of independent rounding errors."""
        return np.sqrt((self.coefficients**2).sum(-1))

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        return np.array(self.coefficients, dtype=dtype)

    def __getitem__(self, index: int) -> Solution:
        """One target of several."""
        return Solution(
            self.coefficients[index],
            self.profile_error[index],
            self.expected_square[index],
            self.condition_number[index],
            self.nearest_square[index],
        )


def solve(
    inputs: Sequence[tuple[float, Profile | float]],
    targets: tuple[float, Profile | float] | Sequence[tuple[float, Profile | float]],
    *,
    method: str = "kriging",
    movement: Movement | None = None,
    noise: Sequence[float] | NDArray[np.float64] | None = None,
    slack: float = 0.0,
) -> Solution:
    """Coefficients that combine averages into other averages of the same trajectory.

    Args:
        inputs: ``n`` stored averages as (t, profile); a number instead of a profile is its
            σ_rel. t > 0, one unit throughout.
        targets: One (t, profile), or a sequence of ``k``. Only inputs with t_i <= t are used.
        method: ``"kriging"``; ``"paper"`` for Algorithm 3 with coefficients rescaled to sum
            to one; or ``"plain"`` for the average that updates at the times of the inputs alone,
            of which there must be one for each time, would have given: of evenly spaced raw
            checkpoints under a ``Uniform`` target their mean.
        movement: How fast the weights moved (kriging); default: at a constant rate of 1.
        noise: ``[n]`` variance of storage rounding per weight, in the same units as the
            movement; default: 1e-14 of the movement up to the last input, float32's rounding.
        slack: By how much the expected error may exceed the least, relative to it, so that fewer
            inputs are needed (kriging): the coefficients of the others are exactly 0. With 0.005,
            of 32 times and two tracks often a dozen are left.

    Returns:
        A :class:`Solution`; its arrays have a leading axis of ``k`` if ``targets`` is a
        sequence.

    Raises:
        ValueError: If there are no inputs, none at or before a target, or a value is outside
            its domain.

    Example:
        >>> inputs = [(t, s) for t in (1, 2, 3, 4) for s in (0.05, 0.10)]
        >>> x = solve(inputs, (4, 0.07), method="paper").coefficients
        >>> float(x.sum().round(12)), int(x.argmax())
        (1.0, 7)

    Source:
        Karras et al. 2024, arXiv:2312.02696, Algorithm 3, Eq. 151 (``"paper"``); ordinary
        kriging of an intrinsic random function, e.g. Chilès & Delfiner 2012, ch. 3.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)} (got {method!r})")
    check_slack(slack)
    known = [(_time(t), as_profile(profile)) for t, profile in inputs]
    if not known:
        raise ValueError("solve needs at least one input (got none)")
    single = len(targets) == 2 and np.ndim(targets[0]) == 0  # type: ignore[arg-type]
    listed: Any = [targets] if single else targets
    wanted = [(_time(t), as_profile(profile)) for t, profile in listed]
    if movement is None:
        movement = Movement.constant(max(t for t, _ in known))
    if noise is None:
        unit = float(np.sum(np.diff(movement.edges) * movement.rate)) or 1.0
        noise = np.full(len(known), 1e-14 * unit)
    noise = np.asarray(noise, dtype=np.float64)
    if noise.shape != (len(known),) or not (noise >= 0).all():
        raise ValueError(f"noise must hold {len(known)} variances >= 0 (got {noise})")

    # Targets with the same eligible inputs share one factorisation.
    times = np.array([t for t, _ in known])
    out = Solution(np.zeros((len(wanted), len(known))), *np.full((4, len(wanted)), np.nan))
    for last in dict.fromkeys(t for t, _ in wanted):
        rows = [k for k, (t, _) in enumerate(wanted) if t == last]
        usable = np.flatnonzero(times <= last)
        if not len(usable):
            raise ValueError(
                f"no input at or before the target's t={last:g}; the earliest is {times.min():g}"
            )
        subset = [known[i] for i in usable]
        goals = [wanted[k] for k in rows]
        kriging = Kriging(subset, goals, movement, noise[usable])
        if method == "kriging":
            x, condition = kriging.coefficients()
        elif method == "paper":
            x, condition = _paper_coefficients(subset, goals)
        else:
            x, condition = _plain_coefficients(subset, goals), 1.0
        for row, goal in zip(x, goals, strict=True):
            if goal in subset:  # a stored average is itself, to the last bit
                row[:] = 0
                row[subset.index(goal)] = 1
        if slack and method == "kriging":
            x = kriging.sparser(x, slack)
        out.coefficients[np.array(rows)[:, None], usable] = x
        out.expected_square[rows] = kriging.expected_square(x)
        out.condition_number[rows] = condition
        out.nearest_square[rows] = kriging.nearest_square()
        out.profile_error[rows] = _profile_error(subset, goals, x)
    return out[0] if single else out


def check_slack(slack: float) -> None:
    """Raise ValueError for what is no share."""
    if not 0 <= slack < np.inf:
        raise ValueError(f"slack must be finite and >= 0 (got {slack})")


def _paper_coefficients(
    inputs: list[tuple[float, Profile]], targets: list[tuple[float, Profile]]
) -> tuple[NDArray[np.float64], float]:
    """Algorithm 3, then x/Σx: constant weights must come back as they are."""
    gram = _gram(inputs, inputs)
    # Unit diagonal: takes a factor of about ten, and all units, out of the condition number.
    scale = 1 / np.sqrt(np.diag(gram))
    right = _gram(inputs, targets) * scale[:, None]
    x, condition = _solve_psd(gram * scale[:, None] * scale, right)
    x *= scale[:, None]
    total = x.sum(0)
    if not (np.abs(total) > 1e-3).all():
        raise ValueError(
            "the coefficients of the paper's solve vanish: the target lies where no input has "
            'weight; use method="kriging" or snapshots nearer to the target'
        )
    return (x / total).T, condition


def _plain_coefficients(
    inputs: list[tuple[float, Profile]], targets: list[tuple[float, Profile]]
) -> NDArray[np.float64]:
    """What the targets give to the time from the input before to each; the last one, the rest."""
    times = np.array([t for t, _ in inputs])
    order = np.argsort(times)
    if not (np.diff(times[order]) > 0).all():
        raise ValueError(
            'method="plain" needs one input for each time, such as raw checkpoints; of several '
            'averages use method="kriging"'
        )
    x = np.empty((len(targets), len(inputs)))
    for row, (t, profile) in zip(x, targets, strict=True):
        shares = profile.cumulative(times[order], t)
        shares[-1] = 1
        row[order] = np.diff(shares, prepend=0.0)
    return x


def _solve_psd(
    matrix: NDArray[np.float64], right: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Solve with a symmetric matrix that may be singular to working precision."""
    values, vectors = np.linalg.eigh(matrix)
    # Directions below rounding hold no information; the minimum-norm solution ignores them.
    cutoff = values[-1] * len(values) * np.finfo(np.float64).eps
    kept = values > cutoff
    inverse = np.where(kept, 1 / np.where(kept, values, 1), 0)
    condition = float(values[-1] / max(values[0], cutoff))
    return vectors @ (inverse[:, None] * (vectors.T @ right)), condition


def _profile_error(
    inputs: list[tuple[float, Profile]],
    targets: list[tuple[float, Profile]],
    x: NDArray[np.float64],
) -> NDArray[np.float64]:
    norm = np.array([inner_product(p, t, p, t) for t, p in targets])
    cross = _gram(inputs, targets)
    gram = _gram(inputs, inputs)
    # ‖p* - p_r‖² expanded; rounding can leave it slightly below zero for a perfect match.
    square = norm - 2 * (x * cross.T).sum(1) + ((x @ gram) * x).sum(1)
    return np.sqrt(np.maximum(square, 0) / norm)


def _gram(
    left: list[tuple[float, Profile]], right: list[tuple[float, Profile]]
) -> NDArray[np.float64]:
    """Inner products of densities, ``[left, right]``."""
    if all(isinstance(p, PowerFunction) for _, p in (*left, *right)):
        (t_a, gamma_a), (t_b, gamma_b) = _columns(left), _columns(right)
        return power_inner_products(t_a[:, None], gamma_a[:, None], t_b, gamma_b)
    out = np.empty((len(left), len(right)))
    for i, (t, p) in enumerate(left):
        if isinstance(p, Uniform):
            out[i] = _with_mean(t, p, right)
    for j, (s, q) in enumerate(right):
        if isinstance(q, Uniform):
            out[:, j] = _with_mean(s, q, left)
            continue
        for i, (t, p) in enumerate(left):
            if not isinstance(p, Uniform):
                out[i, j] = inner_product(p, t, q, s)
    return out


def _with_mean(
    t: float, mean: Uniform, averages: list[tuple[float, Profile]]
) -> NDArray[np.float64]:
    """Inner products of a plain mean, as raw checkpoints have, with many: the rise of their F."""
    start = next(iter(mean.breakpoints(t)), 0.0)
    out = np.empty(len(averages))
    for profile in dict.fromkeys(q for _, q in averages):
        chosen = [j for j, (_, q) in enumerate(averages) if q == profile]
        times = np.array([averages[j][0] for j in chosen])
        rise = np.diff(profile.cumulative(np.array([[start], [t]]), times), axis=0)[0]
        out[chosen] = rise / (t - start)
    return out


def _columns(averages: list[tuple[float, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array([t for t, _ in averages]), np.array([p.gamma for _, p in averages])


def _time(t: Any) -> float:
    t = float(t)
    if not 0 < t < np.inf:
        raise ValueError(f"t must be finite and > 0 (got {t})")
    return t
