"""Is a reconstruction the average that training would have kept? Where it was kept: compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posthoc_ema import EMA
from reference_model.checkpoint import load_network
from reference_model.judge import Judge
from reference_model.sampler import generate_images
from reference_model.sweep_record import DirectCheck


def direct_averages(
    checkpoint: Mapping[str, Any], sigma_rels: Sequence[float]
) -> dict[float, dict[str, Tensor]]:
    """State dicts of the averages that training kept beside the snapshots.

    Args:
        checkpoint: As `load_checkpoint` gives it.
        sigma_rels: `TrainConfig.direct_sigma_rel` of the run.

    Returns:
        Weights by EMA length; what is not averaged is that of the raw weights.
    """
    if not sigma_rels:
        return {}
    ema = EMA(sigma_rels, unit="images")
    ema.load_state_dict(checkpoint["direct"])
    return {s: {**checkpoint["net"], **ema.average(s)} for s in sigma_rels}


def relative_error(weights: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """RMS difference of floating-point tensors of the same names, over the RMS of the truth."""
    names = [name for name, tensor in truth.items() if tensor.is_floating_point()]
    difference = sum(float((weights[n].double() - truth[n].double()).square().sum()) for n in names)
    size = sum(float(truth[n].double().square().sum()) for n in names)
    return float((difference / size) ** 0.5)


def check_directly(
    run_dir: Path,
    judge: Judge,
    made: Mapping[str, Tensor],
    paper: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    images: int,
) -> tuple[DirectCheck, Tensor]:
    """Compare a reconstruction with the same average tracked during training.

    Args:
        run_dir: Directory of the run.
        judge: Knows the seeds, the steps and the decoder.
        made: Reconstructed weights.
        paper: The same average by the paper's own solve.
        truth: Tracked weights, at the time of the last snapshot.
        images: How many images to compare.

    Returns:
        The comparison, and images from the tracked weights, uint8 `[images, C, H, W]`.
    """
    seeds = judge.protocol.seeds(0)[:images]
    options: dict[str, Any] = {"num_steps": judge.protocol.num_steps, "encoder": judge.encoder}
    pictures = []
    for weights in (made, truth):
        net = load_network(run_dir, weights)
        classes = torch.arange(len(seeds)) % max(net.config.label_dim, 1)
        labels = classes if net.config.label_dim else None
        pictures.append(generate_images(net, seeds, labels, **options))
    difference = (pictures[0].double() - pictures[1].double()).abs().mean()
    check = DirectCheck(
        error=relative_error(made, truth),
        paper_error=relative_error(paper, truth),
        pixel_difference=float(difference),
    )
    return check, pictures[1]
