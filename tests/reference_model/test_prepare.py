"""The command prepare: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import reference_model.prepare as prepare_module
from reference_model.cli import main
from reference_model.data import load_dataset, open_source
from reference_model.prepare import prepare
from reference_model.prepare_pixels import as_mode, resize_and_crop
from tests.reference_model.data_sets import (
    edm_folder,
    pixels,
    write_images,
    write_labels,
    write_mnist,
    zipped,
)
from tests.reference_model.small_vae import save_vae


def everything(path: Path) -> np.ndarray:
    source = open_source(str(path))
    return source.read(np.arange(source.size))


def photos(folder: Path) -> Path:
    """Seven pictures of two classes, of unequal sizes."""
    sizes = [(9, 5), (5, 9), (8, 8), (30, 17), (4, 4), (6, 12), (3, 3)]
    images = {f"{'ab'[i % 2]}/{i}.png": pixels(1, *s, 3)[0] for i, s in enumerate(sizes)}
    return write_images(folder, images)


def test_order_of_operations_is_the_papers() -> None:
    """Halve with a box while the shorter side is twice the target, bicubic, cut the middle."""
    picture = Image.fromarray(pixels(1, 45, 70, 3)[0])
    expected = picture.resize((35, 22), Image.Resampling.BOX)  # 22 < 2 · 16: no more halving
    expected = expected.resize((25, 16), Image.Resampling.BICUBIC)  # 35 · 16/22 = 25.45
    expected = expected.crop((4, 0, 20, 16))
    assert resize_and_crop(picture, 16).tobytes() == expected.tobytes()
    # Twice the target is halved, and then there is nothing left to resize.
    twice = pixels(1, 32, 32)[0]
    means = twice.reshape(16, 2, 16, 2).mean(axis=(1, 3))
    halved = np.asarray(resize_and_crop(Image.fromarray(twice), 16))
    assert np.abs(halved - means).max() <= 1  # rounded after each of two directions
    assert resize_and_crop(Image.fromarray(twice[:5, :7]), 16).size == (16, 16)


def test_modes_become_colour_or_grey() -> None:
    rgba = np.zeros((1, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)  # opaque; the other pixel is transparent
    picture = Image.fromarray(rgba)
    assert np.asarray(as_mode(picture, False, "")).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    grey = as_mode(Image.fromarray(pixels(1, 4, 4)[0]), True, "")
    np.testing.assert_array_equal(np.asarray(grey), pixels(1, 4, 4)[0])
    assert as_mode(grey.convert("P"), False, "").mode == "RGB"
    with pytest.raises(ValueError, match=r"x\.png has Pillow's mode I;16, more than 8 bits"):
        as_mode(Image.fromarray(np.zeros((2, 2), np.uint16)), True, "x.png")


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_photos_become_a_set_of_squares(tmp_path: Path, dest: str) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / dest
    assert prepare(source, out, size=4, progress=False) == 7
    written = open_source(str(out))
    assert (written.shape, written.size) == ((3, 4, 4), 7)
    assert written.labels is not None
    assert written.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    with Image.open(source / "a" / "2.png") as picture:
        expected = np.asarray(resize_and_crop(picture, 4)).transpose(2, 0, 1)
    np.testing.assert_array_equal(written.read(np.array([1]))[0], expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([dest, "photos"])
    if dest == "out.zip":
        with zipfile.ZipFile(out) as archive:
            names = archive.namelist()
            labels = json.loads(archive.read("dataset.json"))["labels"]
        assert names == [f"00000/img{i:08d}.png" for i in range(7)] + ["dataset.json"]
        assert labels[4] == ["00000/img00000004.png", 1]


def test_idx_files_stay_grey_and_keep_their_test_set(tmp_path: Path) -> None:
    path, out = write_mnist(tmp_path / "set"), tmp_path / "out.zip"
    assert prepare(path, out, progress=False) == 18
    for split in ("train", "held_out"):
        before, after = (load_dataset(str(p), split) for p in (path, out))  # type: ignore[arg-type]
        np.testing.assert_array_equal(after.read(), before.read())
        assert after.labels.tolist() == before.labels.tolist()


def test_prepared_sets_can_be_prepared_again(tmp_path: Path) -> None:
    images = edm_folder(tmp_path / "set")
    prepare(zipped(tmp_path / "set"), tmp_path / "out", progress=False)
    np.testing.assert_array_equal(everything(tmp_path / "out"), images)
    prepare(tmp_path / "out", tmp_path / "grey.zip", grey=True, progress=False)
    assert everything(tmp_path / "grey.zip").shape == (6, 1, 4, 4)


def test_sets_without_classes_have_none_afterwards(tmp_path: Path) -> None:
    write_images(tmp_path / "a", {"x.png": pixels(1, 4, 4)[0]})
    prepare(tmp_path / "a", tmp_path / "b", progress=False)
    assert json.loads((tmp_path / "b" / "dataset.json").read_text()) == {"labels": None}


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_stopped_conversion_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dest: str
) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / dest
    content = (source / "b" / "3.png").read_bytes()
    (source / "b" / "3.png").write_bytes(b"damaged")
    one_by_one = replace(prepare_module.PNG, batch_size=1)
    monkeypatch.setattr(prepare_module, "PNG", one_by_one)
    with pytest.raises(ValueError, match=r"photos/b/3\.png cannot be read as an image"):
        prepare(source, out, size=4, workers=1, progress=False)
    assert not out.exists()
    finished = sorted((tmp_path / f"{dest}.partial" / "00000").iterdir())
    assert [p.name for p in finished] == [f"img{i:08d}.png" for i in range(5)]
    with pytest.raises(ValueError, match=r"begun with size=4 \(now 8\); go on with the same"):
        prepare(source, out, size=8, progress=False)

    (source / "b" / "3.png").write_bytes(content)
    finished[1].write_bytes(b"")  # a power failure can empty what was not synced
    kept = finished[0].stat().st_mtime_ns
    opened = []
    original = prepare_module.open_picture

    def open_picture(content: bytes, where: str) -> Image.Image:
        opened.append(Path(where).name)
        return original(content, where)

    monkeypatch.setattr(prepare_module, "open_picture", open_picture)
    assert prepare(source, out, size=4, workers=1, progress=False) == 7
    # The first picture is opened for its size; then the emptied one, and what was missing.
    assert opened == ["0.png", "2.png", "3.png", "5.png"]
    if dest == "out":
        assert (out / "00000" / finished[0].name).stat().st_mtime_ns == kept
    assert not (tmp_path / f"{dest}.partial").exists()
    prepare(source, tmp_path / "straight", size=4, progress=False)
    np.testing.assert_array_equal(everything(out), everything(tmp_path / "straight"))


def test_misuse_is_explained(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"a/2\.png is 8×8 pixels, but .*a/0\.png is 5×9; give a"):
        prepare(source, tmp_path / "out", progress=False)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already; remove it, or write to another"):
        prepare(source, tmp_path / "there", progress=False)
    latents = tmp_path / "latents"
    latents.mkdir()
    np.save(latents / "a.npy", np.zeros((8, 2, 2), np.float32))
    with pytest.raises(ValueError, match="latents holds latents; images are what"):
        prepare(latents, tmp_path / "out", progress=False)


def test_command_teaches_and_reports(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    text = CliRunner().invoke(main, ["prepare", "--help"]).output
    assert "python -m reference_model prepare photos/ photos64.zip --size 64" in text
    arguments = ["prepare", str(source), str(tmp_path / "out.zip"), "--size", "4", "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert result.output == f"Wrote 7 images to {tmp_path / 'out.zip'}\n"
    again = CliRunner().invoke(main, arguments)
    assert (again.exit_code, "exists already" in again.output) == (1, True)


def test_latents_are_written_and_drawn(tmp_path: Path) -> None:
    model = save_vae(tmp_path / "vae")
    source = photos(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"sides that are multiples of 2 \(got 5×5 pixels\)"):
        prepare(source, tmp_path / "odd", size=5, vae=tmp_path / "vae", progress=False)
    assert not (tmp_path / "odd.partial").exists()
    for dest in ("out.zip", "out"):
        # The last batch is smaller.
        prepare(source, tmp_path / dest, size=4, vae=tmp_path / "vae", batch_size=3, progress=False)
    prepare(source, tmp_path / "squares", size=4, progress=False)
    with torch.no_grad():
        pixels = torch.from_numpy(everything(tmp_path / "squares")) / 255
        latents = model.encode(pixels).latent_dist
    expected = torch.stack([latents.mean, latents.std], dim=1).numpy()
    for dest in ("out.zip", "out"):
        # The size of a batch changes the order of summation in float32.
        np.testing.assert_allclose(everything(tmp_path / dest), expected, rtol=0, atol=1e-5)
    dataset = load_dataset(str(tmp_path / "out"), held_out=0)
    assert (dataset.shape, dataset.num_classes) == ((4, 2, 2), 2)
    z, labels = dataset.stream(0, 7, seed=0)
    assert z.dtype == labels.dtype == torch.float32
    write_labels(tmp_path / "out", {"labels": None})
    assert load_dataset(str(tmp_path / "out"), held_out=0).num_classes == 0
