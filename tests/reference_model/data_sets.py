"""Small data sets in every form, written to disk."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(count: int, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_idx(path: Path, array: NDArray[np.uint8]) -> Path:
    """Write bytes in IDX form, gzipped if the name ends so."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_mnist(folder: Path, suffix: str = ".gz", size: int = 4, prefix: str = "") -> Path:
    """Write a set of 12 + 6 images of three classes as MNIST is published."""
    folder.mkdir(exist_ok=True)
    for part, count in (("train", 12), ("t10k", 6)):
        images = pixels(count, size, size, seed=count)
        write_idx(folder / f"{prefix}{part}-images-idx3-ubyte{suffix}", images)
        labels = np.arange(count, dtype=np.uint8) % 3
        write_idx(folder / f"{prefix}{part}-labels-idx1-ubyte{suffix}", labels)
    return folder


def write_images(folder: Path, images: dict[str, NDArray[np.uint8]]) -> Path:
    """Write PNG files, `[H, W]` or `[H, W, C]`, by name."""
    for name, image in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_labels(folder: Path, content: Any) -> None:
    (folder / "dataset.json").write_text(json.dumps(content))


def zipped(folder: Path) -> Path:
    """Pack a folder into a ZIP beside it."""
    path = folder.with_name(folder.name + ".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def edm_folder(folder: Path, count: int = 6, size: int = 4) -> NDArray[np.uint8]:
    """Write colour images as the EDM tools do, of classes 2, 0, 1, 2, ...; return them."""
    images = pixels(count, size, size, 3)
    names = [f"{i % 2:05d}/img{i:08d}.png" for i in range(count)]
    write_images(folder, dict(zip(names, images, strict=True)))
    write_labels(folder, {"labels": [[name, (i + 2) % 3] for i, name in enumerate(names)]})
    by_name = sorted(range(count), key=lambda i: names[i])
    return images[by_name].transpose(0, 3, 1, 2)
