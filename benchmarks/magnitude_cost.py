"""What it costs a training step to record magnitudes of all layers.

    python -m benchmarks.magnitude_cost

Times steps of the networks of the presets `digits` and `fashion` with and without recording,
alternately, and prints medians. At the interval of a preset a run pays the difference once in that
many steps.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext

import torch
from tqdm import tqdm

from reference_model.configs import TrainConfig
from reference_model.loss import EDM2Loss
from reference_model.magnitude_log import output_scales
from reference_model.magnitudes import record_magnitudes
from reference_model.precond import Denoiser
from reference_model.presets import preset

PAIRS = 20
"""Steps of each kind that are timed."""


def step_seconds(config: TrainConfig) -> tuple[float, float]:
    """Median seconds of a step, without and with recording."""
    torch.manual_seed(0)
    net = Denoiser(config.network)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    loss_fn = EDM2Loss(config.P_mean, config.P_std)
    images = 0.5 * torch.randn(config.batch_size, *config.network.input_shape)
    labels = torch.eye(config.network.label_dim)[torch.arange(config.batch_size) % 10]
    scales = output_scales(net)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in tqdm(range(PAIRS + 2), desc=config.data, leave=False):
        for recorded in (False, True):
            start = time.perf_counter()
            with record_magnitudes(net, scales) if recorded else nullcontext():
                optimizer.zero_grad()
                loss_fn(net, images, labels).mean().backward()
                optimizer.step()
            seconds[recorded].append(time.perf_counter() - start)
    # The first two of each warm caches up.
    plain, recorded_ = (statistics.median(seconds[kind][2:]) for kind in (False, True))
    return plain, recorded_


def main() -> None:
    """Print the table."""
    for name in ("digits", "fashion"):
        config = preset(name)
        plain, recorded = step_seconds(config)
        every = config.magnitudes_nimg // config.batch_size
        extra = recorded - plain
        print(
            f"{name}: step {1e3 * plain:.1f} ms, recorded step {1e3 * recorded:.1f} ms; "
            f"every {every} steps: {extra / every / plain:.2%} of training"
        )


if __name__ == "__main__":
    main()
