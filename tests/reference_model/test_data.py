"""The embedded digits, their split, and the order in which images are seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from reference_model.data import Dataset, load_dataset
from reference_model.data_digits import open_digits
from reference_model.data_order import held_out_members, sample_indices, stream_noise

TRAIN, HELD_OUT = load_dataset("digits", "train"), load_dataset("digits", "held_out")


def test_digits_are_all_there() -> None:
    assert (len(TRAIN), len(HELD_OUT)) == (1347, 450)
    for part in (TRAIN, HELD_OUT):
        images = part.read()
        assert images.shape == (len(part), *part.shape)
        assert part.shape == (1, 8, 8)
        assert images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert (int(images.min()), int(images.max())) == (0, 255)
        assert part.num_classes == 10
    counts = torch.bincount(torch.cat([TRAIN.labels, HELD_OUT.labels])).tolist()
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_every_class_is_held_out_alike() -> None:
    held_out = torch.bincount(HELD_OUT.labels)
    everything = held_out + torch.bincount(TRAIN.labels)
    # A quarter, rounded to whole images.
    assert (held_out - everything * 0.25).abs().max() <= 0.5


def test_split_is_disjoint_and_fixed() -> None:
    as_rows = [{bytes(image.numpy()) for image in part.read()} for part in (TRAIN, HELD_OUT)]
    assert not as_rows[0] & as_rows[1]
    # Members and first images of version 0.1: runs go on with the images that they began with.
    assert HELD_OUT.members[:8].tolist() == [1, 5, 9, 12, 14, 15, 16, 17]
    assert TRAIN.members[:8].tolist() == [0, 2, 3, 4, 6, 7, 8, 10]


def test_held_out_fraction_can_be_chosen() -> None:
    assert len(load_dataset("digits", "held_out", held_out=0.1)) == 179
    everything = [load_dataset("digits", split, held_out=0) for split in ("train", "held_out")]
    assert [len(part) for part in everything] == [1797, 1797]
    with pytest.raises(ValueError, match=r"held_out must lie in \[0, 1\) \(got 1\)"):
        load_dataset("digits", held_out=1)
    with pytest.raises(ValueError, match=r"held_out half of digits is empty: its classes have too"):
        load_dataset("digits", "held_out", held_out=0.001)


def test_ink_counts_are_stretched_to_bytes() -> None:
    values = np.unique(TRAIN.read().numpy())
    np.testing.assert_array_equal(values, np.rint(np.arange(17) * 255 / 16))


def test_members_of_each_class_are_chosen_alone() -> None:
    """What is held out of a class does not depend on where its images stand among the others."""
    labels = np.array([0, 1] * 40)
    chosen = held_out_members(labels, 0.25)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [10, 10])
    grouped = held_out_members(np.sort(labels), 0.25)
    np.testing.assert_array_equal(chosen[labels == 0], grouped[:40])


def test_stream_resumes_from_the_number_of_images_alone() -> None:
    whole = sample_indices(10, nimg=0, count=47, seed=1)
    pieces = [sample_indices(10, nimg, min(5, 47 - nimg), seed=1) for nimg in range(0, 47, 5)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_every_epoch_shows_every_image_once_in_a_new_order() -> None:
    epochs = sample_indices(10, nimg=0, count=30, seed=1).reshape(3, 10)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seed_changes_the_order() -> None:
    assert (sample_indices(100, 0, 100, seed=1) != sample_indices(100, 0, 100, seed=2)).any()


def test_order_is_the_same_on_every_machine() -> None:
    """A run resumed elsewhere sees the same images."""
    assert sample_indices(1000, nimg=998, count=4, seed=7).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [425, 651, 513, 857]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_processes_share_the_stream_of_one(world_size: int) -> None:
    whole = sample_indices(10, nimg=8, count=30, seed=1)
    together = np.full(30, -1)
    for rank in range(world_size):
        together[rank::world_size] = sample_indices(10, 8, 30, 1, rank, world_size)
    np.testing.assert_array_equal(together, whole)


@pytest.mark.parametrize("rank", [-1, 2])
def test_absent_process_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must lie in 0\.\.1 \(got {rank}\)"):
        sample_indices(10, 0, 4, seed=1, rank=rank, world_size=2)


def test_batches_are_images_and_one_hot_classes() -> None:
    images, labels = TRAIN.stream(nimg=1340, count=9, seed=3)
    indices = sample_indices(len(TRAIN), 1340, 9, seed=3)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.float32)
    torch.testing.assert_close(images, TRAIN.read(indices), rtol=0, atol=0)
    assert labels.argmax(1).tolist() == TRAIN.labels[indices].tolist()
    assert labels.sum(1).tolist() == [1] * 9


def test_images_without_classes_have_empty_labels() -> None:
    source = replace(open_digits(), labels=None)
    dataset = Dataset(source, np.arange(source.size))
    assert dataset.num_classes == 0
    assert dataset.stream(0, 4, seed=0)[1].shape == (4, 0)


def latents(parts: int) -> Dataset:
    """Ten latents of 2×3×4 with means of 10·number, and, of two parts, deviations of 2."""
    source = replace(
        open_digits(),
        size=10,
        shape=(2, 3, 4),
        read=lambda indices: read_latents(indices, parts),
        labels=None,
        latent=True,
    )
    return Dataset(source, np.arange(10))


def read_latents(indices: NDArray[np.int64], parts: int) -> NDArray[np.float32]:
    moments = np.zeros((len(indices), parts, 2, 3, 4), np.float32)
    moments[:, 0] = 10 * indices[:, None, None, None]
    moments[:, 1:] = 2
    return moments


def test_latents_are_drawn_anew_at_each_visit_and_the_same_at_each_position() -> None:
    dataset = latents(parts=2)
    z, _ = dataset.stream(nimg=0, count=20, seed=5)
    order = sample_indices(10, 0, 20, seed=5)
    eps = (z.numpy() - 10 * order[:, None, None, None]) / 2
    # z is up to 90 in float32, so that ε comes back to 90 · 2⁻²⁴ · 2 at worst.
    np.testing.assert_allclose(eps, stream_noise((2, 3, 4), np.arange(20), 5), rtol=0, atol=1e-5)
    assert len({e.tobytes() for e in eps}) == 20

    for rank in range(2):
        part, _ = dataset.stream(nimg=0, count=20, seed=5, rank=rank, world_size=2)
        torch.testing.assert_close(part, z[rank::2], rtol=0, atol=0)
    late, _ = dataset.stream(nimg=13, count=3, seed=5)
    torch.testing.assert_close(late, z[13:16], rtol=0, atol=0)
    other, _ = dataset.stream(nimg=0, count=20, seed=6)
    assert (other - z).abs().min() > 0


def test_noise_of_latents_is_unit_normal_and_the_same_on_every_machine() -> None:
    noise = stream_noise((1000,), np.arange(100), seed=0)
    # 10⁵ draws: five standard errors of the mean, and of the variance.
    assert abs(noise.mean()) < 5 * 1e-5**0.5
    assert abs(noise.var() - 1) < 5 * 2e-5**0.5
    first = stream_noise((3,), np.array([7]), seed=2)[0]
    np.testing.assert_allclose(first, GOLDEN_NOISE, rtol=0, atol=1e-6)  # printed to 7 digits


GOLDEN_NOISE = [0.9770135, -0.2844965, -0.9226215]


def test_latents_without_deviations_are_their_means() -> None:
    z, _ = latents(parts=1).stream(nimg=0, count=10, seed=5)
    assert z[:, 0, 0, 0].tolist() == (10.0 * sample_indices(10, 0, 10, seed=5)).tolist()
    torch.testing.assert_close(latents(2).read(), latents(1).read(), rtol=0, atol=0)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no data set at 'mnist'; give 'digits', which"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="no data set given; 'digits' is built in"):
        load_dataset("")
    with pytest.raises(ValueError, match="split must be 'train' or 'held_out'"):
        load_dataset("digits", "test")  # type: ignore[arg-type]
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"notes\.txt' is no data set: expected a folder, a \.zip"):
        load_dataset(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match=r"holds no images \(\.png"):
        load_dataset(str(tmp_path))
