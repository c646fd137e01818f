"""A small classifier of the training images: its features judge generated ones.

Inception features mean little for eight-pixel digits. A network that has learned to tell this data
set's classes apart is trained in seconds and notices what matters: shapes, and missing classes.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from reference_model.checkpoint import write_atomically
from reference_model.encoders import encode_pixels
from reference_model.features import weights_digest
from reference_model.pictures import Pictures

FINEST = 16
"""Pixels on a side at which images of any size are looked at; finer detail becomes channels."""


@dataclass(frozen=True)
class ClassifierConfig:
    """How the classifier is built and trained; a change makes a new cache entry.

    Attributes:
        num_features: Width of the layer whose activations are the features. Few enough for a
            covariance of full rank from a few hundred images.
        hidden_channels: Width of the other layers.
        epochs: Passes over the training images.
        batch_size: Images per step.
        learning_rate: Peak of a one-cycle schedule.
        weight_decay: Of AdamW.
        noise: Standard deviation of noise added to training images, which lie in [-1, 1].
        seed: Decides initial weights, order and noise.
    """

    num_features: int = 32
    hidden_channels: int = 64
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    noise: float = 0.1
    seed: int = 0

    @classmethod
    def for_images(cls, count: int) -> ClassifierConfig:
        """Return what suits a number of training images.

        Few images are seen many times, many a few times; and where there are thousands of held-out
        images to compare with, more features see more.
        """
        epochs = min(cls.epochs, max(2, 120_000 // count))
        return cls(epochs=epochs) if count < 20_000 else cls(epochs=epochs, num_features=128)


class Classifier(nn.Module):
    """Three convolutions and two linear layers; the features are what the first of these gives.

    They are taken before its activation function, where they are closest to the Gaussians that the
    Fréchet distance takes them for.

    Args:
        config: Widths and training options.
        in_channels: Channels of an image.
        num_classes: Number of classes.
        size: Height and width of an image, the larger of both.

    Attributes:
        name: As in `features.FeatureNetwork`.
        dim: As in `features.FeatureNetwork`.
    """

    name = "classifier"

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self, config: ClassifierConfig, in_channels: int, num_classes: int, size: int
    ) -> None:
        super().__init__()
        hidden, features = config.hidden_channels, config.num_features
        self.config, self.dim = config, features
        stride = -(-size // FINEST)
        self.conv1 = nn.Conv2d(
            in_channels, hidden // 2, 2 * stride + 1, stride=stride, padding=stride
        )
        self.conv2 = nn.Conv2d(hidden // 2, hidden, 3, padding=1)
        self.conv3 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.linear = nn.Linear(4 * hidden, features)
        self.head = nn.Linear(features, num_classes)
        # Each feature is measured in standard deviations over the training images, so that the
        # distance weighs all alike and its unit does not depend on how training went.
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))

    def _activations(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv1(x))
        x = F.max_pool2d(F.silu(self.conv2(x)), 2)
        # Means over quarters of the image, whatever its size: strokes have places.
        x = F.adaptive_avg_pool2d(F.silu(self.conv3(x)), 2)
        return self.linear(x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores.

        Args:
            x: Images ``[B, C, H, W]`` in [-1, 1], float32.

        Returns:
            Logits ``[B, num_classes]``.
        """
        return self.head(F.silu(self._activations(x)))

    @cached_property
    def digest(self) -> str:
        """As in `features.FeatureNetwork`; the weights must not change any more."""
        return weights_digest(self.state_dict().items())

    def describe(self, images: Tensor) -> NDArray[np.float64]:
        """Standardised features, float64 ``[N, dim]``, of images, uint8 ``[N, C, H, W]``."""
        return self.read(images)[0]

    @torch.inference_mode()
    def read(
        self, images: Tensor, batch_size: int = 1024
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Features and predicted classes of images.

        Args:
            images: uint8 ``[N, C, H, W]``.
            batch_size: Images per forward pass.

        Returns:
            Standardised features ``[N, dim]`` float64 and classes ``[N]`` int64.
        """
        features, classes = [], []
        device = self.feature_mean.device
        for batch in images.split(batch_size):
            hidden = self._activations(encode_pixels(batch.to(device)))
            features.append((hidden - self.feature_mean) / self.feature_std)
            classes.append(self.head(F.silu(hidden)).argmax(dim=1))
        return torch.cat(features).double().cpu().numpy(), torch.cat(classes).cpu().numpy()


def train_classifier(
    config: ClassifierConfig,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    progress: bool = True,
) -> Classifier:
    """Train from scratch; the same config and images give the same classifier.

    The global random state is left as it was.

    Args:
        config: Widths and training options.
        images: Training images, uint8 ``[N, C, H, W]``.
        labels: Their classes ``[N]`` int64, counted from 0.
        num_classes: Number of classes, at least 2.
        progress: Whether to show a progress bar.

    Returns:
        The classifier in evaluation mode.

    Raises:
        ValueError: If there are fewer images than one batch, labels do not pair up, or there is
            nothing to tell apart.
    """
    if len(images) != len(labels) or len(images) < config.batch_size:
        raise ValueError(
            f"the classifier needs at least {config.batch_size} images, one label each "
            f"(got {len(images)} images, {len(labels)} labels)"
        )
    if num_classes < 2:
        raise ValueError("a classifier needs at least two classes to tell apart (got one)")
    steps_per_epoch = len(images) // config.batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Classifier(config, images.shape[1], num_classes, size=max(images.shape[2:]))
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
        steps = config.epochs * steps_per_epoch
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=steps
        )
        with tqdm(total=steps, desc="classifier", unit="step", disable=not progress) as bar:
            for _ in range(config.epochs):
                order = torch.randperm(len(images))[: steps_per_epoch * config.batch_size]
                for batch in order.split(config.batch_size):
                    x = encode_pixels(images[batch])
                    noisy = x + config.noise * torch.randn_like(x)
                    loss = F.cross_entropy(model(noisy), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()

    model.eval()
    with torch.no_grad():
        batches = [model._activations(encode_pixels(batch)) for batch in images.split(1024)]
        activations = torch.cat(batches)
        model.feature_mean.copy_(activations.mean(dim=0))
        model.feature_std.copy_(activations.std(dim=0).clamp_min(1e-6))
    return model


def cached_classifier(
    config: ClassifierConfig,
    pictures: Pictures,
    cache_dir: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> Classifier:
    """Load the classifier of this config and these images, or train and store it.

    Args:
        config: Widths and training options.
        pictures: Training images with classes; of more than `pictures.IN_MEMORY` as many are used.
        cache_dir: Folder of the cached file, created if missing.
        progress: Whether to show a progress bar if it must train.

    Returns:
        The classifier in evaluation mode.

    Raises:
        ValueError: As `train_classifier`.
    """
    path = Path(cache_dir) / f"classifier-{_key(config, pictures)}.safetensors"
    if path.exists():
        return _load(path, config)
    images, labels = pictures.some()
    about = {
        "in_channels": int(images.shape[1]),
        "num_classes": pictures.dataset.num_classes,
        "size": max(images.shape[2:]),
    }
    model = train_classifier(config, images, labels, about["num_classes"], progress=progress)
    content = save(model.state_dict(), metadata={"about": json.dumps(about, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))
    return model


def _load(path: Path, config: ClassifierConfig) -> Classifier:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        model = Classifier(config, **about)
        model.load_state_dict(state)
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it to train anew") from error
    return model.eval()


def _key(config: ClassifierConfig, pictures: Pictures) -> str:
    """Twelve hexadecimal digits that change with the config or the data."""
    about = {"config": asdict(config), "data": pictures.fingerprint, "version": 3}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
