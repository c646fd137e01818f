"""Magnitudes of unit scaling (config U) beside those of A, E and G, at first and in training.

    python -m benchmarks.unit_scaling

Trains each config on the embedded digits under the same conditions: one network size, batches,
noise, Adam, and constant learning rate, at each of several rates. Records magnitudes of all layers
at intervals; prints a table, and writes it with a figure for docs/ladder.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness
from reference_model.data import load_dataset
from reference_model.encoders import make_encoder
from reference_model.ladder import with_config
from reference_model.loss import EDM2Loss
from reference_model.magnitude_log import by_level, level_of, output_scales
from reference_model.magnitudes import LayerMagnitudes, record_magnitudes
from reference_model.precond import Denoiser
from reference_model.presets import preset

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "unit-scaling.png"
CONFIGS = ("A", "E", "G", "U")
RATES = (0.01, 0.03, 0.1, 0.2)
STEPS, BATCH, RECORDS = 1000, 64, 40
COLORS = {"A": "#ee6677", "E": "#ccbb44", "G": "#4477aa", "U": "#228833"}
SHOWN_RATES = (0.03, 0.2)


def mean_of_levels(layers: list[LayerMagnitudes], field: str) -> float | None:
    """Mean over the levels of a network, as the paper's figures have it; `None` if not finite."""
    levels = by_level(layers, field)
    value = sum(levels.values()) / max(len(levels), 1)
    return value if levels and math.isfinite(value) else None


def train(config: str, rate: float, steps: int) -> dict[str, Any]:
    """Train one config and return its curves, and its layers at the first step."""
    g = preset("digits-tiny")
    # What concerns the noise is G's for all; dropout and attention stay those of the config.
    c = replace(with_config(g, config), batch_size=BATCH, P_mean=g.P_mean, P_std=g.P_std)
    data, encoder = load_dataset(c.data), make_encoder(c.encoder)
    torch.manual_seed(0)
    net = Denoiser(c.network)
    loss_fn = EDM2Loss(c.P_mean, c.P_std)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, betas=g.betas)
    scales, every = output_scales(net), max(steps // RECORDS, 1)
    run: dict[str, Any] = {"step": [], "activation": [], "weight": [], "relative_update": []}
    for step in tqdm(range(steps), desc=f"config {config}, rate {rate:g}", leave=False):
        images, labels = data.stream(step * BATCH, BATCH, seed=0)
        optimizer.zero_grad()
        recorded = step % every == 0 or step == steps - 1
        with record_magnitudes(net, scales) if recorded else nullcontext() as recorder:
            (loss_fn(net, encoder.encode(images), labels).sum() / BATCH).backward()
            # Infinite gradients become zero, as in training.
            for p in net.parameters():
                if p.grad is not None:
                    torch.nan_to_num(p.grad, nan=0, posinf=0, neginf=0, out=p.grad)
            optimizer.step()
        if recorder is not None:
            run["step"].append(step)
            for field in ("activation", "weight", "relative_update"):
                run[field].append(mean_of_levels(recorder.layers, field))
            if step == 0:
                run["first"] = {
                    layer.name: layer.activation
                    for layer in recorder.layers
                    if level_of(layer.name) is not None
                }
    run["error"] = weighted_error(net, loss_fn, *_held_out(data, encoder))
    return run


def _held_out(data: Any, encoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = data.stream(0, 512, seed=1)
    return encoder.encode(images), labels


def weighted_error(
    net: Denoiser, loss_fn: EDM2Loss, images: torch.Tensor, labels: torch.Tensor
) -> float | None:
    """Mean of λ(σ) ‖D − y‖² in evaluation, on training images with noise of a fixed seed."""
    net.eval()
    sigma, noise = loss_fn.draw(images.shape, torch.Generator().manual_seed(0))
    s = sigma.reshape(-1, 1, 1, 1)
    weight = (s**2 + loss_fn.sigma_data**2) / (s * loss_fn.sigma_data) ** 2
    with torch.no_grad():
        denoised = net(images + s * noise, sigma, labels)
    assert isinstance(denoised, torch.Tensor)
    error = (weight * (denoised - images) ** 2).mean().item()
    return error if math.isfinite(error) else None


def report(runs: dict[str, dict[str, Any]]) -> str:
    """One row for each run: first and last magnitudes, and the error."""
    rows = []
    for name, run in runs.items():
        config, rate = name.split()
        cells = [f"{_text(run[f][0])} → {_text(run[f][-1])}" for f in ("activation", "weight")]
        rows.append([config, rate, *cells, _text(run["error"])])
    return harness.table(["config", "rate", "activations", "stored weights", "error"], rows)


def _text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def draw(runs: dict[str, dict[str, Any]], path: Path, rates: Sequence[float]) -> None:
    """Draw magnitudes at the first step by layer, and over training at two rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (first, activation, weight) = plt.subplots(1, 3, figsize=(13, 3.8), layout="tight")
    for config in CONFIGS:
        # Layers that start from zero, or behind a gain that does, have no place on the scale.
        layers = [v or math.nan for v in runs[f"{config} {rates[-1]:g}"]["first"].values()]
        first.semilogy(layers, ".", color=COLORS[config], label=config)
        for rate, style in zip(rates, ("--", "-"), strict=True):
            run = runs[f"{config} {rate:g}"]
            for axes, field in ((activation, "activation"), (weight, "weight")):
                values = [math.nan if v is None else v for v in run[field]]
                axes.semilogy(run["step"], values, style, color=COLORS[config])
    first.set(xlabel="layer", ylabel="magnitude", title="Activations at the first step")
    activation.set(xlabel="step", title="Activations")
    weight.set(xlabel="step", title="Stored weights")
    first.legend(title="config", ncols=len(CONFIGS), fontsize=8)
    figure.suptitle("Learning rate " + ", ".join(f"{r:g}" for r in rates) + " (dashed, solid)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each run")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--image", type=Path, default=None, help="where the figure goes")
    arguments = parser.parse_args()
    started = harness.machine()
    rates = RATES if not arguments.quick else SHOWN_RATES
    steps = arguments.steps if not arguments.quick else 4
    runs = {f"{c} {rate:g}": train(c, rate, steps) for rate in rates for c in CONFIGS}
    print(report(runs))
    image = arguments.image or (None if arguments.quick else IMAGE)
    if image is not None:
        draw(runs, image, SHOWN_RATES)
    if not arguments.quick:
        settings = {"steps": steps, "batch": BATCH, "rates": rates, "network": "digits-tiny"}
        print(f"\nWrote {harness.save('unit_scaling', settings, started, runs)} and {image}")


if __name__ == "__main__":
    main()
