"""One picture to one image of a training set: grey or colour, square, of a given size."""

from __future__ import annotations

from PIL import Image

DEEP_MODES = ("I", "F")
"""First letters of Pillow's names for more than eight bits."""


def as_mode(picture: Image.Image, grey: bool, where: str) -> Image.Image:
    """Turn a picture into 8-bit grey or RGB, what is transparent into white.

    Args:
        picture: Of any mode.
        grey: Whether to turn it into grey.
        where: What it is, for messages.

    Raises:
        ValueError: If it has more than eight bits a channel.
    """
    if picture.mode.startswith(DEEP_MODES):
        raise ValueError(
            f"{where} has Pillow's mode {picture.mode}, more than 8 bits a channel; "
            "convert it to 8 bits"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("L" if grey else "RGB")


def resize_and_crop(picture: Image.Image, size: int) -> Image.Image:
    """Bring the shorter side to `size` pixels, and cut the middle of the longer one out.

    Halves with a box filter while the shorter side is at least twice as long as wanted, then
    resizes with a bicubic filter: the longer side in proportion, rounded.

    Args:
        picture: Of any size.
        size: Side of the square.

    Returns:
        `size`×`size` pixels, of the same mode.

    Source:
        Dhariwal and Nichol 2021, arXiv:2105.05233: their preparation of ImageNet, which Karras
        et al. 2024, arXiv:2312.02696, use too.
    """
    while min(picture.size) >= 2 * size:
        halved = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halved, Image.Resampling.BOX)
    scale = size / min(picture.size)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))
