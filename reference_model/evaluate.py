"""Measure chosen weights of a run, with or without guidance, without recording it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from reference_model.averages import Weights, check_guide, load_networks
from reference_model.checkpoint import load_config
from reference_model.data import Dataset, open_source
from reference_model.feature_files import load_features
from reference_model.feature_set import FeatureSet
from reference_model.generated_folder import is_generated, open_generated
from reference_model.guidance import Guide
from reference_model.judge import Judge, Score
from reference_model.pictures import Pictures
from reference_model.protocol import Protocol
from reference_model.sampler_config import SamplerConfig


def evaluate(
    run_dir: str | os.PathLike[str],
    wanted: Sequence[Weights],
    protocol: Protocol | None = None,
    *,
    guides: Sequence[Sequence[Guide]] | None = None,
    sampler: SamplerConfig | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> list[Score]:
    """Generate and measure images of one or more sets of weights.

    All of them start from the same noise, so that differences within each repeat are real.

    Args:
        run_dir: Directory of the run; its data set is what is compared with.
        wanted: Which weights; averages of one run take one pass over its snapshots.
        protocol: What is generated, and with what it is compared.
        guides: For each of `wanted` the guides of its sampling, whose `net` is a `Weights`.
        sampler: Solver and churn; the number of steps is the protocol's.
        device: Where to compute.
        progress: Whether to show progress.

    Returns:
        A score for each.

    Raises:
        RunDirError: If there is no run, or no checkpoint to take raw weights from.
        ValueError: If the protocol asks for too few images, or a guide does not fit.
        posthoc_ema.SnapshotError: If snapshots are missing or damaged.
    """
    protocol, config = protocol or Protocol(), load_config(run_dir)
    guides = guides if guides is not None else [()] * len(wanted)
    for guide in (g for of_one in guides for g in of_one):
        check_guide(guide.net, config)
    judge = Judge(config, protocol, run_dir, device=device, progress=progress)
    options = asdict(sampler or SamplerConfig())
    del options["num_steps"]
    everything = [*wanted, *(g.net for of_one in guides for g in of_one)]
    networks = iter(load_networks(everything, progress=progress))
    nets = [next(networks) for _ in wanted]

    scores = []
    total = len(wanted) * protocol.repeats * protocol.images
    with tqdm(total=total, desc="measure", unit="img", disable=not progress) as bar:
        for net, of_one in zip(nets, guides, strict=True):
            score = judge.score(
                net.to(device),
                lambda images, read_as: bar.update(len(images)),
                gnet=[next(networks).to(device) for _ in of_one],
                guidance=[g.guidance for g in of_one],
                guidance_interval=[g.interval for g in of_one],
                **options,
            )
            net.to("cpu")  # makes room for the next
            scores.append(score)
    return scores


def evaluate_images(
    run_dir: str | os.PathLike[str],
    sets: Sequence[str | os.PathLike[str]],
    protocol: Protocol | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Score:
    """Measure images that are there already, each set of them as one repeat.

    Args:
        run_dir: Directory of the run; its data set is what is compared with.
        sets: Folders that `generate` wrote, other sets of images, or files of `statistics`; all
            with the same number of images.
        protocol: With what, and by which features, they are compared.
        device: Where to compute.
        progress: Whether to show progress.

    Returns:
        Their score.

    Raises:
        ValueError: If a set cannot be read, has too few images, or does not fit the others.
    """
    opened = [open_images(path) for path in sets]
    protocol = replace(
        protocol or Protocol(), images=len(opened[0]), repeats=len(sets), held_out_loss=False
    )
    judge = Judge(load_config(run_dir), protocol, run_dir, device=device, progress=progress)
    made = [
        s if isinstance(s, FeatureSet) else judge.describe_pictures(s, progress=progress)
        for s in opened
    ]
    return judge.score_features(made)


def gather_statistics(
    sources: Sequence[str | os.PathLike[str]],
    features: str | None,
    *,
    part: tuple[int, int] = (1, 1),
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> FeatureSet:
    """Describe sets of images by a feature network, and merge files of `statistics`.

    Args:
        sources: As the `sets` of `evaluate_images`.
        features: `inception:FILE`, `dinov2:FOLDER` or `torchscript:FILE`; not needed to merge.
        part: `(i, n)`: only every n-th image of each set.
        device: Where to compute.
        progress: Whether to show progress.

    Returns:
        Features of all of them together.

    Raises:
        ValueError: If a source cannot be read, or files are of another feature network.
    """
    made = []
    for path in sources:
        found = open_images(path)
        if isinstance(found, FeatureSet):
            if part != (1, 1):
                raise ValueError(f"{path} is a file of statistics: it is merged whole, not in part")
            made.append(found)
            continue
        if features is None:
            raise ValueError(f"{path} holds images: say by --features how to describe them")
        network = load_features(features, found.shape, device)
        made.append(found.describe(network, part=part, progress=progress))
    first, *others = made
    for other in others:
        first.merge(other)
    return first


def open_images(path: str | os.PathLike[str]) -> Pictures | FeatureSet:
    """Open a folder that `generate` wrote, any other set of images, or a file of `statistics`.

    Raises:
        ValueError: If it is none of these.
    """
    path = Path(path).expanduser()
    if path.suffix == ".npz" and FeatureSet.is_file(path):
        return FeatureSet.load(path)
    source = open_generated(path) if is_generated(path) else open_source(str(path))
    if source.latent:
        raise ValueError(f"{path} holds latents; images can be described")
    return Pictures(Dataset(source, np.arange(source.size)))
