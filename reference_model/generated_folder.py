"""Folders of PNGs that `generate` wrote, read back as a data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reference_model.data_images import decode_image
from reference_model.data_source import Source
from reference_model.generate import ABOUT


def is_generated(path: Path) -> bool:
    """Whether a folder holds images that `generate` wrote."""
    return path.is_dir() and any(path.glob("seed*.png"))


def open_generated(path: Path) -> Source:
    """Open the images of a folder, without its grid, at the size that the network gave them.

    Args:
        path: A folder that `generate` wrote.

    Returns:
        Images in the order of their seeds, with classes if all have one. Images of another size
        than the first are refused when read.

    Raises:
        ValueError: If there is none, or one cannot be read.
    """
    files = sorted(path.glob("seed*.png"), key=lambda file: (len(file.name), file.name))
    if not files:
        raise ValueError(f"{path} holds no images that `generate` wrote (seed000000.png, ...)")
    texts = [_text(file) for file in files]
    shape = _pixels(files[0], _scale(texts[0])).shape
    classes = [text.get("class") for text in texts]
    labels = None if None in classes else np.array([int(c or 0) for c in classes], np.int64)

    def read(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        batch = np.empty((len(indices), *shape), np.uint8)
        for place, index in enumerate(indices):
            image = _pixels(files[index], _scale(texts[index]))
            if image.shape != shape:
                raise ValueError(
                    f"{files[index]} shows an image of shape {image.shape}, {files[0].name} one of "
                    f"{shape}; keep images of one network in one folder"
                )
            batch[place] = image
        return batch

    channels, height, width = shape
    return Source(str(path), len(files), (channels, height, width), read, labels)


def _text(file: Path) -> dict[str, str]:
    """What is written into a PNG beside the pixels; only its head is read."""
    try:
        with Image.open(file) as picture:
            return dict(getattr(picture, "text", {}))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


def _scale(text: dict[str, str]) -> int:
    """By how much `generate` magnified an image."""
    return int(json.loads(text[ABOUT])["scale"]) if ABOUT in text else 1


def _pixels(file: Path, scale: int) -> NDArray[np.uint8]:
    return decode_image(file.read_bytes(), str(file))[:, ::scale, ::scale]
