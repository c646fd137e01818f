"""The denoiser D of Eq. 4: a U-Net between noise-dependent scalings, and `build_model`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reference_model.configs import NetworkConfig
from reference_model.rungs import Rung, rung_of
from reference_model.unet import UNet


class Preconditioning(NamedTuple):
    """Scalings of Eq. 5 to 8, each of the shape of `sigma`.

    They give the U-Net input and training target unit variance at every noise level, and let
    it predict noise where there is little and signal where there is much.
    """

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """Compute the scalings for noise levels `sigma` > 0 (Eq. 5 to 8 of arXiv:2312.02696).

    Args:
        sigma: Standard deviation of the noise, any shape.
        sigma_data: Standard deviation of the data.

    Returns:
        c_skip, c_out, c_in and c_noise.
    """
    variance = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / variance,
        c_out=sigma * sigma_data / variance.sqrt(),
        c_in=1 / variance.sqrt(),
        c_noise=sigma.log() / 4,
    )


class UncertaintyHead(nn.Module):
    """u(σ) of Eq. 21, the log variance that weights the loss; not needed after training.

    Args:
        channels: Number of Fourier features of the noise level.
        rung: Layers.
    """

    def __init__(self, channels: int, rung: Rung) -> None:
        super().__init__()
        self.fourier = rung.logvar_features(channels)
        self.linear = rung.conv(channels, 1, kernel=())

    def forward(self, c_noise: Tensor) -> Tensor:
        """Map `[B]` to `[B, 1, 1, 1]`."""
        return self.linear(self.fourier(c_noise)).reshape(-1, 1, 1, 1)


class NoUncertainty(nn.Module):
    """u(σ) = 0, with which the loss is EDM's: config A, and networks that leave it out."""

    def forward(self, c_noise: Tensor) -> Tensor:
        """Map `[B]` to zeros `[B, 1, 1, 1]`."""
        return torch.zeros_like(c_noise).reshape(-1, 1, 1, 1)


class Denoiser(nn.Module):
    """D(x; σ, c), the estimate of the clean image in x (Eq. 4).

    Args:
        config: The network's shape and constants; `build_model` makes one from keywords.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        rung = rung_of(config)
        self.unet = UNet(config, rung)
        self.logvar = (
            UncertaintyHead(config.logvar_channels, rung) if rung.uncertainty else NoUncertainty()
        )

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        return_logvar: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Denoise a batch.

        Args:
            x: Noisy images, `[B, C, H, W]`; computed in their own dtype, float32 at least, but
                for activations on GPUs if the config asks for half `precision`.
            sigma: Noise level of each image, `[B]` (or a single one for all), positive.
            class_labels: One-hot classes, `[B, label_dim]`, or `None` for no class (zeros).
                An unconditional network (`label_dim=0`) ignores them, so that it can guide a
                conditional one.
            return_logvar: Whether to return u(σ) too.

        Returns:
            D, `[B, C, H, W]`; with `return_logvar` the pair (D, u) with u `[B, 1, 1, 1]`.

        Raises:
            ValueError: If shapes do not agree with the network or each other.

        Source:
            Karras et al. 2024, arXiv:2312.02696, Eq. 4 to 8 and Eq. 21.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sigma = self._check_sigma(sigma, x)
        class_labels = self._check_labels(class_labels, x)
        c = preconditioning(sigma, self.config.sigma_data)
        c_skip, c_out, c_in = (s.reshape(-1, 1, 1, 1) for s in (c.c_skip, c.c_out, c.c_in))
        inputs = (c_in * x).to(self._activation_dtype(x))
        denoised = c_skip * x + c_out * self.unet(inputs, c.c_noise, class_labels).to(x.dtype)
        if return_logvar:
            return denoised, self.logvar(c.c_noise)
        return denoised

    def num_parameters(self, include_logvar: bool = False) -> int:
        """Count learned numbers, as the paper does without the uncertainty head.

        Args:
            include_logvar: Whether to count the uncertainty head, which only training uses.

        Returns:
            Number of scalars.
        """
        counted = self if include_logvar else self.unet
        return sum(p.numel() for p in counted.parameters())

    def _activation_dtype(self, x: Tensor) -> torch.dtype:
        """Half precision where it was asked for and is fast; float64 stays what it is."""
        if x.dtype != torch.float32 or x.device.type == "cpu":
            return x.dtype
        return getattr(torch, self.config.precision)

    def _check_sigma(self, sigma: Tensor, x: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1)
        if len(sigma) not in (1, len(x)):
            raise ValueError(
                f"sigma has {len(sigma)} values for a batch of {len(x)} images; "
                "pass one for each image, or a single one"
            )
        return sigma.expand(len(x))

    def _check_labels(self, class_labels: Tensor | None, x: Tensor) -> Tensor | None:
        if self.config.label_dim == 0 or class_labels is None:
            return None
        label_dim = self.config.label_dim
        if class_labels.ndim != 2 or class_labels.shape != (len(x), label_dim):
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)}, expected "
                f"({len(x)}, {label_dim}): one-hot rows, as torch.nn.functional.one_hot("
                f"classes, {label_dim}) makes them"
            )
        return class_labels


def build_model(config: str = "G", **arguments: Any) -> Denoiser:
    """Build a randomly initialised denoiser.

    Args:
        config: Rung of the paper's ladder, "A" (EDM's network) to "G" (the final one);
            or "U", G's network with unit scaling.
        **arguments: Fields of `NetworkConfig`, by their EDM2 names: `img_resolution`,
            `img_channels`, `label_dim`, `model_channels`, `channel_mult`, `num_blocks`,
            `attn_resolutions`, `channels_per_head`, `dropout`, `label_balance`,
            `concat_balance`, `res_balance`, `attn_balance`, `clip_act`, `sigma_data`,
            `logvar_channels`; and `precision`, and `leave_out`, names of ingredients of the
            config to build without (`ladder.INGREDIENTS`).

    Returns:
        The network, in training mode, drawn from torch's global generator.

    Raises:
        ValueError: For a config that does not exist, or arguments that do not fit together.
        TypeError: For an argument that does not exist.

    Example:
        >>> net = build_model(img_resolution=8, img_channels=1, model_channels=16,
        ...                   channel_mult=(1, 2), attn_resolutions=(4,))
        >>> net(torch.randn(2, 1, 8, 8), sigma=torch.ones(2)).shape
        torch.Size([2, 1, 8, 8])

    Source:
        Karras et al. 2024, arXiv:2312.02696, Table 1 and App. B.
    """
    return Denoiser(NetworkConfig(config=config, **arguments))
