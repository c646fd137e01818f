"""Guidance: mixtures of denoisers, where each acts, and arguments that do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from reference_model.guidance import Guide, as_guides
from reference_model.sampler import heun_sampler, sigma_steps
from tests.reference_model.test_sampler import GaussianDenoiser, noise

# Guidance of Gaussians of one width is linear in their means, so the solver takes the same steps
# as for the guided mean: equal up to float64 rounding, amplified by the 80-fold noise.
ROUNDING = dict(rtol=1e-10, atol=1e-10)


def guided(mean: float, means: list[float], **options: Any) -> tuple[torch.Tensor, list[Any]]:
    guides = [GaussianDenoiser(m) for m in means]
    return heun_sampler(GaussianDenoiser(mean), noise(), gnet=guides, **options), guides


def test_a_mixture_adds_what_each_guide_pushes() -> None:
    """D = D_m + Σ (w_i − 1)(D_m − D_i)."""
    x, _ = guided(0.3, [-0.1, 0.2], guidance=[2.0, 1.5])
    mean = 0.3 + 1.0 * (0.3 + 0.1) + 0.5 * (0.3 - 0.2)
    torch.testing.assert_close(x, heun_sampler(GaussianDenoiser(mean), noise()), **ROUNDING)
    other, _ = guided(0.3, [-0.1, 0.2], guidance=[1.5, 2.0])
    assert (x - other).abs().max() > 0.01


def test_a_mixture_of_one_is_plain_guidance() -> None:
    x, _ = guided(0.3, [-0.1], guidance=[2.0])
    plain = heun_sampler(GaussianDenoiser(0.3), noise(), gnet=GaussianDenoiser(-0.1), guidance=2)
    torch.testing.assert_close(x, plain, rtol=0, atol=0)


def test_no_guides_are_no_guidance() -> None:
    x, _ = guided(0.3, [], guidance=[], guidance_interval=[])
    plain = heun_sampler(GaussianDenoiser(0.3), noise())
    torch.testing.assert_close(x, plain, rtol=0, atol=0)


def test_each_guide_is_evaluated_only_where_it_acts() -> None:
    steps = sigma_steps(32).tolist()
    interval = (steps[22], steps[17])
    _, (first, second, third) = guided(
        0.3, [-0.1, 0.2, 0.1], guidance=[2.0, 1.5, 1.0], guidance_interval=[interval, None, None]
    )
    assert sorted(set(first.sigmas), reverse=True) == steps[17:22]
    assert sorted(set(second.sigmas), reverse=True) == steps[:-1]
    assert third.sigmas == []  # w = 1


@pytest.mark.parametrize("interval", [(0.2, 2.0), [0.2, 2.0]], ids=["tuple", "list"])
def test_one_interval_serves_all_guides(interval: Any) -> None:
    guides = as_guides(["a", "b"], [2, 3], interval)
    assert guides == (Guide("a", 2, interval), Guide("b", 3, interval))
    assert [g.acts_at(0.2) for g in guides] == [False, False]
    assert [g.acts_at(2.0) for g in guides] == [True, True]
    assert [g.acts_at(math.inf) for g in guides] == [False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], 2.0, None), r"2 guiding networks need as many values of guidance \(got 2\.0"),
        ((["a", "b"], [2.0], None), r"2 guiding networks need as many"),
        ((["a"], [2.0], [None, None]), r"one interval or as many \(got \[None, None\]\)"),
        (("a", math.nan, None), r"guidance must be a finite number \(got nan\)"),
        (("a", 2.0, (2.0, 1.0)), r"0 <= lo < hi \(got \(2\.0, 1\.0\)\)"),
        (("a", 2.0, (-1.0, 1.0)), r"0 <= lo < hi"),
        (([None], [2.0], None), r"guidance=2\.0 needs a network"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_guides(*arguments)
