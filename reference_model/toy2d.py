"""A two-dimensional distribution known exactly, and a small network that learns its score.

Each of two classes is a tree of thin branches, a mixture of 1016 Gaussians, so that density and
score are exact at every noise level. The network models the log density, its gradient is the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from posthoc_ema import EMA
from reference_model.mp_layers import Gain, MPConv, mp_silu

DEPTH = 7
PER_BRANCH = 8
ROOT = np.array([0.0030, 0.0325])
SCALE = np.array([1.3136, 1.3844])
ANGLES = {"A": math.pi / 4, "B": 5 * math.pi / 4}
SIGMA_DATA = 0.5


@dataclass(frozen=True, eq=False)
class Mixture:
    """Gaussians in the plane: branches of eight, which share a covariance.

    Attributes:
        weights: float64 `[branches, 8]`, not normalised.
        means: float64 `[branches, 8, 2]`.
        covariances: float64 `[branches, 2, 2]`.

    Source:
        The toy example of Karras et al. 2024, arXiv:2406.02507.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def shares(self) -> Tensor:
        """Weights that sum to one, `[branches, 8]`."""
        return self.weights / self.weights.sum()

    @property
    def mean(self) -> Tensor:
        """Mean of the distribution, `[2]`."""
        return torch.einsum("bk,bki->i", self.shares, self.means)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the distribution, `[2, 2]`."""
        centred = self.means - self.mean
        between = torch.einsum("bk,bki,bkj->ij", self.shares, centred, centred)
        return between + torch.einsum("bk,bij->ij", self.shares, self.covariances)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw points, float64 `[count, 2]`."""
        shares, means = self.shares.flatten(), self.means.flatten(0, 1)
        k = torch.multinomial(shares, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, 1, dtype=torch.float64, generator=generator)
        spread = torch.linalg.cholesky(self.covariances)[k // PER_BRANCH] @ noise
        return means[k] + spread[..., 0]

    def logp_and_score(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """Log density and its gradient, after noise of standard deviation σ was added.

        Args:
            x: Points, `[N, 2]`; computed in their dtype.
            sigma: Noise level of each point, `[N]`, or one for all; at least 0.

        Returns:
            log p(x; σ) `[N]` and ∇ log p(x; σ) `[N, 2]`.
        """
        variance = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x)) ** 2
        # Pieces whose [n, branches, 8] arrays stay in the processor's cache: half the time.
        pieces = [
            self._piece(*piece) for piece in zip(x.split(64), variance.split(64), strict=True)
        ]
        logp, score = zip(*pieces, strict=True)
        return torch.cat(logp), torch.cat(score)

    def _piece(self, x: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        constants = (self.shares.log(), self.means, self.covariances)
        log_shares, means, covariances = (c.to(x.dtype) for c in constants)
        # Inverse of [[a, b], [b, c]] is [[c, −b], [−b, a]] / (ac − b²), for each branch: [n, B].
        a = covariances[:, 0, 0] + variance[:, None]
        c = covariances[:, 1, 1] + variance[:, None]
        b = covariances[:, 0, 1].expand_as(a)
        determinant = a * c - b * b
        a, b, c = (e[..., None] / determinant[..., None] for e in (a, -b, c))
        u = means[..., 0] - x[:, 0, None, None]  # [n, B, 8]
        v = means[..., 1] - x[:, 1, None, None]
        pull_u, pull_v = c * u + b * v, a * v + b * u
        log_norm = log_shares - 0.5 * determinant.log()[..., None]
        terms = log_norm - 0.5 * (u * pull_u + v * pull_v)
        most = terms.amax(dim=(1, 2), keepdim=True)
        parts = (terms - most).exp()
        total = parts.sum(dim=(1, 2))
        score = [(parts * pull).sum(dim=(1, 2)) / total for pull in (pull_u, pull_v)]
        return most[:, 0, 0] + total.log() - math.log(2 * math.pi), torch.stack(score, dim=1)


@lru_cache(maxsize=1)
def distributions() -> dict[str, Mixture]:
    """The classes A and B, and both together as AB."""
    rng = np.random.RandomState(2)  # one for both classes, A first: part of the definition
    classes = {name: list(_grow(rng, 0, ROOT, angle)) for name, angle in ANGLES.items()}
    classes["AB"] = classes["A"] + classes["B"]
    return {
        name: Mixture(*(torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True)))
        for name, found in classes.items()
    }


def _grow(
    rng: np.random.RandomState, depth: int, position: NDArray[np.float64], angle: float
) -> Iterator[tuple[NDArray[np.float64], ...]]:
    """Weights `[8]`, means `[8, 2]` and covariance `[2, 2]` of a branch, then of its children."""
    if depth == DEPTH:
        return
    u = np.array([math.cos(angle), math.sin(angle)])
    shrink = 0.8**depth
    length = 0.292 * shrink * (1 + 0.2 * rng.randn())
    thickness = 0.2 * shrink / length
    along = np.outer(u, u)
    size = SCALE * length * 0.06
    covariance = (along + thickness**2 * (np.eye(2) - along)) * np.outer(size, size)
    places = np.linspace(0.07, 0.93, PER_BRANCH)
    means = (position + u * length * places[:, None]) * SCALE
    weights = np.full(PER_BRANCH, length * 0.5**depth)
    yield weights, means, covariance
    for sign in (1, -1):
        turn = sign * 0.7**depth * (1 + 0.2 * rng.randn())
        yield from _grow(rng, depth + 1, position + u * length, angle + turn)


class ToyNet(nn.Module):
    """Log density of noisy points, up to a constant, and the denoiser that follows from it.

    G(x; σ) = −½‖x*‖² + (g/σ)·mean(F(x*, ln σ/4, 1)²) with x* = x/√(σ² + σ_data²): a Gaussian,
    until the gain g moves away from zero. F has five magnitude-preserving layers.

    Args:
        width: Features of each layer.

    Source:
        Karras et al. 2024, arXiv:2406.02507 (where the second term has a minus: as g may
        have either sign, both are the same).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MPConv(inputs, width, kernel=()) for inputs in (4, width, width, width, width)
        )
        self.gain = Gain()

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """G of points `[N, 2]` at noise levels `[N]`: `[N]`."""
        sigma = sigma[:, None]
        scaled = x / (sigma**2 + SIGMA_DATA**2).sqrt()
        h = torch.cat([scaled, sigma.log() / 4, torch.ones_like(sigma)], dim=1)
        h = self.layers[0](h)
        for layer in self.layers[1:]:
            h = layer(mp_silu(h))
        features = h.square().mean(dim=1)
        return -0.5 * scaled.square().sum(dim=1) + self.gain(features) / sigma[:, 0]

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """∇G of points `[N, 2]` at noise levels `[N]`: `[N, 2]`; differentiable in training."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            total = self.log_density(x, sigma).sum()
            return torch.autograd.grad(total, x, create_graph=self.training)[0]

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Any = None) -> Tensor:
        """Denoise, as the samplers call it: D = x + σ²·score."""
        return x + sigma[:, None] ** 2 * self.score(x, sigma)


class Truncated:
    """A denoiser whose score is lengthened: the naive way to fewer outliers.

    Args:
        net: Denoiser.
        factor: 1 changes nothing.
    """

    def __init__(self, net: Any, factor: float) -> None:
        self.net, self.factor = net, factor

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Any = None) -> Tensor:
        """D = x + factor·σ²·score."""
        return x + self.factor * (self.net(x, sigma) - x)


def train_toy(
    data: Mixture,
    width: int,
    iterations: int,
    *,
    batch_size: int = 4096,
    ema_sigma_rel: float = 0.010,
    seed: int = 0,
    progress: bool = False,
) -> ToyNet:
    """Train by exact score matching, and return the averaged network in evaluation mode.

    The loss is σ²·‖∇G − ∇log p‖² with ln σ ~ N(−2.3, 1.5²): the true score is known, so that no
    noise of the data hides what the network cannot do.

    Args:
        data: What to learn.
        width: Features of each layer.
        iterations: Steps of Adam; the learning rate falls as 1/√iteration from the 512th on.
        batch_size: Points of one step.
        ema_sigma_rel: EMA length of the result.
        seed: Of all random numbers; torch's global state is left as it was.
        progress: Whether to show a progress bar.

    Source:
        Karras et al. 2024, arXiv:2406.02507.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ToyNet(width).train()
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    ema = EMA(ema_sigma_rel)
    bar = tqdm(range(iterations), desc=f"train width {width}", disable=not progress)
    for i in bar:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / math.sqrt(max(i / 512, 1))
        sigma = (torch.randn(batch_size, generator=generator) * 1.5 - 2.3).exp()
        noise = torch.randn(batch_size, 2, generator=generator)
        x = data.sample(batch_size, generator).float() + sigma[:, None] * noise
        error = net.score(x, sigma) - data.logp_and_score(x, sigma)[1]
        loss = (sigma**2 * error.square().mean(dim=1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema.update(net, t=i + 1)
        if progress and i % 50 == 0:
            bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
    net.load_state_dict({**net.state_dict(), **ema.average(ema_sigma_rel)})
    return net.eval()
