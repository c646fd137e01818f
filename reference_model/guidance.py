"""Guidance: a denoiser pushed away from what worse denoisers would answer.

Classifier-free guidance, autoguidance and mixtures of both are one formula that differs only in
the networks put into it: an unconditional one, a smaller or less trained one, or the same run's
weights averaged over another length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guide:
    """A network to be led away from.

    Attributes:
        net: Guiding denoiser, called as `net(x, sigma, class_labels)`.
        guidance: w; 1 is no guidance.
        interval: The guide acts at noise levels σ in `(lo, hi]`; `None`: at all.
    """

    net: Any
    guidance: float
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number (got {self.guidance})")
        low, high = self.interval or (0.0, math.inf)
        if not 0 <= low < high:
            raise ValueError(
                f"a guidance interval is (lo, hi] with 0 <= lo < hi (got {self.interval})"
            )
        if self.guidance != 1 and self.net is None:
            raise ValueError(
                f"guidance={self.guidance} needs a network to guide with; pass gnet, or guidance=1"
            )

    def acts_at(self, sigma: float) -> bool:
        """Whether this guide changes anything at noise level `sigma`."""
        low, high = self.interval or (0.0, math.inf)
        return self.guidance != 1 and low < sigma <= high


def as_guides(gnet: Any, guidance: Any, interval: Any) -> tuple[Guide, ...]:
    """Read the guidance arguments of a sampler: one value each, or lists of one for each guide.

    Args:
        gnet: Guiding network, a list of them, or `None`.
        guidance: w; as many as networks, if they are a list.
        interval: `(lo, hi)` or `None` for all guides; or a list of one for each.

    Returns:
        The guides.

    Raises:
        ValueError: If the lists differ in length, or a value is outside its domain.
    """
    if not isinstance(gnet, list | tuple):
        return (Guide(gnet, guidance, interval),)
    shared = interval is None or any(isinstance(v, int | float) for v in interval)
    intervals = [interval] * len(gnet) if shared else interval
    if not isinstance(guidance, Sequence) or not len(gnet) == len(guidance) == len(intervals):
        raise ValueError(
            f"{len(gnet)} guiding networks need as many values of guidance (got {guidance}), and "
            f"one interval or as many (got {interval})"
        )
    return tuple(map(Guide, gnet, guidance, intervals))


def guided(
    net: Any, guides: Sequence[Guide], class_labels: Tensor | None
) -> Callable[[Tensor, float], Tensor]:
    """Combine denoisers to D = D_m + Σ (w_i − 1)(D_m − D_i) over the guides that act.

    For a single guide this is w·D_m + (1 − w)·D_1. A guide is evaluated only where it acts.

    Args:
        net: Main denoiser, D_m.
        guides: Networks D_i with their weights w_i.
        class_labels: One-hot `[B, label_dim]`, or `None`; passed to all networks.

    Returns:
        Function of x `[B, ...]` and one noise level σ, giving D of the shape and dtype of x.

    Source:
        Ho and Salimans 2022, arXiv:2207.12598; Karras et al. 2024, arXiv:2406.02507, Eq. 2 and
        the mixture of guides there; intervals of Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """

    def denoise(x: Tensor, sigma: float) -> Tensor:
        sigmas = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        main: Tensor = net(x, sigmas, class_labels).to(x.dtype)
        mixed = main
        for guide in guides:
            if guide.acts_at(sigma):
                push = main - guide.net(x, sigmas, class_labels).to(x.dtype)
                mixed = mixed + (guide.guidance - 1) * push
        return mixed

    return denoise
