"""Sets in the IDX files of MNIST: Fashion-MNIST, KMNIST, EMNIST and others made alike."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reference_model.data_source import Source, check_labels

IMAGES = re.compile(r"(.*?)(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
UINT8 = 0x08


def find_idx(path: Path) -> list[Path]:
    """Files of images of this kind in a folder, or the file itself if it is one."""
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    return [p for p in candidates if IMAGES.fullmatch(p.name) and p.is_file()]


def open_idx(path: Path) -> Source:
    """Open the IDX files of a set, gzipped or not.

    Args:
        path: Folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and, as the set's
            own test set, `t10k-…` or `test-…`; or one file of images.

    Returns:
        Images of one channel, in memory.

    Raises:
        ValueError: If a file is missing, damaged, or does not fit the others.
    """
    files = find_idx(path)
    by_part: dict[bool, Path] = {}
    for file in files:
        match = IMAGES.fullmatch(file.name)
        assert match is not None  # find_idx matched it
        is_test = match[2] != "train" and len(files) > 1
        other = by_part.setdefault(is_test, file)
        if other != file:
            raise ValueError(
                f"{path} holds more than one set ({other.name} and {file.name}); "
                "give the path of one of these files, or a folder for each set"
            )
    parts = {is_test: _open_part(file) for is_test, file in sorted(by_part.items())}
    shapes = {images.shape[1:] for images, _ in parts.values()}
    if len(shapes) > 1:
        raise ValueError(f"the images of {' and '.join(map(str, files))} differ in size")
    images = np.concatenate([images for images, _ in parts.values()])[:, None]
    labels = np.concatenate([labels for _, labels in parts.values()])
    held_out = np.repeat(list(parts), [len(labels) for _, labels in parts.values()])
    return Source(
        where=str(path),
        size=len(images),
        shape=images.shape[1:],
        read=lambda indices: images[indices],
        labels=labels,
        held_out=held_out if held_out.any() and not held_out.all() else None,
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read one IDX file of bytes.

    Args:
        path: The file; gzipped if its name ends so.
        dimensions: Number of dimensions that its array must have.

    Returns:
        The array.

    Raises:
        ValueError: If the file is something else, or cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, UINT8, dimensions]) or len(content) < start:
        raise ValueError(
            f"{path} is not an IDX file of bytes in {dimensions} dimensions "
            f"(it starts with {content[:4].hex(' ')})"
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} says that it holds an array of {'×'.join(map(str, shape))} bytes, but "
            f"{len(content) - start} follow; copy it anew"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _open_part(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read a file of images and the file of labels beside it."""
    name = re.sub("-images([-.])idx3-", r"-labels\1idx1-", file.name.removesuffix(".gz"))
    candidates = [file.with_name(name + suffix) for suffix in ("", ".gz")]
    labels_file = next((c for c in candidates if c.exists()), None)
    if labels_file is None:
        raise ValueError(f"{file} has no labels: there is no {candidates[0]} or .gz beside it")
    images = read_idx(file, 3)
    return images, check_labels(read_idx(labels_file, 1), len(images), str(labels_file))
