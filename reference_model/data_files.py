"""Sets of one file for each image, in a folder or a ZIP, and the classes that these have.

`dataset.json` gives the classes, as the public EDM tools write it:
`{"labels": [["00000/img00000000.png", 7], ...]}`, or `{"labels": null}` for none. Without it, the
class is the sub-folder that a file lies in, sub-folders in alphabetical order; files that lie in
none have no classes.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LABELS_FILE = "dataset.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LATENT_SUFFIX = ".npy"
HELD_OUT_FOLDERS = ("test", "val", "valid", "validation", "held_out")


class Files:
    """The images or latents of a folder or a ZIP.

    Args:
        path: Folder, searched at every depth, or ZIP.

    Attributes:
        names: Names in alphabetical order, with `/` between folders.
        labels: Class of each, or `None`.
        held_out: Whether each belongs to the set's own test set, or `None` if it has none:
            `dataset.json` lists these under "held_out", or the folders are `train` and `test`
            (or `val`), with the classes inside.
        latent: Whether these are NPY files of latents instead of images.

    Raises:
        ValueError: If the ZIP is damaged, no image is there, or the classes do not fit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        everything = sorted(self._walk())
        by_suffix: dict[bool, list[str]] = {False: [], True: []}
        for name in everything:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in (*IMAGE_SUFFIXES, LATENT_SUFFIX):
                by_suffix[suffix == LATENT_SUFFIX].append(name)
        self.latent = not by_suffix[False]
        self.names = by_suffix[self.latent]
        if not self.names:
            kinds = " ".join((*IMAGE_SUFFIXES, LATENT_SUFFIX))
            raise ValueError(f"{path} holds no images ({kinds})")
        if by_suffix[not self.latent]:
            raise ValueError(
                f"{path} holds both images ({by_suffix[False][0]}) and latents "
                f"({by_suffix[True][0]}); keep one kind in one place"
            )
        self.labels: NDArray[np.int64] | None
        self.held_out: NDArray[np.bool_] | None
        if LABELS_FILE in everything:
            where = self.describe(LABELS_FILE)
            self.labels, self.held_out = _from_json(self.read(LABELS_FILE), self.names, where)
        else:
            self.labels, self.held_out = _from_folders(self.names, str(path))

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, name: str) -> str:
        """Where a file is, for messages."""
        return str(self.path / name)

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            if self.path.is_dir():
                return (self.path / name).read_bytes()
            return self._archive().read(name)
        except (OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{self.describe(name)} cannot be read: {error}") from error

    def _walk(self) -> Iterator[str]:
        """All files by name; those that begin with a dot are hidden."""
        if not self.path.is_dir():
            try:
                names = self._archive().namelist()
            except (OSError, zipfile.BadZipFile) as error:
                raise ValueError(f"{self.path} cannot be read as a ZIP: {error}") from error
            yield from (n for n in names if not any(p.startswith(".") for p in n.split("/")))
            return
        for folder, inner, files in os.walk(self.path, followlinks=True):
            inner[:] = [name for name in inner if not name.startswith(".")]
            for name in files:
                if not name.startswith("."):
                    yield Path(folder, name).relative_to(self.path).as_posix()

    def _archive(self) -> zipfile.ZipFile:
        """Open the ZIP once in each process: two that share a file position read nonsense."""
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = (os.getpid(), zipfile.ZipFile(self.path))
        return self._zip[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}


def labels_json(
    names: Sequence[str],
    labels: NDArray[np.int64] | None,
    held_out: NDArray[np.bool_] | None,
) -> str:
    """Text of a `dataset.json`, as `Files` reads it."""
    content: dict[str, Any] = {"labels": None}
    if labels is not None:
        content["labels"] = [list(pair) for pair in zip(names, labels.tolist(), strict=True)]
    if held_out is not None:
        content["held_out"] = [names[int(i)] for i in np.flatnonzero(held_out)]
    return json.dumps(content)


def _from_json(
    text: bytes, names: Sequence[str], where: str
) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_] | None]:
    """Classes and test set that a `dataset.json` gives."""
    try:
        content = json.loads(text)
        stored = content.get("labels")
        by_name = None if stored is None else dict(stored)
        held_out_names = content.get("held_out")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{where} is not of the form {{"labels": [["name.png", 0], ...]}}: {error}'
        ) from error
    known = set(names)
    for listed in (by_name or {}, held_out_names or ()):
        absent = next((name for name in listed if name not in known), None)
        if absent is not None:
            raise ValueError(f"{where} lists {absent!r}, but there is no such file")
    held_out = None
    if held_out_names:
        chosen = set(held_out_names)
        held_out = np.array([name in chosen for name in names])
    return (None if by_name is None else _in_order(by_name, names, where)), held_out


def _in_order(by_name: Mapping[str, Any], names: Sequence[str], where: str) -> NDArray[np.int64]:
    """Classes in the order of the files."""
    labels = np.empty(len(names), np.int64)
    for i, name in enumerate(names):
        label = by_name.get(name)
        if type(label) is not int or label < 0:
            problem = "no class" if label is None else f"the class {label!r}"
            raise ValueError(f"{where} gives {name!r} {problem}; classes are integers from 0")
        labels[i] = label
    return labels


def _from_folders(
    names: Sequence[str], where: str
) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_] | None]:
    """Classes and test set that the names of folders give."""
    parts = [name.split("/") for name in names]
    held_out = None
    tops = {part[0] for part in parts if len(part) > 1}
    if "train" in tops and len(tops) > 1 and tops <= {"train", *HELD_OUT_FOLDERS}:
        held_out = np.array([part[0] != "train" for part in parts])
        parts = [part[1:] for part in parts]
    loose = next((name for name, part in zip(names, parts, strict=True) if len(part) == 1), None)
    classes = sorted({part[0] for part in parts if len(part) > 1})
    if not classes:
        return None, held_out
    if loose is not None:
        raise ValueError(
            f"{where}: {loose!r} lies in no class's folder, while others lie in "
            f"{classes[0]!r}; move it, or give classes in {LABELS_FILE}"
        )
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[part[0]] for part in parts], np.int64), held_out
