"""A randomly initialised autoencoder with the interface of Stability's, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def save_vae(folder: Path) -> Any:
    """Write an autoencoder of 2 × 2 pixels to one of four latent channels, and return it.

    Skips the test where diffusers is not installed.
    """
    diffusers = pytest.importorskip("diffusers", reason="latents are made by diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
        )
    model.save_pretrained(folder)
    return model.eval()
