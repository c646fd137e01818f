"""Metrics that tests search over."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pytest

from posthoc_ema import Reconstruction, evaluations, reconstruct


def sigma_rel_of(weights: Reconstruction) -> float:
    return weights.profile.sigma_rel  # type: ignore[union-attr]


class Metric:
    """A metric of the length alone, which remembers its calls."""

    def __init__(self, function: Callable[[float], Any], stop_after: int = 10**9) -> None:
        self.function, self.stop_after = function, stop_after
        self.calls: list[float] = []

    def __call__(self, weights: Reconstruction) -> Any:
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(sigma_rel_of(weights))
        return self.function(sigma_rel_of(weights))


def valley(best: float) -> Callable[[float], float]:
    return lambda s: 2 + log(s / best) ** 2


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many lengths each pass over the snapshots makes."""
    passes: list[int] = []

    def counting(snapshots: Any, sigma_rel: Any, **options: Any) -> Any:
        passes.append(len(sigma_rel))
        return reconstruct(snapshots, sigma_rel, **options)

    monkeypatch.setattr(evaluations, "reconstruct", counting)
    return passes
