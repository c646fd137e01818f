"""Sets in NumPy arrays: an NPZ file, or NPY files that are mapped into memory.

images              uint8 [N, H, W], [N, H, W, C] or [N, C, H, W]; or else
mean and, or not, std   floating-point [N, C, H, W]: latents, one normal distribution a pixel
labels              integer [N]; none if missing
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference_model.data_source import Source, check_labels

ALIASES = {"arr_0": "images", "arr_1": "labels"}
"""What `numpy.savez` calls arrays that were given no names."""
KNOWN = ("images", "mean", "std", "labels")
CHANNELS = (1, 3, 4)


def holds_arrays(path: Path) -> bool:
    """Whether a path is an NPZ or NPY file, or a folder with one of the arrays."""
    if path.is_dir():
        return any((path / f"{name}.npy").is_file() for name in ("images", "mean"))
    return path.suffix in (".npz", ".npy")


def open_arrays(path: Path) -> Source:
    """Open images or latents.

    Args:
        path: NPZ file with the arrays of this module's heading, which is read into memory; folder
            with `images.npy` or `mean.npy` and so on, mapped; or a single NPY file of images or
            latents without classes, mapped.

    Returns:
        The images or latents.

    Raises:
        ValueError: If an array is missing, cannot be read or does not fit the others.
    """
    arrays = _load(path)
    labels = arrays.get("labels")
    if "images" in arrays and "mean" in arrays:
        raise ValueError(f"{path} holds both images and latents ('mean'); remove one of them")
    if "images" in arrays:
        images = _channels_first(arrays["images"], f"{path}, array 'images',")
        size, shape = len(images), images.shape[1:]

        def read(indices: NDArray[np.int64]) -> NDArray[Any]:
            return np.ascontiguousarray(images[indices])
    elif "mean" in arrays:
        moments = [arrays[name] for name in ("mean", "std") if name in arrays]
        _check_latents(moments, path)
        size, shape = len(moments[0]), moments[0].shape[1:]

        def read(indices: NDArray[np.int64]) -> NDArray[Any]:
            return np.stack([part[indices].astype(np.float32) for part in moments], axis=1)
    else:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; it needs an array 'images', "
            "or 'mean' (and 'std') of latents"
        )
    if size == 0:
        raise ValueError(f"{path} holds no images")
    return Source(
        where=str(path),
        size=size,
        shape=shape,
        read=read,
        labels=None if labels is None else check_labels(labels, size, f"{path}, array 'labels',"),
        latent="mean" in arrays,
    )


def _load(path: Path) -> dict[str, NDArray[Any]]:
    """Read or map the arrays by name."""
    file = path
    try:
        if path.is_dir():
            arrays = {}
            for file in (path / f"{name}.npy" for name in KNOWN):
                if file.exists():
                    arrays[file.stem] = np.load(file, mmap_mode="r")
            return arrays
        if path.suffix == ".npy":
            single = np.load(path, mmap_mode="r")
            return {"images" if single.dtype == np.uint8 else "mean": single}
        with path.open("rb") as opened, np.load(opened) as archive:
            return {ALIASES.get(name, name): archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _channels_first(images: NDArray[Any], what: str) -> NDArray[Any]:
    """Return a view `[N, C, H, W]`."""
    if images.dtype != np.uint8:
        raise ValueError(f"{what} is of type {images.dtype}; images are uint8")
    if images.ndim == 3:
        return images[:, None]
    first = images.ndim == 4 and images.shape[1] in CHANNELS
    last = images.ndim == 4 and images.shape[3] in CHANNELS
    if first == last:
        raise ValueError(
            f"{what} has shape {images.shape}, which is not clearly [N, H, W], [N, H, W, C] or "
            "[N, C, H, W] with 1, 3 or 4 channels"
        )
    return images if first else images.transpose(0, 3, 1, 2)


def _check_latents(moments: list[NDArray[Any]], path: Path) -> None:
    for name, part in zip(("mean", "std"), moments, strict=False):
        if part.ndim != 4 or not np.issubdtype(part.dtype, np.floating):
            raise ValueError(
                f"{path}, array '{name}', is {part.dtype} of shape {part.shape}; latents are "
                "floating-point [N, C, H, W]"
            )
        if part.shape != moments[0].shape:
            raise ValueError(
                f"{path}: 'mean' has shape {moments[0].shape} and 'std' {part.shape}; "
                "they must be the same"
            )
