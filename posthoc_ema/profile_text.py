"""Profiles as text: on the command line and in tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from posthoc_ema.profiles import Exponential, PowerFunction, Profile, Uniform

_PROFILES: Mapping[tuple[str, str], Callable[[float], Profile]] = {
    ("exponential", "halflife"): Exponential,
    ("exponential", "beta"): Exponential.from_beta,
    ("uniform", "window"): Uniform,
    ("power", "sigma_rel"): PowerFunction,
    ("power", "gamma"): lambda gamma: PowerFunction(gamma=gamma),
    ("raw", "step"): lambda step: raw_weights(step),
}


def raw_weights(step: float = 1) -> Uniform:
    """The profile of weights that were not averaged: all on the last step before their time.

    Args:
        step: Length of a training step, in units of t.
    """
    return Uniform(window=step, relative=False)


def parse_profile(text: str) -> Profile:
    """A profile written as ``kind:field=value``; ``raw`` for weights that were not averaged.

    Raises:
        ValueError: If there is no such form, or the value is outside its domain.

    Example:
        >>> parse_profile("exponential:halflife=1000")
        Exponential(halflife=1000.0)
        >>> parse_profile("raw")
        Uniform(window=1.0, relative=False)
    """
    if text.strip() == "raw":
        return raw_weights()
    kind, _, setting = text.partition(":")
    field, _, number = setting.partition("=")
    make = _PROFILES.get((kind.strip(), field.strip()))
    if make is None:
        forms = ", ".join(f"{k}:{f}=..." for k, f in _PROFILES)
        raise ValueError(f"{text!r} is no profile; the forms are {forms}, raw")
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"{number.strip()!r} in {text!r} is not a number") from None
    return make(value)
