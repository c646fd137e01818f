"""The embedded digits, their split, the order of training images, pixels as numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reference_model.data import (
    decode_pixels,
    encode_pixels,
    load_dataset,
    load_digits,
    sample_indices,
)


def test_digits_are_all_there() -> None:
    train, held_out = load_digits("train"), load_digits("held_out")
    assert len(train[0]) + len(held_out[0]) == 1797
    for images, labels in (train, held_out):
        assert images.shape == (len(labels), 1, 8, 8)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert (int(images.min()), int(images.max())) == (0, 255)
    counts = torch.bincount(torch.cat([train[1], held_out[1]])).tolist()
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_every_class_is_held_out_alike() -> None:
    held_out = torch.bincount(load_digits("held_out")[1])
    everything = held_out + torch.bincount(load_digits("train")[1])
    # A quarter, rounded to whole images.
    assert (held_out - everything * 0.25).abs().max() <= 0.5


def test_split_is_disjoint_and_fixed() -> None:
    train, held_out = load_digits("train")[0], load_digits("held_out")[0]
    as_rows = [{bytes(image.numpy()) for image in part} for part in (train, held_out)]
    assert not as_rows[0] & as_rows[1]
    again = load_digits("held_out")[0]
    torch.testing.assert_close(held_out, again, rtol=0, atol=0)


def test_ink_counts_are_stretched_to_bytes() -> None:
    values = np.unique(load_digits("train")[0].numpy())
    np.testing.assert_array_equal(values, np.rint(np.arange(17) * 255 / 16))


def test_pixels_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    x = encode_pixels(pixels)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    torch.testing.assert_close(decode_pixels(x), pixels, rtol=0, atol=0)
    assert decode_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


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


def test_batches_are_floats_and_one_hot() -> None:
    dataset = load_dataset("digits")
    images, labels = dataset.batch(np.array([3, 5]))
    assert images.dtype == labels.dtype == torch.float32
    torch.testing.assert_close(images, encode_pixels(dataset.images[[3, 5]]), rtol=0, atol=0)
    assert labels.argmax(1).tolist() == dataset.labels[[3, 5]].tolist()
    assert labels.sum(1).tolist() == [1, 1]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown data set 'mnist'; 'digits' is built in"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="split must be 'train' or 'held_out'"):
        load_digits("test")  # type: ignore[arg-type]
