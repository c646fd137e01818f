"""The classifier: accurate, reproducible, cached, and a judge that notices bad images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reference_model.classifier import (
    Classifier,
    ClassifierConfig,
    cached_classifier,
    train_classifier,
)
from reference_model.data import Dataset, Split, load_dataset
from reference_model.data_source import Source
from reference_model.metrics import FeatureStatistics, frechet_distance
from reference_model.pictures import Pictures

QUICK = ClassifierConfig(epochs=3)


def digits(split: Split) -> tuple[Tensor, Tensor]:
    dataset = load_dataset("digits", split)
    return dataset.read(), dataset.labels


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return train_classifier(QUICK, *digits("train"), 10, progress=False)


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    return float((classifier.read(images)[1] == labels.numpy()).mean())


def pictures(images: Tensor, labels: Tensor) -> Pictures:
    """Images in memory as a set of pictures."""
    count, channels, height, width = images.shape
    source = Source(
        "memory", count, (channels, height, width), lambda i: images.numpy()[i], labels.numpy()
    )
    return Pictures(Dataset(source, np.arange(count)))


def distance(classifier: Classifier, a: Tensor, b: Tensor) -> float:
    statistics = []
    for images in (a, b):
        statistics.append(FeatureStatistics(classifier.config.num_features))
        statistics[-1].update(classifier.describe(images))
    return frechet_distance(*statistics)


def assert_same_weights(a: Classifier, b: Classifier) -> None:
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], tensor, rtol=0, atol=0)


def test_it_learns_the_digits(classifier: Classifier):
    # Three epochs reach 0.90 to 0.95 over seeds; chance is 0.1.
    assert accuracy(classifier, *digits("held_out")) > 0.8


@pytest.mark.slow
def test_the_default_classifier_is_good():
    images, labels = digits("train")
    config = ClassifierConfig.for_images(len(images))
    assert config == ClassifierConfig()
    model = train_classifier(config, images, labels, 10, progress=False)
    # 0.97 to 0.99 over seeds.
    assert accuracy(model, *digits("held_out")) > 0.95


def test_features_are_standardised_over_the_training_images(classifier: Classifier):
    features, _ = classifier.read(digits("train")[0], batch_size=100)
    # Float32 sums of 1,347 values: about 1e-6 relative.
    torch.testing.assert_close(
        torch.from_numpy(features.mean(axis=0)), torch.zeros(32).double(), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        torch.from_numpy(features.std(axis=0, ddof=1)), torch.ones(32).double(), rtol=1e-4, atol=0
    )


def test_the_distance_grows_with_noise_and_sees_a_missing_class(classifier: Classifier):
    held_out, _ = digits("held_out")
    train, labels = digits("train")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(train.shape, generator=generator) * 127.5

    def noisy(std: float) -> Tensor:
        return (train + std * noise).clamp(0, 255).to(torch.uint8)

    by_noise = [distance(classifier, noisy(std), held_out) for std in (0.0, 0.2, 0.4, 0.8)]
    assert by_noise == sorted(by_noise)
    # Measured 2.4 times at noise 0.4 and 1.8 times without the threes.
    assert by_noise[2] > 1.5 * by_noise[0]
    assert distance(classifier, train[labels != 3], held_out) > 1.3 * by_noise[0]


def test_training_is_reproducible_and_leaves_the_random_state_alone(classifier: Classifier):
    before = torch.random.get_rng_state()
    again = train_classifier(QUICK, *digits("train"), 10, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_weights(classifier, again)
    assert classifier.digest == again.digest


def test_the_cache_gives_the_same_classifier_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = ClassifierConfig(epochs=1, hidden_channels=8)
    images, labels = digits("train")
    data = pictures(images, labels)
    first = cached_classifier(config, data, tmp_path / "new", progress=False)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("reference_model.classifier.train_classifier", refuse)
    second = cached_classifier(config, data, tmp_path / "new", progress=False)
    assert first.digest == second.digest
    assert_same_weights(first, second)

    # Another config or other data must not find this entry.
    changed = images.clone()
    changed[-1, 0, 0, 0] += 1
    for other in (
        (ClassifierConfig(epochs=1, hidden_channels=8, seed=1), data),
        (config, pictures(images[:-1], labels[:-1])),
        (config, pictures(images, labels.flip(0))),
        (config, pictures(changed, labels)),
    ):
        with pytest.raises(AssertionError, match="trained again"):
            cached_classifier(*other, tmp_path / "new", progress=False)

    (file,) = (tmp_path / "new").glob("classifier-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"classifier-.*cannot be read .* remove it to train anew"):
        cached_classifier(config, data, tmp_path / "new", progress=False)


@pytest.mark.parametrize(
    ("count", "epochs", "features"), [(100, 20, 32), (1347, 20, 32), (10_000, 12, 32),
                                      (60_000, 2, 128), (10**7, 2, 128)]
)  # fmt: skip
def test_large_sets_are_seen_less_often_and_in_more_features(
    count: int, epochs: int, features: int
):
    config = ClassifierConfig.for_images(count)
    assert (config.epochs, config.num_features) == (epochs, features)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 31), (4, 32, 32), (3, 64, 64), (1, 100, 20)])
def test_images_of_any_size_and_channels_can_be_told_apart(shape: tuple[int, int, int]):
    """Two unequal classes, dark and bright: 60 and 4 images."""
    labels = (torch.arange(64) >= 60).long()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 100, (64, *shape), generator=generator)
    images = (noise + 150 * labels.reshape(-1, 1, 1, 1)).to(torch.uint8)
    model = train_classifier(ClassifierConfig(epochs=20), images, labels, 2, progress=False)
    assert model.describe(images).shape == (64, 32)
    assert accuracy(model, images, labels) == 1.0
    # Whatever the size, no more positions are looked at than in an image of 16×16.
    largest = model.conv1(torch.zeros(1, *shape)).shape[2:]
    assert max(largest) <= 16


def test_unpaired_or_too_few_images_are_refused():
    images, labels = digits("train")
    with pytest.raises(ValueError, match=r"one label each \(got 1347 images, 1346 labels\)"):
        train_classifier(QUICK, images, labels[:-1], 10, progress=False)
    with pytest.raises(ValueError, match="at least 64 images"):
        train_classifier(QUICK, images[:63], labels[:63], 10, progress=False)
    with pytest.raises(ValueError, match="at least two classes"):
        train_classifier(QUICK, images, torch.zeros_like(labels), 1, progress=False)
