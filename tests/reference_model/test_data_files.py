"""Data sets on disk: each form is read as it was written, and what is wrong is named."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reference_model.data import Dataset, load_dataset, open_source
from reference_model.data_files import Files
from reference_model.data_source import Source
from tests.reference_model.data_sets import (
    edm_folder,
    pixels,
    write_idx,
    write_images,
    write_labels,
    write_mnist,
    zipped,
)


def everything(source: Source) -> Any:
    return source.read(np.arange(source.size))


# IDX files


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_with_their_own_test_set(tmp_path: Path, suffix: str) -> None:
    path = str(write_mnist(tmp_path / "set", suffix))
    train, held_out = load_dataset(path, "train"), load_dataset(path, "held_out")
    assert (len(train), len(held_out), train.num_classes, train.shape) == (12, 6, 3, (1, 4, 4))
    np.testing.assert_array_equal(train.read()[:, 0], pixels(12, 4, 4, seed=12))
    np.testing.assert_array_equal(held_out.read()[:, 0], pixels(6, 4, 4, seed=6))
    assert held_out.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_one_idx_file_is_a_set(tmp_path: Path) -> None:
    """EMNIST has several sets in a folder; Kaggle's MNIST has a dot in its names."""
    write_mnist(tmp_path, prefix="emnist-letters-")
    write_mnist(tmp_path, prefix="emnist-digits-")
    file = tmp_path / "emnist-digits-t10k-images-idx3-ubyte.gz"
    source = open_source(str(file))
    assert (source.size, source.held_out) == (6, None)
    with pytest.raises(ValueError, match=r"holds more than one set .* give the path of one of"):
        open_source(str(tmp_path))
    write_idx(tmp_path / "train-images.idx3-ubyte", pixels(2, 4, 4))
    write_idx(tmp_path / "train-labels.idx1-ubyte", np.array([0, 1], np.uint8))
    assert open_source(str(tmp_path / "train-images.idx3-ubyte")).size == 2


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: cut(d / "train-images-idx3-ubyte", 1),
            r"train-images-idx3-ubyte says that it holds an array of 12×4×4 bytes, but 191 follow",
        ),
        (
            lambda d: (d / "train-images-idx3-ubyte").write_bytes(b"PK\3\4"),
            r"train-images-idx3-ubyte is not an IDX file of bytes in 3 dim.*with 50 4b 03 04\)",
        ),
        (
            lambda d: (d / "t10k-labels-idx1-ubyte").unlink(),
            r"t10k-images-idx3-ubyte has no labels: there is no .*t10k-labels-idx1-ubyte or \.gz",
        ),
        (
            lambda d: write_idx(d / "t10k-labels-idx1-ubyte", np.zeros(5, np.uint8)),
            r"t10k-labels-idx1-ubyte holds labels of shape \(5,\) for 6 images",
        ),
        (
            lambda d: write_idx(d / "t10k-images-idx3-ubyte", pixels(6, 4, 5)),
            r"train-images-idx3-ubyte.* differ in size",
        ),
    ],
)
def test_damaged_idx_files_are_named(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    write_mnist(tmp_path, suffix="")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path))


def test_cut_gzip_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    cut(tmp_path / "train-images-idx3-ubyte.gz", 9)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be read: Compressed"):
        open_source(str(tmp_path))


# Folders and ZIPs


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_what_the_edm_tools_write_is_read(tmp_path: Path, form: str) -> None:
    images = edm_folder(tmp_path / "set")
    path = tmp_path / "set" if form == "folder" else zipped(tmp_path / "set")
    source = open_source(str(path))
    np.testing.assert_array_equal(everything(source), images)
    # In the order of names: folders take turns.
    assert source.labels is not None
    assert source.labels.tolist() == [2, 1, 0, 0, 2, 1]
    assert (source.shape, source.num_classes, source.held_out) == ((3, 4, 4), 3, None)


def test_zip_is_opened_anew_in_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edm_folder(tmp_path / "set", count=40)
    files = Files(zipped(tmp_path / "set"))
    copy = pickle.loads(pickle.dumps(files))
    expected = [files.read(name) for name in files.names]
    assert [copy.read(name) for name in copy.names] == expected
    here = files._archive()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert files._archive() is not here
    assert [files.read(name) for name in files.names] == expected


def test_sub_folders_are_classes_at_every_depth(tmp_path: Path) -> None:
    image = pixels(1, 4, 4)[0]
    write_images(tmp_path, dict.fromkeys(["dog/a.png", "cat/x/b.png", "cat/c.PNG"], image))
    (tmp_path / "dog" / ".hidden.png").write_bytes(b"")
    (tmp_path / "dog" / "readme.txt").write_bytes(b"")
    source = open_source(str(tmp_path))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1]  # cat/c.PNG, cat/x/b.png, dog/a.png
    assert source.shape == (1, 4, 4)
    assert open_source(str(zipped(tmp_path))).labels.tolist() == [0, 0, 1]  # type: ignore[union-attr]


def test_folders_named_train_and_test_are_halves(tmp_path: Path) -> None:
    image = pixels(1, 4, 4)[0]
    names = ["train/cat/a.png", "train/dog/b.png", "val/dog/c.png"]
    write_images(tmp_path, dict.fromkeys(names, image))
    halves = [load_dataset(str(tmp_path), split) for split in ("train", "held_out")]
    assert [half.labels.tolist() for half in halves] == [[0, 1], [1]]


def test_images_without_folders_have_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path, dict.fromkeys(["a.png", "b.png"], pixels(1, 4, 4)[0]))
    assert open_source(str(tmp_path)).labels is None
    write_images(tmp_path, {"cat/c.png": pixels(1, 4, 4)[0]})
    with pytest.raises(ValueError, match=r"'a\.png' lies in no class's folder, while .* 'cat'"):
        open_source(str(tmp_path))
    write_labels(tmp_path, {"labels": None})
    assert open_source(str(tmp_path)).labels is None


A, B = "00000/img00000000.png", "00001/img00000001.png"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [[A, 0]]}, rf"dataset\.json gives '{B}' no class; classes are integers from 0"),
        ({"labels": [[A, 0], [B, -1]]}, f"gives '{B}' the class -1"),
        ({"labels": [[A, 0], [B, 0.5]]}, f"gives '{B}' the class 0.5"),
        ({"labels": [[A, 0], [B, True]]}, f"gives '{B}' the class True"),
        ({"labels": [[A, 0], [B, 1], ["c.png", 1]]}, r"lists 'c\.png', but there is no such file"),
        ({"labels": None, "held_out": ["c.png"]}, r"lists 'c\.png', but there is no such file"),
        ({"labels": [0, 1]}, r"dataset\.json is not of the form"),
        ([], r"dataset\.json is not of the form"),
    ],
)
def test_mislabelled_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    edm_folder(tmp_path, count=2)
    write_labels(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path))


def test_broken_json_is_named(tmp_path: Path) -> None:
    edm_folder(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": [')
    with pytest.raises(ValueError, match=r"dataset\.json is not of the form .*Expecting value"):
        open_source(str(tmp_path))


def test_dataset_json_can_name_the_test_set(tmp_path: Path) -> None:
    edm_folder(tmp_path, count=4)
    content = json.loads((tmp_path / "dataset.json").read_text())
    write_labels(tmp_path, content | {"held_out": [A]})
    assert load_dataset(str(tmp_path), "held_out").labels.tolist() == [2]
    assert len(load_dataset(str(tmp_path), "train")) == 3


def test_unreadable_and_mis_sized_images_are_named_when_read(tmp_path: Path) -> None:
    images = dict.fromkeys(["a.png", "b.png", "c.png"], pixels(1, 4, 4)[0])
    write_images(tmp_path, images)
    dataset = Dataset(open_source(str(tmp_path)), np.arange(3))
    cut(tmp_path / "b.png", 40)
    assert dataset.read(np.array([0, 2])).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image: "):
        dataset.read()
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"b\.png cannot be read: .*No such file"):
        dataset.read()
    write_images(tmp_path, {"b.png": pixels(1, 4, 6)[0]})
    with pytest.raises(ValueError, match=r"b\.png is 6×4×1, but a\.png is 4×4×1; all must be"):
        dataset.read()
    Image.fromarray(pixels(1, 4, 4)[0]).convert("P").save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is an image of Pillow's mode P, .* converts"):
        dataset.stream(0, 3, seed=0)


def test_damaged_zips_are_named(tmp_path: Path) -> None:
    edm_folder(tmp_path / "set")
    path = zipped(tmp_path / "set")
    content = bytearray(path.read_bytes())
    start = content.index(b"\x89PNG") + 45
    content[start] ^= 1  # zlib of PNG and the ZIP's own checksum both notice
    path.write_bytes(content)
    source = open_source(str(path))
    with pytest.raises(ValueError, match=r"set\.zip/0000\d/img0000000\d\.png cannot be read: Bad"):
        everything(source)
    path.write_bytes(content[:-30])
    with pytest.raises(ValueError, match=r"set\.zip cannot be read as a ZIP: "):
        open_source(str(path))


# Latents


def test_latents_in_files_are_means_and_deviations(tmp_path: Path) -> None:
    moments = np.arange(2 * 8 * 2 * 3, dtype=np.float32).reshape(2, 8, 2, 3)
    (tmp_path / "00000").mkdir()
    for i, latent in enumerate(moments):
        np.save(tmp_path / f"00000/img{i}.npy", latent)
    write_labels(tmp_path, {"labels": [["00000/img0.npy", 1], ["00000/img1.npy", 0]]})
    for path in (tmp_path, zipped(tmp_path)):
        source = open_source(str(path))
        assert (source.shape, source.latent) == ((4, 2, 3), True)
        np.testing.assert_array_equal(everything(source), moments.reshape(2, 2, 4, 2, 3))
        dataset = Dataset(source, np.arange(2))
        np.testing.assert_array_equal(dataset.read(), moments[:, :4])
    np.save(tmp_path / "00000/img1.npy", moments[0, :7])
    with pytest.raises(ValueError, match=r"img1\.npy is float32 of shape \(7, 2, 3\); a latent is"):
        everything(open_source(str(tmp_path)))
    (tmp_path / "00000/img1.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"img1\.npy cannot be read as an array: "):
        everything(open_source(str(tmp_path)))
    write_images(tmp_path, {"a.png": pixels(1, 4, 4)[0]})
    with pytest.raises(ValueError, match=r"holds both images \(a\.png\) and latents"):
        open_source(str(tmp_path))


# Arrays


@pytest.mark.parametrize("shape", [(5, 5, 6), (5, 1, 5, 6), (5, 5, 6, 1)])
def test_arrays_of_images_are_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images, labels = pixels(*shape), np.array([0, 1, 1, 0, 2])
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.savez(tmp_path / "b.npz", images, labels)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    for path in (tmp_path / "a.npz", tmp_path / "b.npz", tmp_path):
        source = open_source(str(path))
        np.testing.assert_array_equal(everything(source), images.reshape(5, 1, 5, 6))
        assert source.labels is not None
        assert source.labels.tolist() == labels.tolist()
    single = open_source(str(tmp_path / "images.npy"))
    assert (single.labels, single.shape) == (None, (1, 5, 6))


def test_arrays_of_latents_are_read(tmp_path: Path) -> None:
    mean = np.random.default_rng(0).standard_normal((5, 4, 2, 2))
    np.savez(tmp_path / "both.npz", mean=mean, std=np.abs(mean), labels=np.arange(5))
    np.save(tmp_path / "mean.npy", mean)
    both, alone = open_source(str(tmp_path / "both.npz")), open_source(str(tmp_path))
    assert both.latent
    assert alone.latent
    expected = np.stack([mean, np.abs(mean)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(everything(both), expected)
    np.testing.assert_array_equal(everything(alone), expected[:, :1])
    assert both.num_classes == 5


def test_npy_files_are_mapped_not_loaded(tmp_path: Path) -> None:
    """A change of the file shows: nothing was copied when it was opened."""
    np.save(tmp_path / "images.npy", pixels(5, 4, 4))
    source = open_source(str(tmp_path))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r+")
    mapped[3] = 7
    mapped.flush()
    assert (source.read(np.array([3])) == 7).all()


ONES = np.ones((5, 4, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": ONES}, r"a\.npz holds x; it needs an array 'images', or 'mean'"),
        ({"images": ONES}, "'images', is of type float32; images are uint8"),
        ({"images": pixels(5, 4, 4, 4)}, r"has shape \(5, 4, 4, 4\), which is not clearly"),
        ({"images": pixels(5, 7, 8, 9)}, r"has shape \(5, 7, 8, 9\), which is not clearly"),
        ({"images": pixels(5, 4, 4), "labels": np.ones(4, int)}, r"labels of shape \(4,\) for 5"),
        ({"images": pixels(5, 4, 4), "labels": np.ones(5)}, "labels of type float64; classes are"),
        ({"images": pixels(2, 4, 4), "labels": np.array([0, -3])}, "gives image 1 the class -3"),
        ({"images": pixels(0, 4, 4)}, "holds no images"),
        ({"images": pixels(5, 4, 4), "mean": ONES}, "holds both images and latents"),
        ({"mean": pixels(5, 4, 4)}, r"'mean', is uint8 of shape \(5, 4, 4\); latents are"),
        ({"mean": ONES, "std": ONES[:4]}, r"'mean' has shape \(5, .*'std' \(4, .*be the same"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "a.npz"))


def test_arrays_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(5, 4, 4))
    cut(tmp_path / "a.npz", 10)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read: "):
        open_source(str(tmp_path / "a.npz"))
    np.save(tmp_path / "mean.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"mean\.npy cannot be read: .*Python objects in dtype"):
        open_source(str(tmp_path))
