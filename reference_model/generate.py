"""Images from trained runs, at any EMA length and under any guidance, as PNG files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from reference_model.averages import Weights, check_guide, load_networks
from reference_model.checkpoint import load_config, write_atomically
from reference_model.encoders import make_encoder
from reference_model.guidance import Guide
from reference_model.sampler import image_batches
from reference_model.sampler_config import SamplerConfig
from reference_model.sweep_record import differing_settings

GRID_IMAGES = 256
"""So many images, the first ones, are shown in the grid."""

ABOUT = "reference_model"
"""Key of a PNG's text that says, as JSON, what the image was made from."""


class Generated(NamedTuple):
    """What a call of `generate` did.

    Attributes:
        made: Number of images that it wrote.
        kept: Number of images that were there already.
        grid: Path of the grid; `None` while images of other parts are missing.
    """

    made: int
    kept: int
    grid: Path | None


def generate(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    seeds: Sequence[int],
    *,
    sigma_rel: float | None,
    guides: Sequence[Guide] = (),
    classes: Sequence[int] | None = None,
    sampler: SamplerConfig | None = None,
    part: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    scale: int | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Generated:
    """Generate images and write them as PNG files, or go on where an earlier call stopped.

    Each file appears when it is complete, and says in its text what made it: the same call keeps
    the images that are there, and a call with other options refuses to mix them.

    Args:
        run_dir: Directory of the run.
        out: Directory to write to; made if need be.
        seeds: One non-negative integer for each image.
        sigma_rel: EMA length to reconstruct; `None` for the raw weights.
        guides: Guides whose `net` is a `Weights`: of this run, or of another. Averages of one run
            and time are reconstructed in one pass.
        classes: Classes that the images take in turn; `None` draws them from the seeds.
        sampler: Solver, its steps and churn.
        part: `(i, n)`: make only every n-th image, from the i-th on, `1 <= i <= n`. Whichever
            part finds all images complete writes the grid.
        overwrite: Whether to make images anew that other options made.
        scale: Whole-number magnification; `None` enlarges small images to 32 pixels or more.
        batch_size: Images denoised at once.
        device: Where to compute.
        progress: Whether to show progress.

    Returns:
        How many images were made and kept, and the path of the grid of the first of all images;
        each image is beside it as `seed<number>.png`.

    Raises:
        RunDirError: If there is no run to load.
        FileExistsError: If `out` holds images that other options made.
        ValueError: If an argument is outside its domain, or a guide does not fit.
    """
    index, parts = part
    if not 1 <= index <= parts:
        raise ValueError(f"part must be (i, n) with 1 <= i <= n (got {part})")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError("seeds must be at least one, each named once")
    config = load_config(run_dir)
    for guide in guides:
        check_guide(guide.net, config)
    encoder = make_encoder(config.encoder, config.vae)
    # Decoding nothing tells the size, and before hours of sampling whether images can be decoded.
    nothing = encoder.decode(torch.empty(0, *config.network.input_shape))
    scale = scale or math.ceil(32 / nothing.shape[-1])
    sampler, weights = sampler or SamplerConfig(), Weights(Path(run_dir), sigma_rel)
    settings = {
        "weights": weights.describe(),
        "guides": {
            str(i): {"weights": g.net.describe(), "guidance": g.guidance, "interval": g.interval}
            for i, g in enumerate(guides, start=1)
        },
        "sampler": sampler.to_dict(),
        "scale": scale,
    }
    chosen = {s: classes[i % len(classes)] for i, s in enumerate(seeds)} if classes else {}
    about = {s: _plain({**settings, "seed": s, "class": chosen.get(s)}) for s in seeds}

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    own = seeds[index - 1 :: parts]
    missing = [s for s in own if not _is_complete(image_path(out, s), about[s], overwrite)]
    if missing:
        net, *gnets = load_networks([weights, *(g.net for g in guides)], progress=progress)
        batches = image_batches(
            net.to(device),
            missing,
            torch.tensor([chosen[s] for s in missing]) if chosen else None,
            batch_size=batch_size,
            encoder=encoder,
            gnet=[gnet.to(device) for gnet in gnets],
            guidance=[g.guidance for g in guides],
            guidance_interval=[g.interval for g in guides],
            **asdict(sampler),
        )
        left = iter(missing)
        bar = tqdm(total=len(own), initial=len(own) - len(missing), desc="generate", unit="img",
                   disable=not progress)  # fmt: skip
        with bar:
            for images, shown in batches:
                for i, image in enumerate(images):
                    seed = next(left)
                    text = {ABOUT: json.dumps(about[seed], sort_keys=True)}
                    if shown is not None:
                        text["class"] = str(int(shown[i]))
                    _write_png(image_path(out, seed), to_pil(image, scale), text)
                    bar.update()

    others = set(seeds) - set(own)
    whole = all(_is_complete(image_path(out, s), about[s], overwrite=True) for s in others)
    grid = _write_grid(out, seeds[:GRID_IMAGES], scale, index) if whole else None
    return Generated(len(missing), len(own) - len(missing), grid)


def image_path(out: Path, seed: int) -> Path:
    """Where the image of a seed is written."""
    return out / f"seed{seed:06d}.png"


def _is_complete(path: Path, about: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether an image is there, whole, and made as it would be now.

    Raises:
        FileExistsError: If something else made it, unless it is to be overwritten.
    """
    try:
        with Image.open(path) as image:
            image.load()  # a truncated file raises here
            found = json.loads(getattr(image, "text", {})[ABOUT])
    except FileNotFoundError:
        return False
    except (OSError, SyntaxError, KeyError, ValueError):
        return False  # damaged by a power failure, or an older version's: made anew
    if found == about:
        return True
    if overwrite:
        return False
    differences = "; ".join(differing_settings(found, dict(about)))
    raise FileExistsError(
        f"{path} was made with other options ({differences}); "
        "choose another directory, or overwrite"
    )


def _write_png(path: Path, picture: Image.Image, text: Mapping[str, str]) -> None:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    # Not durable: after a power failure the next call sees what is missing or damaged.
    write_atomically(path, lambda file: picture.save(file, "png", pnginfo=info), durable=False)


def _write_grid(out: Path, seeds: Sequence[int], scale: int, index: int) -> Path:
    images = []
    for seed in seeds:
        with Image.open(image_path(out, seed)) as picture:
            pixels = np.atleast_3d(np.asarray(picture))[::scale, ::scale]
        images.append(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
    # Two parts may end at once: each writes a file of its own before it becomes the grid.
    own, grid = out / f"grid.part{index}.png", out / "grid.png"
    _write_png(own, to_pil(tile(torch.stack(images)), scale), {})
    os.replace(own, grid)
    return grid


def _plain(value: Any) -> Any:
    """Return what a round trip through JSON gives."""
    return json.loads(json.dumps(value))


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
