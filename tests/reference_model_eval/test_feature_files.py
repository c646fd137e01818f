"""Feature networks from files: small stand-ins for Inception, DINOv2 and networks of users."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference_model.feature_files import load_features
from reference_model.features import as_rgb, weights_digest
from reference_model.protocol import Protocol, parse_features

# torch deprecates TorchScript, which is the form in which people have Inception's weights.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

GREY, RGB = (1, 8, 8), (3, 8, 8)


class Means(nn.Module):
    """Mean and weighted mean of each channel."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, channels + 1))

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        means = images.float().mean(dim=(2, 3))
        return torch.cat([means, means * self.weight], dim=1)


class Detector(nn.Module):
    """As StyleGAN's Inception: class probabilities, unless features are asked for."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        means = images.float().mean(dim=(2, 3))
        if return_features:
            return torch.cat([means, means], dim=1)
        return means


class Map(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


def saved(module: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(module), str(path))
    return path


def images_of(shape: tuple[int, int, int], count: int = 70) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)


def test_torchscript_gets_the_images_as_they_are(tmp_path: Path):
    path = saved(Means(), tmp_path / "net.pt")
    network = load_features(f"torchscript:{path}", RGB)
    assert (network.name, network.dim) == ("torchscript", 6)
    images = images_of(RGB)
    features = network.describe(images)
    assert features.dtype == np.float64
    # 70 images are two batches; the sum of 64 values in float32.
    np.testing.assert_allclose(features, Means()(images).detach().numpy(), rtol=1e-6)
    assert network.describe(images[:0]).shape == (0, 6)


def test_the_digest_follows_the_weights(tmp_path: Path):
    networks = [
        load_features(f"torchscript:{saved(module, tmp_path / name)}", RGB)
        for name, module in (("a.pt", Means()), ("b.pt", Detector()))
    ]
    assert networks[0].digest != networks[1].digest
    (tmp_path / "copy.pt").write_bytes((tmp_path / "a.pt").read_bytes())
    assert load_features(f"torchscript:{tmp_path / 'copy.pt'}", RGB).digest == networks[0].digest


@pytest.mark.parametrize("shape", [GREY, RGB])
def test_inception_is_asked_for_features_of_rgb_images(shape: tuple[int, int, int], tmp_path: Path):
    path = saved(Detector(), tmp_path / "inception.pt")
    network = load_features(f"inception:{path}", shape)
    assert (network.name, network.dim) == ("inception", 6)
    means = images_of(shape).double().mean(dim=(2, 3)).expand(-1, 3).numpy()
    np.testing.assert_allclose(network.describe(images_of(shape)), np.tile(means, 2), rtol=1e-6)


def test_inception_weights_alone_need_a_library(tmp_path: Path):
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "pt_inception.pth")
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        message = r"pip install torch-fidelity.* or give the TorchScript file"
    else:
        message = "no weights of the FID's Inception|other weights than"
    with pytest.raises(ValueError, match=message):
        load_features(f"inception:{tmp_path / 'pt_inception.pth'}", RGB)


def test_a_pickle_with_code_is_not_opened(tmp_path: Path):
    path = tmp_path / "inception.pkl"
    path.write_bytes(pickle.dumps(Path("runs code")))
    with pytest.raises(ValueError, match=r"code of its own.* is not opened: take inception-2015"):
        load_features(f"inception:{path}", RGB)


def save_dinov2(folder: Path, image_size: int = 28) -> Path:
    """A random DINOv2 with patches of 14 pixels, and places for `image_size`."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2,
        image_size=image_size, patch_size=14,
    )  # fmt: skip
    model = Dinov2Model(config)
    nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shape", [GREY, RGB])
def test_dinov2_is_its_class_token_for_resized_normalised_images(
    shape: tuple[int, int, int], tmp_path: Path
):
    from transformers import Dinov2Model

    folder = save_dinov2(tmp_path / "dinov2", image_size=224)  # no position is resampled
    network = load_features(f"dinov2:{folder}", shape)
    assert (network.name, network.dim) == ("dinov2", 16)
    images = images_of(shape, count=3)
    x = F.interpolate(images.float() / 255, (224, 224), mode="bicubic", antialias=True)
    x = x.expand(-1, 3, -1, -1)
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folder).eval()(x).pooler_output
    # The same float32 operations but for the order of resizing and repeating channels.
    np.testing.assert_allclose(network.describe(images), expected.numpy(), atol=1e-5)


def test_dinov2_positions_are_resampled_as_its_own_repository_does(tmp_path: Path):
    from transformers import Dinov2Model

    folder = save_dinov2(tmp_path / "dinov2", image_size=518)  # as the published weights: 37 × 37
    network = load_features(f"dinov2:{folder}", RGB)
    model = Dinov2Model.from_pretrained(folder).eval()
    x = torch.zeros(1, 3, 224, 224)
    for channel, (mean, std) in enumerate(
        zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ):
        x[:, channel] = -mean / std
    black = torch.zeros(1, *RGB, dtype=torch.uint8)
    embeddings = model.embeddings
    with torch.no_grad():
        by_transformers = model(x).pooler_output
        places = embeddings.position_embeddings
        grid = places[:, 1:].reshape(1, 37, 37, 16).permute(0, 3, 1, 2)
        # Bicubic sampling points of the original: centre of patch i at (i + ½)·37/16.1 − ½.
        grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")
        embeddings.position_embeddings.data = torch.cat(
            [places[:, :1], grid.flatten(2).transpose(1, 2)], dim=1
        )
        expected = model(x).pooler_output
    np.testing.assert_allclose(network.describe(black), expected.numpy(), atol=1e-5)
    # It matters: these two differ by twenty times that tolerance.
    assert float((expected - by_transformers).abs().max()) > 2e-4


def test_folders_without_a_dinov2_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no DINOv2 that transformers can load"):
        load_features(f"dinov2:{tmp_path}", RGB)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="its model_type is 'vit'"):
        load_features(f"dinov2:{tmp_path}", RGB)


def test_networks_that_do_not_fit_are_refused_at_once(tmp_path: Path):
    path = saved(Means(3), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"cannot describe images of shape \(2, 1, 8, 8\)"):
        load_features(f"torchscript:{saved(nn.Conv2d(3, 1, 1), tmp_path / 'c.pt')}", GREY)
    with pytest.raises(ValueError, match=r"into \(2, 3, 8, 8\); a feature network returns .*\[2"):
        load_features(f"torchscript:{saved(Map(), tmp_path / 'map.pt')}", RGB)
    with pytest.raises(ValueError, match=r"does not exist, .*: nothing is downloaded"):
        load_features(f"dinov2:{tmp_path / 'none'}", RGB)
    (tmp_path / "text.pt").write_text("no network")
    for bad in ("text.pt", "."):
        with pytest.raises(ValueError, match=r"is not TorchScript; write one by torch\.jit\.save"):
            load_features(f"torchscript:{tmp_path / bad}", RGB)
    with pytest.raises(ValueError, match=r"take grey or RGB images \(got 4 channels\)"):
        load_features(f"inception:{path}", (4, 8, 8))


def test_grey_images_become_colour():
    grey = images_of(GREY, count=2)
    assert torch.equal(as_rgb(grey)[:, 2], grey[:, 0])
    colour = images_of(RGB, count=2)
    assert torch.equal(as_rgb(colour), colour)


def test_weights_have_one_digest_in_any_order_and_another_when_changed():
    state = {"a": torch.ones(2), "b": torch.tensor(1.0), "c": torch.ones(2, dtype=torch.bfloat16)}
    digest = weights_digest(state.items())
    assert digest == weights_digest(reversed(state.items()))
    for other in ({"a": torch.zeros(2)}, {"c": torch.ones(2)}, {"a": torch.ones(1, 2)}):
        assert weights_digest({**state, **other}.items()) != digest


@pytest.mark.parametrize("spec", ["", "inception", "dinov2:", "clip:x", "classifier:x"])
def test_other_names_of_features_are_refused(spec: str):
    with pytest.raises(ValueError, match="features must be one of classifier, inception:PATH"):
        parse_features(spec)
    with pytest.raises(ValueError, match="features must be one of"):
        Protocol(features=spec)
    assert parse_features("dinov2:C:/x") == ("dinov2", "C:/x")
