"""What theory expects of the ladder's configs, beside what an ablation saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from reference_model.ablate_results import Outcome
from reference_model.charts import number, plus_minus
from reference_model.ladder import LADDER

LAW_TOLERANCE = 0.1
"""Relative: updates are not exactly orthogonal to weights, nor Adam's of the rate's RMS."""
STILL = 0.01
"""Stored weights are normalised in float32 with an ε of 10⁻⁴: they stand still to this."""
GROWS = 1.1
"""Growth from a quarter of training to its end that counts as growing: less is noise of a batch."""
SETTLED = 0.25
"""Part of training after which gains and learning rate have left their start."""
HALF = (0.35, 0.7)
"""What counts as about half."""


@dataclass(frozen=True)
class Check:
    """One expectation.

    Attributes:
        statement: What theory says, and of which variant.
        expected: The number that follows.
        seen: What was found.
        holds: Whether the two agree.
    """

    statement: str
    expected: str
    seen: str
    holds: bool


def checks(outcomes: Sequence[Outcome]) -> list[Check]:
    """All expectations that these variants can be held against."""
    by_name = {o.name: o for o in outcomes}
    recorded = [o for o in outcomes if o.drift.nimg]
    found: list[Check] = []
    for o in recorded:
        found += [*_stored_weights(o), *_activations(o)]
    return [*found, *_pixel_norm(by_name), *_quality(by_name)]


def _stored_weights(o: Outcome) -> Iterator[Check]:
    if o.drift.law:
        # Relative to the first record: a mean over features of random weights is not quite one.
        seen, law = o.drift.growth("weight"), o.drift.growth("law")
        yield Check(
            f"{o.name}: stored weights grow as √(1 + Σα²) (end of training relative to its start)",
            number(law),
            number(seen),
            abs(seen / law - 1) <= LAW_TOLERANCE,
        )
    elif o.variant.has("forced_norm"):
        low, high = min(o.drift.weight), max(o.drift.weight)
        yield Check(
            f"{o.name}: stored weights keep magnitude one",
            "1",
            number(low) if high - low < STILL / 10 else f"{number(low)} to {number(high)}",
            low >= 1 - STILL and high <= 1 + STILL,
        )


def _activations(o: Outcome) -> Iterator[Check]:
    if o.variant.config not in LADDER:
        return  # the paper says nothing of it
    held = o.variant.has("weight_norm")
    growth = o.drift.growth("activation", SETTLED)
    yield Check(
        f"{o.name}: activations {'do not grow' if held else 'grow'} "
        "(end of training relative to its first quarter)",
        f"{'at most' if held else 'above'} {GROWS:g}",
        number(growth),
        growth <= GROWS if held else growth > GROWS,
    )


def _pixel_norm(by_name: Mapping[str, Outcome]) -> Iterator[Check]:
    whole, without = by_name.get("G"), by_name.get("G-pixel_norm")
    if whole and without and whole.drift.nimg and without.drift.nimg:
        ratio = without.drift.activation[-1] / whole.drift.activation[-1]
        yield Check(
            "G without pixel norm: activations sink to about half of G’s",
            "0.5",
            number(ratio),
            HALF[0] <= ratio <= HALF[1],
        )


def _quality(by_name: Mapping[str, Outcome]) -> Iterator[Check]:
    first, last = by_name.get("A"), by_name.get("G")
    if first and last:
        gain = first.best.mean - last.best.mean
        error = (first.best.error**2 + last.best.error**2) ** 0.5
        alone = 1 in (len(first.seeds), len(last.seeds))
        yield Check(
            "G is better than A, each at its own best EMA length (difference of distances"
            f"{', one training each' if alone else ''})",
            "above 0, clearly",
            plus_minus(gain, error),
            gain > 2 * error,
        )
