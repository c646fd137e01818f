"""Learning rate over training: linear ramp-up, plateau, inverse-square-root decay."""

from __future__ import annotations

import math


def learning_rate(
    nimg: int,
    batch_size: int,
    ref_lr: float = 0.01,
    ref_batches: float = 70_000,
    rampup_nimg: int = 10_000_000,
) -> float:
    """Return the learning rate of the step that starts with `nimg` images seen.

    α(t) = α_ref / √max(t / t_ref, 1) · min(nimg / rampup, 1) with t = nimg / batch_size.
    The first step therefore has rate 0: it only fills Adam's moments.

    Args:
        nimg: Images seen before the step.
        batch_size: Images of one step.
        ref_lr: α_ref, the rate on the plateau.
        ref_batches: t_ref, the step at which decay begins; 0 for none.
        rampup_nimg: Images over which the rate rises from 0; 0 for none.

    Returns:
        α(t).

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 67 (decay); ramp-up as in App. B.1.
    """
    lr = ref_lr
    if ref_batches > 0:
        lr /= math.sqrt(max(nimg / batch_size / ref_batches, 1))
    if rampup_nimg > 0:
        lr *= min(nimg / rampup_nimg, 1)
    return lr
