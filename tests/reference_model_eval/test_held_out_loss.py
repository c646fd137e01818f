"""Loss on held-out images: its formula, what it is independent of, and paired comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference_model.configs import NetworkConfig
from reference_model.data import Dataset, load_dataset
from reference_model.data_source import Source
from reference_model.encoders import PIXELS, Latents, SpaceToDepth
from reference_model.held_out_loss import LEVELS, HeldOutLoss, loss_at_levels
from reference_model.precond import build_model


class Shrink(nn.Module):
    """D(x; σ, c) = gain·x, plus a tenth of the class number: a denoiser that numpy can follow."""

    def __init__(self, gain: float = 0.5, label_dim: int = 10) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.config = NetworkConfig(
            img_resolution=8, img_channels=1, label_dim=label_dim, model_channels=16,
            channel_mult=(1,), attn_resolutions=(),
        )  # fmt: skip

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        denoised = self.gain * x
        if class_labels is not None:
            denoised = denoised + 0.1 * class_labels.argmax(dim=1).reshape(-1, 1, 1, 1)
        return denoised


@pytest.fixture(scope="module")
def held_out() -> Dataset:
    return load_dataset("digits", "held_out")


def test_it_is_the_weighted_square_computed_directly(held_out: Dataset):
    levels, count, seed = (0.1, 1.0, 7.0), 5, 40
    loss = loss_at_levels(Shrink(), held_out, PIXELS, levels, count=count, seed=seed)
    images, one_hot = held_out.stream(0, count, seed)
    y = images.numpy().astype(np.float64) / 127.5 - 1
    expected = np.empty((3, count))
    for i in range(count):
        generator = torch.Generator().manual_seed(seed + i)
        for row, sigma in enumerate(levels):
            noise = torch.randn((1, 8, 8), generator=generator).double().numpy()
            denoised = 0.5 * (y[i] + sigma * noise) + 0.1 * one_hot[i].argmax().item()
            weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
            expected[row, i] = weight * np.mean((denoised - y[i]) ** 2)
    # Float32 images and denoiser against float64: a few 1e-7 of values of order one.
    np.testing.assert_allclose(loss.per_image, expected, rtol=1e-5)
    np.testing.assert_allclose(loss.by_level, expected.mean(axis=1), rtol=1e-5)
    assert loss.mean == pytest.approx(expected.mean(), rel=1e-5)
    by_image = expected.mean(axis=0)
    assert loss.error == pytest.approx(by_image.std(ddof=1) / np.sqrt(count), rel=1e-5)


def test_batches_modes_and_earlier_draws_change_nothing(held_out: Dataset):
    net = build_model(
        img_resolution=8, img_channels=1, label_dim=10, model_channels=16, channel_mult=(1,),
        attn_resolutions=(), dropout=0.5,
    ).train()  # fmt: skip
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    options: dict[str, Any] = {"count": 20, "seed": 3, "levels": (0.2, 2.0)}
    first = loss_at_levels(net, held_out, PIXELS, **options)
    torch.randn(1)
    second = loss_at_levels(net, held_out, PIXELS, **options, batch_size=7)
    # Another batch size sums in another order.
    np.testing.assert_allclose(second.per_image, first.per_image, rtol=1e-5)
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), "training mode would normalise weights in place"
    other = loss_at_levels(net, held_out, PIXELS, **{**options, "seed": 4})
    assert not np.allclose(other.per_image, first.per_image, rtol=1e-2)


def test_pairs_tell_weights_apart_that_means_do_not(held_out: Dataset):
    a, b = (loss_at_levels(Shrink(g), held_out, PIXELS, count=100) for g in (0.5, 0.501))
    difference, error = b.difference(a)
    assert difference == pytest.approx(b.mean - a.mean, rel=1e-9)
    assert abs(difference) < a.error, "the errors of the means hide it"
    assert abs(difference) > 4 * error, "the error of the pairs does not"
    assert a.levels == LEVELS


def test_encoders_and_unconditional_networks(held_out: Dataset):
    plain = loss_at_levels(Shrink(0.0, label_dim=0), held_out, PIXELS, (1.0,), count=9)
    folded = loss_at_levels(Shrink(0.0, label_dim=0), held_out, SpaceToDepth(), (1.0,), count=9)
    # D = 0 leaves λ(1)·mean(y²), and folding only moves pixels.
    np.testing.assert_allclose(plain.per_image, folded.per_image, rtol=1e-6)


def test_latents_are_drawn_by_the_seed():
    rng = np.random.default_rng(0)
    moments = np.stack([rng.standard_normal((6, 4, 2, 2)), np.ones((6, 4, 2, 2))], axis=1)
    source = Source("memory", 6, (4, 2, 2), lambda i: moments[i].astype(np.float32), latent=True)
    dataset = Dataset(source, np.arange(6))
    losses = [
        loss_at_levels(Shrink(0.0, label_dim=0), dataset, Latents(), (1.0,), seed=seed).mean
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_bad_requests_are_refused(held_out: Dataset, tmp_path: Path):
    net = Shrink()
    for levels in ((), (0.0,), (1.0, float("inf")), (float("nan"),)):
        with pytest.raises(ValueError, match="noise levels must be positive numbers"):
            loss_at_levels(net, held_out, PIXELS, levels)
    for count in (0, len(held_out) + 1):
        with pytest.raises(ValueError, match=rf"count must lie in 1\.\.{len(held_out)}"):
            loss_at_levels(net, held_out, PIXELS, count=count)
    with pytest.raises(ValueError, match="takes 7 classes, and the images have 10"):
        loss_at_levels(Shrink(label_dim=7), held_out, PIXELS)
    one = HeldOutLoss((1.0,), np.ones((1, 4)))
    with pytest.raises(ValueError, match="1 levels of 4 images cannot be paired with 1 levels of"):
        one.difference(HeldOutLoss((1.0,), np.ones((1, 5))))
