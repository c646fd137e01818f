"""Torch runs that remember what they gave to their EMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from posthoc_ema import EMA, PowerFunction
from tests.parity.runs import as_float64, assert_average, explicit_average

SIGMA = 0.1


class Recorder:
    """Updates an EMA and remembers what it was given, by state-dict name."""

    def __init__(self, ema: EMA, tracked: Callable[[], dict[str, torch.Tensor]]) -> None:
        self.ema, self.tracked = ema, tracked
        self.history: list[dict[str, Any]] = []

    def update(self, model: Any) -> None:
        self.ema.update(model)
        self.history.append({n: as_float64(p).copy() for n, p in self.tracked().items()})

    def check(self, dtype: Any = np.float32) -> None:
        steps = len(self.history)
        expected = explicit_average(PowerFunction(SIGMA), range(1, steps + 1), self.history)
        found = {name: self.ema.average(SIGMA)[name] for name in expected}
        assert_average(found, expected, steps, dtype)


def recorded(module: nn.Module, ema: EMA | None = None) -> Recorder:
    return Recorder(ema or EMA(sigma_rel=SIGMA), lambda: dict(module.named_parameters()))


def jitter(model: nn.Module | dict[str, torch.Tensor], seed: int) -> None:
    """Move all floating tensors in place, as an optimiser does."""
    generator = torch.Generator().manual_seed(seed)
    tensors = model.parameters() if isinstance(model, nn.Module) else model.values()
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


def train(recorder: Recorder, model: Any, steps: int, start: int = 0) -> None:
    for step in range(steps):
        jitter(model, start + step)
        recorder.update(model)
