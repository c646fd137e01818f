"""What each process does in tests of training in several processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reference_model.train as train_module
from reference_model.configs import TrainConfig
from reference_model.distributed import Processes
from reference_model.draws import draw
from reference_model.loss import EDM2Loss
from reference_model.parallel import parallelize, sum_of_squares, zero_bad_gradients
from reference_model.precond import Denoiser
from reference_model.presets import preset
from reference_model.train import accumulate_gradients, train

# Twelve images can be divided among one, two, three, four and six processes. Ten rows are uneven
# over three and four. With dropout, so that its masks matter.
TINY = replace(
    preset("digits-tiny"),
    batch_size=12,
    total_nimg=8 * 12,
    snapshot_nimg=4 * 12,
    checkpoint_nimg=3 * 12,
    stats_nimg=2 * 12,
    network=replace(
        preset("digits-tiny").network,
        model_channels=10,
        channel_mult=(1, 2),
        channels_per_head=10,
        dropout=0.2,
    ),
)


def gradients(
    processes: Processes,
    parallel: str = "ddp",
    at_once: int = 12,
    *,
    spoil: bool = False,
    config: str = "G",
) -> tuple[dict[str, Tensor], float, float, int]:
    """Whole gradients of one step in float64, the mean loss, their norm, and bad numbers."""
    torch.manual_seed(0)
    net = Denoiser(replace(TINY.network, config=config)).double().train()
    with torch.no_grad():  # away from the start, where gains of zero hide most gradients
        for p in net.parameters():
            if p.ndim == 0:
                p.fill_(0.5)
    model = parallelize(net, processes, parallel)
    loss_fn = EDM2Loss()
    x = torch.randn(12, *TINY.network.input_shape, dtype=torch.float64)
    labels = torch.eye(10, dtype=torch.float64)[torch.arange(12) % 10]
    if spoil:
        x[7] = float("inf")
    own = slice(processes.rank, None, processes.count)
    draws = draw(loss_fn, TINY.network.input_shape, 24, 12, 3, processes)
    draws = draws._replace(sigma=draws.sigma.double(), noise=draws.noise.double())
    loss = accumulate_gradients(model, loss_fn, x[own], labels[own], draws, at_once, TINY)
    bad = float(zero_bad_gradients(model.gradients()))
    bad, squares = model.total([bad, float(sum_of_squares(model.gradients()))])
    [mean] = processes.total([float(loss)])
    whole = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in net.named_parameters()
    }
    return whole, mean, squares**0.5, int(bad)


def alone() -> Processes:
    return Processes(torch.device("cpu"))


def compare_gradients(
    rank: int, number: int, folder: Path, parallel: str, at_once: int, config: str
) -> None:
    group = Processes(torch.device("cpu"), rank, number, torch.distributed.group.WORLD)
    found = gradients(group, parallel, at_once, config=config)
    assert_close_gradients(found, gradients(alone(), config=config))


def compare_bad_gradients(rank: int, number: int, folder: Path, parallel: str) -> None:
    """All processes zero what one of them spoilt, and count it once."""
    group = Processes(torch.device("cpu"), rank, number, torch.distributed.group.WORLD)
    found, _, norm, bad = gradients(group, parallel, spoil=True)
    expected, _, expected_norm, expected_bad = gradients(alone(), spoil=True)
    assert bad == expected_bad > 0
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert {n: int((g == 0).sum()) for n, g in found.items()} == {
        n: int((g == 0).sum()) for n, g in expected.items()
    }
    torch.testing.assert_close(norm, expected_norm, rtol=1e-12, atol=0)


def assert_close_gradients(actual: Any, expected: Any) -> None:
    for name, gradient in expected[0].items():
        # Sums of some thousand float64 products in another order, each rounded by 1e-16.
        scale = float(gradient.abs().max()) + 1e-300
        torch.testing.assert_close(actual[0][name], gradient, rtol=0, atol=1e-10 * scale)
    # Noise is drawn, and the loss summed, with float64 accumulators.
    torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-10, atol=0)


def train_part(
    rank: int, number: int, folder: Path, config: TrainConfig, options: dict[str, Any]
) -> None:
    train(config, folder / "run", progress=False, **options)


def at_nimg(nimg: int, act: Callable[[], None]) -> None:
    """Do something in the middle of the step that starts at `nimg`."""
    original = train_module.learning_rate

    def learning_rate(at: int, *args: Any) -> float:
        if at == nimg:
            act()
        return original(at, *args)

    train_module.learning_rate = learning_rate


def stop_part(rank: int, number: int, folder: Path, parallel: str) -> None:
    """The last process alone is asked to stop; all stop after the same step."""
    if rank == number - 1:
        at_nimg(4 * 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(TINY, folder / "run", progress=False, parallel=parallel) == 5 * 12


def fail_part(rank: int, number: int, folder: Path, how: str) -> None:
    """The last process fails in mid-run."""
    if rank == number - 1:
        if how == "error":
            at_nimg(4 * 12, lambda: (_ for _ in ()).throw(ValueError("an image is damaged")))
        else:
            at_nimg(4 * 12, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(TINY, folder / "run", progress=False)
