"""Updates in PyTorch's threads, in our own, and in one: the same numbers to the last bit."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_equal

from posthoc_ema import EMA, native
from posthoc_ema.trackers import torch_plan

pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without a compiler")
needs_team = pytest.mark.skipif(
    torch_plan.torch_threads() is None, reason="PyTorch runs on another runtime"
)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run_in(team: native.Team | None) -> set[int]:
    """The threads that a team calls a function in."""
    found: set[int] = set()
    both = threading.Barrier(2)

    def note(_: Any) -> None:
        found.add(threading.get_native_id())
        if torch.get_num_threads() > 1:
            both.wait(60)  # nobody calls twice before all have begun

    assert team is not None
    team(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(note), None)
    return found


@needs_team
def test_the_team_has_as_many_threads_as_pytorch_is_given(two_threads: None) -> None:
    assert len(run_in(torch_plan.torch_threads())) == 2
    torch.set_num_threads(1)
    assert run_in(torch_plan.torch_threads()) == {threading.get_native_id()}


SIZES = {"large": 1_500_001, "rest": 77, "none": 0, "uneven": 70_003}


def averages() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ema = EMA((0.05, 0.25, 0.1))
    for _ in range(3):
        model = {
            f"{name} {dtype}": torch.randn(size, generator=generator).to(dtype)
            for name, size in SIZES.items()
            for dtype in (torch.float32, torch.bfloat16)
        }
        ema.update(model)
    return {f"{s} {n}": a for s in (0.05, 0.25, 0.1) for n, a in ema.average(s).items()}


def test_all_teams_agree(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    teams = {
        "PyTorch's": torch_plan.torch_threads(),
        "our own": native._start_threads,
        "one": lambda function, argument: function(argument),
    }
    found = {}
    for name, team in teams.items():
        if team is not None:
            monkeypatch.setattr(torch_plan, "torch_threads", lambda team=team: team)
            found[name] = averages()
    for other in found.values():
        for name, values in found["one"].items():
            assert_equal(other[name].numpy(), values.numpy())


def test_without_a_team_pytorch_moves_what_is_large(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_team = averages()
    monkeypatch.setattr(torch_plan, "torch_threads", lambda: None)
    for name, values in averages().items():
        # Each of three steps rounds a float32 of at most eight, in another order.
        assert torch.all((values - with_team[name]).abs() <= 3 * 8 * 2**-23), name


@pytest.mark.parametrize("place", [0, 700_000, -1])
def test_any_part_may_hold_what_is_not_finite(two_threads: None, place: int) -> None:
    model = {"w": torch.zeros(SIZES["large"]), "v": torch.zeros(3)}
    ema = EMA(nonfinite="skip")
    ema.update(model)
    model["w"][place] = torch.inf
    ema.update(model)
    assert ema.skipped == 1
    model["w"][place] = 1
    ema.update(model)
    assert ema.skipped == 1
