"""Sheets of samples: images of the same noise side by side, one file for each point of a sweep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from reference_model.generate import tile, to_pil

SAMPLES = "samples"
"""Folder within the run's directory."""
REAL = "real"
"""Name of the sheet of held-out images."""
SHOWN_IMAGES = 60
SHEET_COLUMNS = 10

Pixels = NDArray[np.uint8]
"""Images, ``[N, H, W, C]``."""


def save_sheet(run_dir: Path, name: str, images: Tensor) -> None:
    """Write images side by side without margins, so that a reader can cut them apart again.

    Args:
        run_dir: Directory of the run.
        name: Of the sheet.
        images: uint8 ``[N, C, H, W]``.
    """
    folder = run_dir / SAMPLES
    folder.mkdir(exist_ok=True)
    to_pil(tile(images, columns=SHEET_COLUMNS, margin=0)).save(folder / f"{name}.png")


def read_sheet(path: Path, count: int, columns: int) -> Pixels | None:
    """Cut a sheet written without margins into its images.

    Args:
        path: PNG file.
        count: Number of images on it.
        columns: Images in a row.

    Returns:
        ``[count, H, W, C]``, or ``None`` if there is no such file.

    Raises:
        ValueError: If the sheet cannot be divided that way.
    """
    if not path.exists():
        return None
    with Image.open(path) as picture:
        pixels = np.atleast_3d(np.asarray(picture))
    rows = -(-count // columns)
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    if pixels.shape[:2] != (rows * height, columns * width):
        raise ValueError(
            f"{path} has {pixels.shape[1]}×{pixels.shape[0]} pixels, which are not {columns} "
            f"columns and {rows} rows; remove the sweep's record to measure again"
        )
    cells = pixels.reshape(rows, height, columns, width, -1).swapaxes(1, 2)
    return cells.reshape(rows * columns, height, width, -1)[:count]
