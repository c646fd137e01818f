"""The training loss: noise distribution, weighting by noise level, learned uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class EDM2Loss:
    """Denoising loss, weighted by λ(σ) and by the network's own uncertainty u(σ).

    L = E[ λ(σ) / e^u(σ) · ‖D(y + n; σ) − y‖² + u(σ) ], ln σ ~ N(P_mean, P_std²). Where u has
    converged, the gradients of each noise level are divided by that level's current loss, so
    that none dominates. L may be negative.

    Attributes:
        P_mean: Mean of ln σ.
        P_std: Standard deviation of ln σ.
        sigma_data: Standard deviation of the data.

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 13 to 16 and Eq. 21.
    """

    P_mean: float = -0.4
    P_std: float = 1.0
    sigma_data: float = 0.5

    def __call__(
        self,
        net: Any,
        images: Tensor,
        class_labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw a noise level and noise for each image and return the loss of each element.

        Args:
            net: A `Denoiser`.
            images: Clean images, `[B, C, H, W]`.
            class_labels: One-hot, `[B, label_dim]`, or `None`.
            generator: Source of noise levels and noise; `None`: torch's global one.

        Returns:
            `[B, C, H, W]`; training sums it over C, H, W and averages over B.
        """
        sigma, noise = self.draw(images.shape, generator, images.device, images.dtype)
        return self.at(net, images, sigma, noise, class_labels)

    def draw(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Draw what a batch is trained at.

        Args:
            shape: Shape of the images, (B, C, H, W).
            generator: Source of the draws; `None`: torch's global one.
            device: Where to draw.
            dtype: Of the results.

        Returns:
            Noise levels, `[B]`, and noise of unit variance, `[B, C, H, W]`.
        """
        rnd = torch.randn(shape[0], generator=generator, device=device, dtype=dtype)
        noise = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
        return (rnd * self.P_std + self.P_mean).exp(), noise

    def at(
        self,
        net: Any,
        images: Tensor,
        sigma: Tensor,
        noise: Tensor,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each element at given noise levels: nothing is drawn.

        Args:
            net: A `Denoiser`.
            images: Clean images, `[B, C, H, W]`.
            sigma: Noise level of each image, `[B]`.
            noise: Noise of unit variance, `[B, C, H, W]`.
            class_labels: One-hot, `[B, label_dim]`, or `None`.

        Returns:
            `[B, C, H, W]`.
        """
        s = sigma.reshape(-1, 1, 1, 1)
        weight = (s**2 + self.sigma_data**2) / (s * self.sigma_data) ** 2
        denoised, logvar = net(images + s * noise, sigma, class_labels, return_logvar=True)
        return weight / logvar.exp() * (denoised - images) ** 2 + logvar
