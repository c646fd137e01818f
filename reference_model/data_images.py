"""Images and latents from files, decoded when they are asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from reference_model.data_files import Files
from reference_model.data_source import Source

MODES = ("L", "RGB", "RGBA")
"""Pillow's names of 8-bit grey, colour, and colour with transparency."""


def open_files(path: Path) -> Source:
    """Open a folder or ZIP of images, or of latents in NPY files.

    Args:
        path: Folder or ZIP, with classes as `data_files` describes. Latents are floating-point
            `[2C, H, W]`, means before standard deviations, as the public EDM tools write them.

    Returns:
        Images of the size and number of channels of the first. Others are refused when read.

    Raises:
        ValueError: If nothing is there, the classes do not fit, or the first file is damaged.
    """
    files = Files(path)
    decode = decode_latent if files.latent else decode_image

    def load(name: str) -> NDArray[Any]:
        return decode(files.read(name), files.describe(name))

    first = load(files.names[0])

    def read(indices: NDArray[np.int64]) -> NDArray[Any]:
        batch = np.empty((len(indices), *first.shape), first.dtype)
        for place, index in enumerate(indices):
            image = load(files.names[index])
            if image.shape != first.shape:
                raise ValueError(
                    f"{files.describe(files.names[index])} is {_size(image)}, but "
                    f"{files.names[0]} is {_size(first)}; all must be the same: "
                    "`python -m reference_model prepare` crops and resizes"
                )
            batch[place] = image
        return batch

    channels, height, width = first.shape[-3:]
    return Source(
        where=str(path),
        size=len(files),
        shape=(channels, height, width),
        read=read,
        labels=files.labels,
        latent=files.latent,
        held_out=files.held_out,
    )


def open_picture(content: bytes, where: str) -> Image.Image:
    """Decode an image file; `where` it is serves messages.

    Raises:
        ValueError: If it is damaged or no image.
    """
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} cannot be read as an image: {error}") from error
    return picture


def decode_image(content: bytes, where: str) -> NDArray[np.uint8]:
    """Return an image as uint8 `[C, H, W]`.

    Raises:
        ValueError: If it is damaged, or not 8-bit grey or colour.
    """
    picture = open_picture(content, where)
    if picture.mode not in MODES:
        raise ValueError(
            f"{where} is an image of Pillow's mode {picture.mode}, which is none of "
            f"{', '.join(MODES)}; `python -m reference_model prepare` converts"
        )
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def decode_latent(content: bytes, where: str) -> NDArray[np.float32]:
    """Return means and standard deviations of a latent, float32 `[2, C, H, W]`.

    Raises:
        ValueError: If the file is damaged or holds something else.
    """
    try:
        stored = np.load(io.BytesIO(content))
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{where} cannot be read as an array: {error}") from error
    is_latent = np.issubdtype(stored.dtype, np.floating) and stored.ndim == 3
    if not is_latent or stored.shape[0] % 2:
        raise ValueError(
            f"{where} is {stored.dtype} of shape {stored.shape}; a latent is "
            "floating-point [2C, H, W], means before standard deviations"
        )
    return stored.astype(np.float32).reshape(2, -1, *stored.shape[1:])


def _size(image: NDArray[Any]) -> str:
    """Width × height × channels."""
    channels, height, width = image.shape[-3:]
    return f"{width}×{height}×{channels}"
