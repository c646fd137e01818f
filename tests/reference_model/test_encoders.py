"""Encoders: exact inverses, the constants of latents, refusals, and one tiny autoencoder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from reference_model.encoders import (
    ENCODERS,
    PIXELS,
    Encoder,
    Latents,
    SpaceToDepth,
    decode_pixels,
    encode_pixels,
    make_encoder,
)
from reference_model.vae import load_vae
from tests.reference_model.small_vae import save_vae


def test_pixels_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    x = encode_pixels(pixels)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    torch.testing.assert_close(decode_pixels(x), pixels, rtol=0, atol=0)
    assert decode_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("encoder", [PIXELS, SpaceToDepth(), SpaceToDepth(factor=4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_encoders_of_pixels_are_exactly_invertible(encoder: Encoder, channels: int) -> None:
    pixels = torch.randint(0, 256, (5, channels, 8, 12), dtype=torch.uint8)
    x = encoder.encode(pixels)
    assert x.dtype == torch.float32
    assert tuple(x.shape[1:]) == encoder.input_shape((channels, 8, 12))
    torch.testing.assert_close(encoder.decode(x), pixels, rtol=0, atol=0)


def test_space_to_depth_stacks_each_square() -> None:
    pixels = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    x = decode_pixels(SpaceToDepth().encode(pixels))
    assert x[0, :, 0, 1].tolist() == [2, 3, 6, 7]  # the upper right square, row by row
    assert SpaceToDepth().input_shape((1, 28, 28)) == (4, 14, 14)
    with pytest.raises(ValueError, match=r"sides that are multiples of 2 \(got 27×28 pixels\)"):
        SpaceToDepth().input_shape((1, 28, 27))


def test_latents_are_normalised_by_the_published_constants() -> None:
    """edm2's: mean [5.81, 3.25, 0.12, −2.15] to 0, deviation [4.17, 4.62, 3.71, 3.28] to 0.5."""
    mean, std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    z = torch.stack([mean, mean + std, mean - 2 * std])[:, :, None, None]
    x = Latents().encode(z)
    expected = torch.tensor([0, 0.5, -1.0])[:, None].expand(3, 4)
    # A few roundings of numbers up to 10 in float32.
    torch.testing.assert_close(x[:, :, 0, 0], expected, rtol=0, atol=2e-6)


def test_data_of_the_wrong_kind_is_refused() -> None:
    pixels, latents = torch.zeros(1, 4, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, 4)
    for name in ("rgb", "space-to-depth"):
        with pytest.raises(ValueError, match=r"pixels are uint8 \(got torch.float32\); latents"):
            make_encoder(name).encode(latents)
    with pytest.raises(ValueError, match=r"takes latents, and the data set has pixels; .* prepare"):
        Latents().encode(pixels)
    with pytest.raises(ValueError, match=r"takes 4 channels \(got 3\)"):
        Latents().input_shape((3, 8, 8))
    with pytest.raises(ValueError, match=r"one of rgb, space-to-depth, latents \(got 'vae'\)"):
        make_encoder("vae")
    assert list(ENCODERS) == ["rgb", "space-to-depth", "latents"]


def test_decoding_latents_needs_an_autoencoder(tmp_path: Path) -> None:
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"needs the autoencoder: .* --vae FOLDER"):
        Latents().decode(x)
    with pytest.raises(ValueError, match=r"is not the folder of an autoencoder: .*config\.json"):
        Latents(str(tmp_path)).decode(x)


def test_autoencoder_is_fed_with_pixels_from_zero_to_one(tmp_path: Path) -> None:
    model = save_vae(tmp_path)
    vae = load_vae(str(tmp_path))
    assert vae.reduction == 2
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = vae.encode(pixels)
    assert mean.shape == std.shape == (2, 4, 4, 4)
    with torch.no_grad():
        expected = model.encode(pixels / 255).latent_dist
        # Roundings of numbers of order one in float32; other pixels differ by 0.1.
        torch.testing.assert_close(mean, expected.mean, rtol=0, atol=2e-6)
        torch.testing.assert_close(std, expected.std, rtol=0, atol=2e-6)
        painted = model.decode(mean).sample.clamp(0, 1)
    decoded = vae.decode(mean)
    assert vae.decode(mean[:0]).shape == (0, *decoded.shape[1:])
    assert decoded.dtype == torch.uint8
    # Rounding to the nearest of 255 levels.
    assert (decoded / 255 - painted).abs().max() <= 0.5001 / 255

    encoder = make_encoder("latents", str(tmp_path))
    again = encoder.decode(encoder.encode(mean))
    # Normalising and back changes the last bits, which may turn a rounding.
    assert (again.int() - decoded.int()).abs().max() <= 1


def test_absent_diffusers_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"need the package diffusers, .*`pip install diffusers`"):
        load_vae(str(tmp_path))
