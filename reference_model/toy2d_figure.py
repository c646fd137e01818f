"""The toy's experiment: ways to sample the same network, scored and drawn side by side."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from reference_model.checkpoint import write_atomically
from reference_model.sampler import heun_sampler
from reference_model.toy2d import PER_BRANCH, Mixture, ToyNet, Truncated, distributions, train_toy

WIDTH, GUIDE_WIDTH = 64, 32
GUIDE_FRACTION = 8
"""Guides train for so many times fewer iterations."""
AUTOGUIDANCE, CLASSIFIER_FREE, TRUNCATION = 3.0, 4.0, 1.40
SOLVER: dict[str, Any] = {"num_steps": 32, "sigma_min": 0.002, "sigma_max": 5.0, "rho": 7.0}

JUDGED_AT = 0.01
"""Noise level at which samples are scored: what is closer to a branch than this, is on it."""
WHOLE = (-0.72, 1.42, -0.66, 1.48)
CLOSE_UP = (0.34, 1.04, 0.72, 1.42)
"""Left, right, bottom and top of what is shown: all of class A, and a magnified part."""

SHADES = {"B": "Greys", "A": "Oranges"}
LEVELS = (0.1, 0.4, 1.2, 4.0, 1e6)
"""Densities at which the shade of a class changes."""


@dataclass(frozen=True)
class Method:
    """One way to sample.

    Attributes:
        name: Title of its panel.
        points: Samples, `[N, 2]`.
        outliers: Fraction of samples where fewer than one in a hundred points of data lie.
        coverage: Share of the samples' mass that lies on the right branches: 1 minus half the
            summed differences between the branches' shares of samples and of data.
    """

    name: str
    points: Tensor
    outliers: float
    coverage: float


def run_toy(
    out: str | os.PathLike[str],
    *,
    iterations: int = 4096,
    batch_size: int = 4096,
    samples: int = 8192,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Path, list[Method]]:
    """Train main network and guides, sample in all ways, and draw `toy2d.png`.

    Args:
        out: Directory for the figure and the networks; these are not trained again.
        iterations: Steps of the main network's training.
        batch_size: Points of one step.
        samples: Points of each method.
        seed: Of training and sampling.
        progress: Whether to show progress bars.

    Returns:
        Path of the figure, and what it shows.

    Source:
        Karras et al. 2024, arXiv:2406.02507, Fig. 1.
    """
    out, data = Path(out), distributions()
    out.mkdir(parents=True, exist_ok=True)
    fewer = max(iterations // GUIDE_FRACTION, 1)

    def net(name: str, width: int, steps: int) -> ToyNet:
        return trained(out, name, data[name], width, steps, batch_size, seed, progress)

    main = net("A", WIDTH, iterations)
    small, both = net("A", GUIDE_WIDTH, fewer), net("AB", GUIDE_WIDTH, fewer)
    path = out / "toy2d.png"
    methods = compare(main, small, both, data["A"], samples, seed)
    draw(methods, data, path)
    return path, methods


def compare(
    main: Any, small: Any, both: Any, data: Mixture, samples: int, seed: int = 0
) -> list[Method]:
    """Sample in all ways from the same noise.

    Args:
        main: Denoiser of class A.
        small: Worse denoiser of class A, for autoguidance.
        both: Denoiser of both classes together, for classifier-free guidance.
        data: Class A.
        samples: Points of each method.
        seed: Of data and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    truth = data.sample(samples, generator).float()
    noise = torch.randn(samples, 2, generator=generator)
    points = {
        "Ground truth": truth,
        "No guidance": heun_sampler(main, noise, **SOLVER),
        f"Classifier-free guidance, w = {CLASSIFIER_FREE:g}": heun_sampler(
            main, noise, gnet=both, guidance=CLASSIFIER_FREE, **SOLVER
        ),
        f"Autoguidance, w = {AUTOGUIDANCE:g}": heun_sampler(
            main, noise, gnet=small, guidance=AUTOGUIDANCE, **SOLVER
        ),
        f"Score × {TRUNCATION:.2f}": heun_sampler(Truncated(main, TRUNCATION), noise, **SOLVER),
    }
    return [Method(name, found, *judge(found, data)) for name, found in points.items()]


def judge(points: Tensor, data: Mixture) -> tuple[float, float]:
    """Fraction of outliers and coverage of the branches, as `Method` has them."""
    logp = data.logp_and_score(points, JUDGED_AT)[0]
    means = data.means.flatten(0, 1).to(points.dtype)
    nearest = torch.cat([torch.cdist(p, means).argmin(dim=1) for p in points.split(1024)])
    branches = torch.bincount(nearest // PER_BRANCH, minlength=len(data.means)) / len(points)
    difference = branches - data.shares.sum(dim=1)
    return float((logp < _outlier_level(data)).double().mean()), 1 - float(
        difference.abs().sum()
    ) / 2


@lru_cache
def _outlier_level(data: Mixture) -> float:
    """Log density below which one in a hundred points of data lie."""
    points = data.sample(8192, torch.Generator().manual_seed(0)).float()
    return float(data.logp_and_score(points, JUDGED_AT)[0].quantile(0.01))


def trained(
    out: Path, name: str, data: Mixture, width: int, iterations: int, batch_size: int, seed: int,
    progress: bool,
) -> ToyNet:  # fmt: skip
    """Load the network that an earlier call trained with the same settings, or train it."""
    path = out / f"class-{name}-width-{width}.safetensors"
    about = json.dumps({"iterations": iterations, "batch_size": batch_size, "seed": seed})
    net = ToyNet(width).eval()
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if file.metadata().get("about") == about:
                net.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
                return net
    net = train_toy(data, width, iterations, batch_size=batch_size, seed=seed, progress=progress)
    content = save(net.state_dict(), metadata={"about": about})
    write_atomically(path, lambda file: file.write(content))
    return net


def draw(methods: list[Method], data: dict[str, Mixture], path: Path) -> None:
    """Draw a column for each method: all of the tree above, some of its branches below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(3.1 * len(methods), 6.9), layout="constrained")
    axes = figure.subplots(2, len(methods))
    left, right, bottom, top = CLOSE_UP
    for row, (box, size) in enumerate(((WHOLE, 1.2), (CLOSE_UP, 6.0))):
        shades = {colours: _density(data[name], box) for name, colours in SHADES.items()}
        for ax, method in zip(axes[row], methods, strict=True):
            for colours, (x, y, density) in shades.items():
                norm = BoundaryNorm(LEVELS, ncolors=170)
                ax.contourf(x, y, density, levels=LEVELS, cmap=colours, alpha=0.45, norm=norm)
            ax.scatter(*method.points.T.numpy(), s=size, c="#1f3b73", alpha=0.7, linewidths=0)
            ax.set(xlim=box[:2], ylim=box[2:], xticks=[], yticks=[], aspect="equal")
    for ax, method in zip(axes[0], methods, strict=True):
        ax.set_title(method.name, fontsize=11)
        ax.set_xlabel(
            f"{100 * method.outliers:.1f} % outliers, {100 * method.coverage:.0f} % coverage"
        )
        ax.add_patch(
            Rectangle((left, bottom), right - left, top - bottom, fill=False, linewidth=0.8)
        )
    FigureCanvasAgg(figure)
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png"))


@lru_cache
def _density(data: Mixture, box: tuple[float, float, float, float]) -> tuple[Any, Any, Any]:
    """Density on a grid over a box (left, right, bottom, top): x, y and values `[y, x]`."""
    left, right, bottom, top = box
    x, y = torch.linspace(left, right, 160), torch.linspace(bottom, top, 160)
    points = torch.cartesian_prod(y, x).flip(1)
    density = data.logp_and_score(points, JUDGED_AT)[0].exp()
    return x.numpy(), y.numpy(), density.reshape(len(y), len(x)).numpy()
