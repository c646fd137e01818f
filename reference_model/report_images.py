"""Sample sheets as the report shows them: laid out with gaps, embedded in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from reference_model.sheets import Pixels

GAP = 1


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
