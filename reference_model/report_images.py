"""Sample sheets of the report: cut apart, laid out again with gaps, embedded in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
GAP = 1


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


def sheet(images: Pixels, columns: int, marked: Sequence[int] = (), alt: str = "") -> str:
    """HTML of a grid of images, some of them outlined.

    Args:
        images: ``[N, H, W, C]``, 1 or 3 channels.
        columns: Images in a row.
        marked: Indices of the outlined ones.
        alt: What the grid shows.

    Returns:
        A ``div`` holding one embedded PNG and the outlines.
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    size = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    # Gaps are transparent, so that the page's own colour shows in light and dark.
    canvas = np.zeros((*size, channels + 1), np.uint8)
    outlines = []
    for i, image in enumerate(images):
        y, x = i // columns * (height + GAP), i % columns * (width + GAP)
        canvas[y : y + height, x : x + width, :channels] = image
        canvas[y : y + height, x : x + width, channels] = 255
        if i in marked:
            corner = f'x="{x - GAP / 2}" y="{y - GAP / 2}"'
            outlines.append(f'<rect {corner} width="{width + GAP}" height="{height + GAP}"/>')
    overlay = f'<svg viewBox="0 0 {size[1]} {size[0]}" aria-hidden="true">{"".join(outlines)}</svg>'
    return (
        f'<div class="sheet"><img src="{embed(canvas)}" alt="{escape(alt)}" '
        f'width="{size[1]}" height="{size[0]}">{overlay if outlines else ""}</div>'
    )


def embed(pixels: Pixels) -> str:
    """A PNG as a ``data:`` address."""
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    channels = pixels.shape[2]
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels, modes[channels])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
