"""Random lives of a tracker: updates, bad steps, restarts, swaps; the average is still the sum."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posthoc_ema import EMA, PowerFunction, SnapshotStore
from tests.parity.runs import as_float64, explicit_average, rounding_bound

TRACKS = (0.05, 0.2)

steps = st.one_of(
    st.tuples(st.just("update"), st.floats(0.01, 50)),
    st.tuples(st.just("bad"), st.floats(0.01, 50)),
    st.tuples(st.sampled_from(["restart", "apply", "snapshot", "rollback", "checkpoint"])),
)


class Life:
    """An EMA with everything that should be true of it."""

    def __init__(self, folder: Path, make: Any, seed: int) -> None:
        self.folder, self.make = folder, make
        self.rng = np.random.default_rng(seed)
        self.ema = self.fresh()
        self.knows_model = False  # a resumed tracker meets the model again at its next update
        self.clock = 0.0
        self.times: list[float] = []
        self.values: list[dict[str, Any]] = []
        self.stored: set[float] = set()
        self.saved: Any = None

    def fresh(self) -> EMA:
        return EMA(sigma_rel=TRACKS, snapshots=self.folder, nonfinite="skip")

    def update(self, delta: float) -> None:
        self.clock += delta
        value = self.rng.normal(size=3).astype(np.float32)
        self.ema.update({"w": self.make(value)}, t=self.clock)
        self.knows_model = True
        self.times.append(self.clock)
        self.values.append({"w": value})

    def bad(self, delta: float) -> None:
        self.clock += delta
        self.ema.update({"w": self.make(np.array([0, np.nan, 1], np.float32))}, t=self.clock)

    def restart(self) -> None:
        state = self.ema.state_dict()
        self.ema = self.fresh()
        self.ema.load_state_dict(state)
        self.knows_model = False

    def checkpoint(self) -> None:
        self.saved = (
            self.ema.state_dict(), self.clock, list(self.times), list(self.values)
        )  # fmt: skip

    def rollback(self) -> None:
        if self.saved is None:
            return
        state, self.clock, times, values = self.saved
        self.times, self.values = list(times), list(values)
        self.ema = self.fresh()
        self.ema.load_state_dict(state)
        now = self.times[-1] if self.times else 0
        self.stored = {t for t in self.stored if t <= now}
        self.update(1.0)  # the first update is what sets the future aside

    def apply(self) -> None:
        if self.times:
            model = {"w": self.make(np.array([7, 8, 9], np.float32))}
            with self.ema.applied(model, TRACKS[0]):
                assert as_float64(model["w"]).tolist() != [7, 8, 9]
            assert as_float64(model["w"]).tolist() == [7, 8, 9]

    def snapshot(self) -> None:
        if self.knows_model:
            self.ema.snapshot()
            self.stored.add(self.times[-1])

    def check(self) -> None:
        if not self.times:
            return
        bound = rounding_bound(len(self.times), 4)
        for sigma_rel in TRACKS:
            expected = explicit_average(PowerFunction(sigma_rel), self.times, self.values)["w"]
            found = as_float64(self.ema.average(sigma_rel)["w"])
            assert np.abs(found - expected).max() <= bound
        assert self.ema.t == self.times[-1]
        if self.stored:
            stored = SnapshotStore(self.folder).verify()
            assert {s.t for s in stored} == self.stored
            assert len(stored) == 2 * len(self.stored)


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
@given(actions=st.lists(steps, min_size=1, max_size=14), seed=st.integers(0, 2**16))
def test_the_average_is_the_sum_whatever_happened(make: Any, actions: Any, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)  # durability is tested elsewhere
        life = Life(Path(folder) / "ema", make, seed)
        for name, *arguments in actions:
            getattr(life, name)(*arguments)
        life.check()
