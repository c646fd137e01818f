"""Images from a trained run, at any EMA length, as PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from posthoc_ema import reconstruct
from reference_model.checkpoint import SNAPSHOTS, load_config, load_network
from reference_model.encoders import make_encoder
from reference_model.sampler import generate_images


def generate(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    seeds: Sequence[int],
    *,
    sigma_rel: float | None,
    classes: Sequence[int] | None = None,
    scale: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Generate images with averaged weights and write them as PNG files.

    Args:
        run_dir: Directory of the run.
        out: Directory to write to; made if need be.
        seeds: One non-negative integer for each image.
        sigma_rel: EMA length to reconstruct; `None` for the raw weights.
        classes: Classes that the images take in turn; `None` draws them from the seeds.
        scale: Whole-number magnification; `None` enlarges small images to 32 pixels or more.
        progress: Whether to show a progress bar.
        **options: Passed to `generate_images`.

    Returns:
        Path of the grid of all images; each image is beside it as `seed<number>.png`.

    Raises:
        RunDirError: If there is no run to load.
    """
    weights = None
    if sigma_rel is not None:
        snapshots = Path(run_dir) / SNAPSHOTS
        weights = reconstruct(snapshots, sigma_rel, framework="torch").state_dict()
    net, config = load_network(run_dir, weights), load_config(run_dir)
    labels = None
    if classes is not None:
        labels = torch.tensor([classes[i % len(classes)] for i in range(len(seeds))])
    encoder = make_encoder(config.encoder, config.vae)
    images = generate_images(net, seeds, labels, encoder=encoder, progress=progress, **options)

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    scale = scale or math.ceil(32 / images.shape[-1])
    for seed, image in zip(seeds, images, strict=True):
        to_pil(image, scale).save(out / f"seed{seed:06d}.png")
    grid = out / "grid.png"
    to_pil(tile(images), scale).save(grid)
    return grid


def tile(images: Tensor, columns: int | None = None, margin: int = 1) -> Tensor:
    """Lay out images row by row with a white margin between them.

    Args:
        images: uint8 `[N, C, H, W]`, N at least 1.
        columns: Images in a row; `None` for a square.
        margin: Pixels between neighbours.

    Returns:
        uint8 `[C, height, width]`.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = (channels, rows * (height + margin) - margin, columns * (width + margin) - margin)
    sheet = torch.full(size, 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + margin), i % columns * (width + margin)
        sheet[:, y : y + height, x : x + width] = image
    return sheet


def to_pil(image: Tensor, scale: int = 1) -> Image.Image:
    """Turn a uint8 image `[C, H, W]` of one, three or four channels into a Pillow image.

    Raises:
        ValueError: For another number of channels, such as that of latents.
    """
    channels = image.shape[0]
    if channels not in (1, 3, 4):
        raise ValueError(
            f"cannot show an image of {channels} channels; 1 (grey), 3 (RGB) or 4 (RGBA) can be"
        )
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
