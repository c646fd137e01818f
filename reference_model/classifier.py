"""A small classifier of the training images: its features judge generated ones.

Inception features mean little for eight-pixel digits. A network that has learned to tell this data
set's classes apart is trained in seconds and notices what matters: shapes, and missing classes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
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


class Classifier(nn.Module):
    """Three convolutions and two linear layers; the features are what the first of these gives.

    They are taken before its activation function, where they are closest to the Gaussians that the
    Fréchet distance takes them for.

    Args:
        config: Widths and training options.
        in_channels: Channels of an image.
        num_classes: Number of classes.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: ClassifierConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        hidden, features = config.hidden_channels, config.num_features
        self.config = config
        self.conv1 = nn.Conv2d(in_channels, hidden // 2, 3, padding=1)
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

    @torch.inference_mode()
    def describe(
        self, images: Tensor, batch_size: int = 1024
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Features and predicted classes of images.

        Args:
            images: uint8 ``[N, C, H, W]``.
            batch_size: Images per forward pass.

        Returns:
            Standardised features ``[N, num_features]`` float64 and classes ``[N]`` int64.
        """
        features, classes = [], []
        for batch in images.split(batch_size):
            hidden = self._activations(encode_pixels(batch))
            features.append((hidden - self.feature_mean) / self.feature_std)
            classes.append(self.head(F.silu(hidden)).argmax(dim=1))
        return torch.cat(features).double().numpy(), torch.cat(classes).numpy()

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of images ``[N, C, H, W]`` put into their class ``[N]``."""
        return float((self.describe(images)[1] == labels.numpy()).mean())


def train_classifier(
    config: ClassifierConfig, images: Tensor, labels: Tensor, *, progress: bool = True
) -> Classifier:
    """Train from scratch; the same config and images give the same classifier.

    The global random state is left as it was.

    Args:
        config: Widths and training options.
        images: Training images, uint8 ``[N, C, H, W]``.
        labels: Their classes ``[N]`` int64, counted from 0.
        progress: Whether to show a progress bar.

    Returns:
        The classifier in evaluation mode.

    Raises:
        ValueError: If there are fewer images than one batch or labels do not pair up.
    """
    if len(images) != len(labels) or len(images) < config.batch_size:
        raise ValueError(
            f"the classifier needs at least {config.batch_size} images, one label each "
            f"(got {len(images)} images, {len(labels)} labels)"
        )
    x, y = encode_pixels(images), labels
    steps_per_epoch = len(x) // config.batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Classifier(config, in_channels=x.shape[1], num_classes=int(y.max()) + 1)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=config.epochs * steps_per_epoch
        )
        for _ in tqdm(range(config.epochs), desc="classifier", unit="epoch", disable=not progress):
            order = torch.randperm(len(x))[: steps_per_epoch * config.batch_size]
            for batch in order.split(config.batch_size):
                noisy = x[batch] + config.noise * torch.randn_like(x[batch])
                loss = F.cross_entropy(model(noisy), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    model.eval()
    with torch.no_grad():
        activations = torch.cat([model._activations(batch) for batch in x.split(1024)])
        model.feature_mean.copy_(activations.mean(dim=0))
        model.feature_std.copy_(activations.std(dim=0).clamp_min(1e-6))
    return model


def cached_classifier(
    config: ClassifierConfig,
    images: Tensor,
    labels: Tensor,
    cache_dir: str | Path,
    *,
    progress: bool = True,
) -> tuple[Classifier, str]:
    """Load the classifier of this config and these images, or train and store it.

    Args:
        config: Widths and training options.
        images: Training images, uint8 ``[N, C, H, W]``.
        labels: Their classes ``[N]`` int64.
        cache_dir: Folder of the cached file, created if missing.
        progress: Whether to show a progress bar if it must train.

    Returns:
        The classifier in evaluation mode, and a digest of config and data: distances are
        comparable only under the same one.
    """
    digest = _digest(config, images, labels)
    path = Path(cache_dir) / f"classifier-{digest}.safetensors"
    if path.exists():
        return _load(path, config), digest
    model = train_classifier(config, images, labels, progress=progress)
    about = {
        "config": asdict(config),
        "in_channels": int(images.shape[1]),
        "num_classes": int(labels.max()) + 1,
    }
    content = save(model.state_dict(), metadata={"about": json.dumps(about, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))
    return model, digest


def _load(path: Path, config: ClassifierConfig) -> Classifier:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    model = Classifier(config, about["in_channels"], about["num_classes"])
    model.load_state_dict(state)
    return model.eval()


def _digest(config: ClassifierConfig, images: Tensor, labels: Tensor) -> str:
    """Twelve hexadecimal digits that change with the config or the data."""
    about = {"config": asdict(config), "shape": list(images.shape), "version": 2}
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for data in (images, labels):
        sha.update(data.numpy().tobytes())
    return sha.hexdigest()[:12]
