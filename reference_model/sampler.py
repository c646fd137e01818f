"""Sampling: the Heun solver with churn and guidance, and images from seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reference_model.data import decode_pixels
from reference_model.folding import folds_weights


def sigma_steps(
    num_steps: int = 32, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Return the noise levels that the solver visits.

    σ_i = (σ_max^(1/ρ) + i/(N−1) · (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ for i < N, then 0.

    Args:
        num_steps: N, at least 1.
        sigma_min: Last level above zero.
        sigma_max: First level.
        rho: Larger values put more steps at low noise.

    Returns:
        float64 `[num_steps + 1]`, decreasing to 0.

    Raises:
        ValueError: If num_steps < 1 or not 0 < sigma_min < sigma_max.

    Source:
        Karras et al. 2022, arXiv:2206.00364, Eq. 5.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1 (got {num_steps})")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"noise levels must satisfy 0 < sigma_min < sigma_max "
            f"(got sigma_min={sigma_min}, sigma_max={sigma_max})"
        )
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
@folds_weights
def heun_sampler(
    net: Any,
    noise: Tensor,
    class_labels: Tensor | None = None,
    gnet: Any = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Turn noise into images by solving dx/dσ = (x − D(x; σ)) / σ from σ_max to 0.

    Second order except for the last step, which is Euler: 2·num_steps − 1 evaluations.
    Guidance replaces D by w·D_net + (1 − w)·D_gnet.

    Args:
        net: Denoiser, called as `net(x, sigma, class_labels)`; in evaluation mode, unless
            its stored weights may be normalised in place.
        noise: Unit normal, `[B, C, H, W]`; its dtype is that of the whole computation.
        class_labels: One-hot, `[B, label_dim]`, or `None`; passed to both networks.
        gnet: Guiding denoiser: an unconditional network, or a worse version of `net`.
        guidance: w; 1 is no guidance, and `gnet` is then not evaluated.
        guidance_interval: Guide only evaluations at noise levels σ in `(lo, hi]`.
        num_steps: Solver steps.
        sigma_min: Last noise level above zero.
        sigma_max: First noise level.
        rho: Exponent of the spacing of noise levels.
        S_churn: Amount of fresh noise over the whole run; 0 is deterministic.
        S_min: Lowest noise level at which noise is added.
        S_max: Highest noise level at which noise is added.
        S_noise: Standard deviation of the added noise, relative to what keeps σ.
        randn_like: Source of the added noise.

    Returns:
        Images, `[B, C, H, W]`, dtype of `noise`.

    Raises:
        ValueError: If guidance is asked for without `gnet`, or levels are out of order.

    Source:
        Karras et al. 2022, arXiv:2206.00364, Algorithm 2; guidance interval of Kynkäänniemi
        et al. 2024, arXiv:2404.07724.
    """
    if guidance != 1 and gnet is None:
        raise ValueError(
            f"guidance={guidance} needs a network to guide with; pass gnet, or guidance=1"
        )
    guided_low, guided_high = guidance_interval or (0.0, math.inf)

    def slope(x: Tensor, sigma: float) -> Tensor:
        """dx/dσ at one noise level."""
        sigmas = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        denoised = net(x, sigmas, class_labels).to(x.dtype)
        if guidance != 1 and guided_low < sigma <= guided_high:
            denoised = gnet(x, sigmas, class_labels).to(x.dtype).lerp(denoised, guidance)
        return (x - denoised) / sigma

    steps = sigma_steps(num_steps, sigma_min, sigma_max, rho).tolist()
    x = noise * steps[0]
    for i, (sigma, sigma_next) in enumerate(pairwise(steps)):
        if S_churn > 0 and S_min <= sigma <= S_max:
            # Step back to a higher noise level by adding fresh noise.
            sigma_hat = sigma * (1 + min(S_churn / num_steps, math.sqrt(2) - 1))
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * S_noise * randn_like(x)
            sigma = sigma_hat
        d = slope(x, sigma)
        x_next = x + (sigma_next - sigma) * d
        if i < num_steps - 1:
            d_next = slope(x_next, sigma_next)
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
    return x


class SeededNoise:
    """Random numbers with a generator for each image, so that its batch does not matter.

    Args:
        seeds: One non-negative integer for each image.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Draw unit normal noise of `shape` for each image: `[B, *shape]`, float32, on the CPU."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators])

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw noise like `x`, `[B, ...]`, which must have one image for each seed."""
        return self.randn(x.shape[1:]).to(x)

    def randint(self, high: int) -> Tensor:
        """Draw an integer in `[0, high)` for each image: `[B]`."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self.generators])


def generate_images(
    net: Any,
    seeds: Sequence[int],
    class_labels: Tensor | int | None = None,
    *,
    batch_size: int = 64,
    num_steps: int = 32,
    progress: bool = False,
    **sampler_options: Any,
) -> Tensor:
    """Generate one image for each seed, the same whatever the batch size.

    Args:
        net: A `Denoiser`; put in evaluation mode while this runs.
        seeds: One non-negative integer for each of the N images.
        class_labels: Class of each image, int64 `[N]`; or one class for all; `None` draws a
            class for each image from its seed.
        batch_size: Images denoised at once: a matter of memory and speed only.
        num_steps: Solver steps; 2·num_steps − 1 network evaluations.
        progress: Whether to show a progress bar.
        **sampler_options: Passed to `heun_sampler`, except noise and labels.

    Returns:
        uint8 `[N, C, H, W]`, on the CPU.

    Raises:
        ValueError: If classes and seeds do not agree in number, or a class does not exist.
    """
    config = net.config
    seeds = list(seeds)
    classes = _check_classes(class_labels, len(seeds), config.label_dim)
    device = next(net.parameters()).device
    shape = (config.img_channels, config.img_resolution, config.img_resolution)

    was_training = net.training
    net.eval()
    images = []
    try:
        starts = range(0, len(seeds), batch_size)
        for start in tqdm(starts, desc="generate", unit="batch", disable=not progress):
            batch = slice(start, start + batch_size)
            rng = SeededNoise(seeds[batch])
            noise = rng.randn(shape)  # before the class, so that both depend on the seed alone
            labels = None
            if config.label_dim:
                drawn = rng.randint(config.label_dim) if classes is None else classes[batch]
                labels = torch.nn.functional.one_hot(drawn, config.label_dim).float().to(device)
            x = heun_sampler(
                net,
                noise.to(device),
                labels,
                num_steps=num_steps,
                randn_like=rng.randn_like,
                **sampler_options,
            )
            images.append(decode_pixels(x).cpu())
    finally:
        net.train(was_training)
    return torch.cat(images) if images else torch.empty(0, *shape, dtype=torch.uint8)


def _check_classes(class_labels: Tensor | int | None, count: int, label_dim: int) -> Tensor | None:
    if class_labels is None:
        return None
    if not label_dim:
        raise ValueError("class_labels given for an unconditional network; pass None")
    classes = torch.as_tensor(class_labels, dtype=torch.int64).cpu()
    if classes.ndim == 0:
        classes = classes.expand(count)
    if classes.shape != (count,):
        raise ValueError(
            f"class_labels has shape {tuple(classes.shape)} for {count} seeds; "
            "pass one class for each, or a single one for all"
        )
    if ((classes < 0) | (classes >= label_dim)).any():
        raise ValueError(
            f"classes must lie in 0..{label_dim - 1} "
            f"(got {int(classes.min())}..{int(classes.max())})"
        )
    return classes
