"""Sampling: solvers with churn and guidance, and images from seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reference_model.encoders import PIXELS, Encoder
from reference_model.folding import folds_weights, networks_in
from reference_model.guidance import as_guides, guided


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
        ValueError: If num_steps < 1, not 0 < sigma_min < sigma_max, or not rho > 0.

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
    if not rho > 0:
        raise ValueError(f"rho must be positive (got {rho})")
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
    guidance: float | Sequence[float] = 1.0,
    guidance_interval: Any = None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    second_order: bool = True,
) -> Tensor:
    """Turn noise into samples by solving dx/dσ = (x − D(x; σ)) / σ from σ_max to 0.

    Second order except for the last step, which is Euler: 2·num_steps − 1 evaluations.
    Guidance replaces D by D + (w − 1)·(D − D_gnet) = w·D + (1 − w)·D_gnet, and several guides add
    up. A guide is evaluated only where it acts.

    Args:
        net: Denoiser, called as `net(x, sigma, class_labels)`; in evaluation mode, unless
            its stored weights may be normalised in place.
        noise: Unit normal, `[B, C, H, W]` (any shape after B that the networks take); its dtype
            is that of the whole computation.
        class_labels: One-hot, `[B, label_dim]`, or `None`; passed to all networks.
        gnet: Guiding denoiser: an unconditional network, or a worse version of `net`; or a list
            of several.
        guidance: w; 1 is no guidance, and `gnet` is then not evaluated. For several guides one
            for each.
        guidance_interval: Guide only evaluations at noise levels σ in `(lo, hi]`. For several
            guides one for all, or a list with one (or `None`) for each.
        num_steps: Solver steps.
        sigma_min: Last noise level above zero.
        sigma_max: First noise level.
        rho: Exponent of the spacing of noise levels.
        S_churn: Amount of fresh noise over the whole run; 0 is deterministic.
        S_min: Lowest noise level at which noise is added.
        S_max: Highest noise level at which noise is added.
        S_noise: Standard deviation of the added noise, relative to what keeps σ.
        randn_like: Source of the added noise.
        second_order: Whether to correct each step; `euler_sampler` does not.

    Returns:
        Samples, shape and dtype of `noise`.

    Raises:
        ValueError: If guidance is asked for without `gnet`, levels are out of order, or S_churn
            is negative.

    Source:
        Karras et al. 2022, arXiv:2206.00364, Algorithm 2; guidance as `guidance.guided` has it.
    """
    if not S_churn >= 0:
        raise ValueError(f"S_churn must be at least 0 (got {S_churn})")
    denoise = guided(net, as_guides(gnet, guidance, guidance_interval), class_labels)
    steps = sigma_steps(num_steps, sigma_min, sigma_max, rho).tolist()
    x = noise * steps[0]
    for i, (sigma, sigma_next) in enumerate(pairwise(steps)):
        if S_churn > 0 and S_min <= sigma <= S_max:
            # Step back to a higher noise level by adding fresh noise.
            sigma_hat = sigma * (1 + min(S_churn / num_steps, math.sqrt(2) - 1))
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * S_noise * randn_like(x)
            sigma = sigma_hat
        d = (x - denoise(x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * d
        if second_order and i < num_steps - 1:
            d_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
    return x


def euler_sampler(
    net: Any, noise: Tensor, class_labels: Tensor | None = None, **options: Any
) -> Tensor:
    """Solve the same equation at first order: num_steps evaluations, and larger errors.

    Args:
        net: As in `heun_sampler`.
        noise: As in `heun_sampler`.
        class_labels: As in `heun_sampler`.
        **options: As in `heun_sampler`.

    Returns:
        Samples, shape and dtype of `noise`.
    """
    return heun_sampler(net, noise, class_labels, **options, second_order=False)


SAMPLERS: dict[str, Callable[..., Tensor]] = {"heun": heun_sampler, "euler": euler_sampler}
"""Samplers by name."""


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
    encoder: Encoder = PIXELS,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Generate one image for each seed, the same whatever the batch size.

    The noise of an image depends on its seed alone, to the bit. The network's sums need not: torch
    may add up in another order for another batch size, which changes the last bits of float32, and
    now and then a pixel by one level of 255.

    Args:
        net: A `Denoiser`; in evaluation mode while this runs, as are guiding networks.
        seeds: One non-negative integer for each of the N images.
        class_labels: Class of each image, int64 `[N]`; or one class for all; `None` draws a
            class for each image from its seed.
        batch_size: Images denoised at once: a matter of memory and speed only.
        encoder: Turns network output into pixels: that which the network was trained with.
        progress: Whether to show a progress bar.
        **options: As in `image_batches`.

    Returns:
        Pixels, uint8 `[N, C', H', W']`, on the CPU.

    Raises:
        ValueError: If classes and seeds do not agree in number, or a class does not exist.
    """
    images = []
    with tqdm(total=len(seeds), desc="generate", unit="img", disable=not progress) as bar:
        options = {"batch_size": batch_size, "encoder": encoder, **options}
        for batch, _ in image_batches(net, seeds, class_labels, **options):
            images.append(batch)
            bar.update(len(batch))
    return torch.cat(images) if images else encoder.decode(torch.empty(0, *net.config.input_shape))


def image_batches(
    net: Any,
    seeds: Sequence[int],
    class_labels: Tensor | int | None = None,
    *,
    batch_size: int = 64,
    encoder: Encoder = PIXELS,
    sampler: str = "heun",
    gnet: Any = None,
    **sampler_options: Any,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Generate the images of `generate_images` batch by batch, in the order of the seeds.

    Args:
        net: As in `generate_images`.
        seeds: As in `generate_images`.
        class_labels: As in `generate_images`.
        batch_size: As in `generate_images`.
        encoder: As in `generate_images`.
        sampler: One of `SAMPLERS`.
        gnet: Guiding network, or a list of several.
        **sampler_options: Passed to the sampler, except noise and labels.

    Yields:
        Pixels, uint8 `[B, C', H', W']` on the CPU, and their classes, int64 `[B]`, or `None` for an
        unconditional network.

    Raises:
        ValueError: As `generate_images`; or if there is no such sampler, or an empty batch.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)} (got {sampler!r})")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 (got {batch_size})")
    config = net.config
    seeds = list(seeds)
    classes = _check_classes(class_labels, len(seeds), config.label_dim)
    device = next(net.parameters()).device

    with evaluating(net, gnet):
        for start in range(0, len(seeds), batch_size):
            batch = slice(start, start + batch_size)
            rng = SeededNoise(seeds[batch])
            # Before the class, so that both depend on the seed alone.
            noise = rng.randn(config.input_shape)
            chosen = labels = None
            if config.label_dim:
                chosen = rng.randint(config.label_dim) if classes is None else classes[batch]
                labels = torch.nn.functional.one_hot(chosen, config.label_dim).float().to(device)
            x = SAMPLERS[sampler](
                net,
                noise.to(device),
                labels,
                gnet=gnet,
                randn_like=rng.randn_like,
                **sampler_options,
            )
            yield encoder.decode(x).cpu(), chosen


@contextmanager
def evaluating(*nets: Any) -> Iterator[None]:
    """Put networks, and those in lists of them, in evaluation mode while the context lasts."""
    modes = [(module, module.training) for module in networks_in(nets)]
    for module, _ in modes:
        module.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.train(was_training)


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
