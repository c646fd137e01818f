"""Convert images into a training set: PNG files, or latents of an autoencoder, with classes.

While it lasts, the finished files are in `DEST.partial`, where a later call finds them. DEST
appears when it is complete.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from reference_model.checkpoint import write_atomically
from reference_model.data import open_source, recognise
from reference_model.data_files import LABELS_FILE, LATENT_SUFFIX, Files, labels_json
from reference_model.data_images import decode_image, decode_latent, open_picture
from reference_model.prepare_pixels import as_mode, resize_and_crop
from reference_model.vae import load_vae

SETTINGS_FILE = ".prepare.json"
FILES_IN_FOLDER = 1000
CHUNK = 256
"""Images that are in work at once."""


@dataclass(frozen=True)
class Pictures:
    """What is to be converted.

    Attributes:
        names: One for each picture, for messages.
        open: From number to picture, of any mode and size.
        grey: Whether they are known to be grey.
        labels: Class of each, int64 `[N]`, or `None`.
        held_out: Whether each belongs to the set's own test set, bool `[N]`, or `None`.
    """

    names: Sequence[str]
    open: Callable[[int], Image.Image]
    grey: bool
    labels: NDArray[np.int64] | None
    held_out: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Format:
    """What is written for each image.

    Attributes:
        suffix: Of its file.
        encode: From pictures of equal size to what is stored of each.
        batch_size: How many `encode` takes at once.
        to_bytes: From that to the content of the file.
        check: From content and path, a `ValueError` if it is damaged.
    """

    suffix: str
    encode: Callable[[list[Image.Image]], Iterable[Any]]
    batch_size: int
    to_bytes: Callable[[Any], bytes]
    check: Callable[[bytes, str], object]


def prepare(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    size: int | None = None,
    grey: bool = False,
    vae: str | Path | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> int:
    """Convert a data set, or go on where an earlier call stopped.

    Args:
        source: Data set of images, as `data.open_source` takes it, but files may be of any size.
        dest: ZIP to write if it ends in `.zip`, else folder.
        size: Side of the square that each image is resized and cropped to; `None` leaves them,
            and all must be the same.
        grey: Whether to write grey images; else colour, except where all are known to be grey.
        vae: Folder of an autoencoder: write its latents instead of PNG files.
        batch_size: Images that the autoencoder takes at once.
        workers: Threads that read, resize and write; `None` for one a processor.
        device: Where the autoencoder runs.
        progress: Whether to show a progress bar.

    Returns:
        Number of images.

    Raises:
        ValueError: If `dest` exists, another conversion to it was begun, or an image cannot be
            read, is of another size or is too deep; the message names it.
    """
    dest = Path(dest)
    if dest.exists():
        raise ValueError(f"{dest} exists already; remove it, or write to another place")
    pictures = _open_pictures(os.fspath(source))
    grey = grey or pictures.grey
    form = PNG
    if vae is not None:
        form, grey = _latents(vae, batch_size, device), False
    names = [
        f"{i // FILES_IN_FOLDER:05d}/img{i:08d}{form.suffix}" for i in range(len(pictures.names))
    ]
    convert = partial(_convert, pictures, grey, size, None)
    shape = convert(0).size
    if vae is not None and any(side % load_vae(vae).reduction for side in shape):
        raise ValueError(
            f"the autoencoder needs sides that are multiples of {load_vae(vae).reduction} "
            f"(got {shape[0]}×{shape[1]} pixels); choose a size"
        )
    convert = partial(_convert, pictures, grey, size, shape)

    work = dest.with_name(dest.name + ".partial")
    settings = {
        "source": str(Path(source).resolve()),
        "images": len(pictures.names),
        "size": size,
        "grey": grey,
        "vae": None if vae is None else str(Path(vae).resolve()),
    }
    _claim(work, settings)

    def is_done(i: int) -> bool:
        try:
            form.check((work / names[i]).read_bytes(), names[i])
        except (OSError, ValueError):
            return False
        return True

    def write(i: int, encoded: Any) -> None:
        # Not synced to disk one by one: `is_done` finds those that a power failure emptied.
        path = work / names[i]
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(form.to_bytes(encoded))
        os.replace(temporary, path)

    with (
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,
        tqdm(total=len(names), desc="prepare", unit="img", disable=not progress) as bar,
    ):
        for chunk in _batches(range(len(names)), CHUNK):
            done = list(pool.map(is_done, chunk))
            bar.update(sum(done))
            missing = [i for i, there in zip(chunk, done, strict=True) if not there]
            for batch in _batches(missing, form.batch_size):
                encoded = form.encode(list(pool.map(convert, batch)))
                for _ in pool.map(write, batch, encoded):
                    bar.update()
    text = labels_json(names, pictures.labels, pictures.held_out)
    (work / LABELS_FILE).write_text(text)
    _finish(work, dest, [*names, LABELS_FILE], progress)
    return len(names)


def _open_pictures(source: str) -> Pictures:
    """Open a data set whose files may be of any size."""
    if recognise(source) == "files":
        files = Files(Path(source).expanduser())
        latent, labels, held_out, grey = files.latent, files.labels, files.held_out, False
        names = [files.describe(name) for name in files.names]

        def load(i: int) -> Image.Image:
            return open_picture(files.read(files.names[i]), names[i])
    else:
        stored = open_source(source)
        latent, labels, held_out = stored.latent, stored.labels, stored.held_out
        names, grey = [f"{source}, image {i}," for i in range(stored.size)], stored.shape[0] == 1

        def load(i: int) -> Image.Image:
            pixels = stored.read(np.array([i]))[0]
            pixels = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
            return Image.fromarray(np.ascontiguousarray(pixels))

    if latent:
        raise ValueError(f"{source} holds latents; images are what can be prepared")
    return Pictures(names, load, grey, labels, held_out)


def _convert(
    pictures: Pictures, grey: bool, size: int | None, shape: tuple[int, int] | None, i: int
) -> Image.Image:
    """Open, resize and crop a picture, and check that its size is `shape`."""
    picture = as_mode(pictures.open(i), grey, pictures.names[i])
    if size is not None:
        picture = resize_and_crop(picture, size)
    if shape not in (None, picture.size):
        raise ValueError(
            f"{pictures.names[i]} is {picture.width}×{picture.height} pixels, but "
            f"{pictures.names[0]} is {shape[0]}×{shape[1]}; give a size to make them the same"
        )
    return picture


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


PNG = Format(".png", list, CHUNK, _png, decode_image)


def _latents(vae: str | Path, batch_size: int, device: str) -> Format:
    """Latents as the public EDM tools write them: float32 `[2C, H, W]`, means before deviations."""
    model = load_vae(vae)

    def encode(pictures: list[Image.Image]) -> NDArray[np.float32]:
        pixels = np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)
        moments = model.encode(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))
        return torch.cat(moments, dim=1).cpu().numpy()

    def to_bytes(latent: NDArray[np.float32]) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, latent)
        return buffer.getvalue()

    return Format(LATENT_SUFFIX, encode, batch_size, to_bytes, decode_latent)


def _claim(work: Path, settings: dict[str, Any]) -> None:
    """Begin a conversion, or make sure that the one begun is the same."""
    path = work / SETTINGS_FILE
    if path.exists():
        begun = json.loads(path.read_text())
        differences = [
            f"{name}={begun.get(name)!r} (now {value!r})"
            for name, value in settings.items()
            if begun.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"{work} holds a conversion begun with {', '.join(differences)}; go on with the "
                "same options, or remove it"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps(settings, indent=2).encode()))


def _finish(work: Path, dest: Path, names: Sequence[str], progress: bool) -> None:
    """Make the finished files appear as `dest`, all at once."""
    if dest.suffix != ".zip":
        os.sync()
        os.replace(work, dest)
        return

    def pack(file: IO[bytes]) -> None:
        # Stored as they are: PNG is compressed already, and latents hardly compress.
        with zipfile.ZipFile(file, "w") as archive:
            for name in tqdm(names, desc="pack", unit="img", disable=not progress):
                archive.write(work / name, name)

    write_atomically(dest, pack)
    shutil.rmtree(work)


def _batches(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
