"""How fast are training and sampling, beside a plain transcription of the paper?

Both compute the same function of the same weights, in turns, in one process; the differences
between their results are printed. `--profile` says where the time of each goes. On a busy machine
`--clock cpu` with OMP_WAIT_POLICY=PASSIVE counts the seconds that the threads worked.

    python -m benchmarks.model_speed [--case 28x28 32x32] [--clock cpu] [--profile] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.plain_edm2 import PlainDenoiser
from reference_model import Denoiser, heun_sampler
from reference_model.configs import NetworkConfig
from reference_model.loss import EDM2Loss

PLAIN, OURS, CHANNELS_FIRST = "plain transcription", "reference_model", "… channels first"
BAR = 1.3

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One network and its batch.

    Attributes:
        network: Shape of the network.
        batch: Images of a training step, and images sampled at once.
        num_steps: Solver steps in sampling: 2 · num_steps - 1 evaluations.
        rounds: How often each contender is timed.
    """

    network: NetworkConfig
    batch: int = 32
    num_steps: int = 2
    rounds: int = 9


CASES = {
    "28x28": Case(
        NetworkConfig(
            img_resolution=28,
            img_channels=1,
            label_dim=10,
            model_channels=32,
            channel_mult=(1, 2, 2),
            num_blocks=2,
            attn_resolutions=(14, 7),
        )
    ),
    "32x32": Case(
        NetworkConfig(
            img_resolution=32,
            img_channels=3,
            label_dim=10,
            model_channels=32,
            channel_mult=(1, 2, 3, 4),
            num_blocks=2,
            attn_resolutions=(16, 8),
        ),
        batch=16,
    ),
}


def contenders(config: NetworkConfig) -> dict[str, nn.Module]:
    """Networks of equal weights, with gains away from zero so that everything matters."""
    torch.manual_seed(0)
    net = Denoiser(config)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 0:
                p.fill_(0.5)
    first = Denoiser(config)
    first.load_state_dict(net.state_dict())
    first.unet.memory_format = torch.contiguous_format
    return {PLAIN: PlainDenoiser(config).copy_weights(net), OURS: net, CHANNELS_FIRST: first}


def example(case: Case) -> tuple[Tensor, Tensor | None]:
    """Images and labels."""
    torch.manual_seed(1)
    c = case.network
    images = torch.randn(case.batch, c.img_channels, c.img_resolution, c.img_resolution)
    classes = torch.arange(case.batch) % max(c.label_dim, 1)
    return images, torch.nn.functional.one_hot(classes, c.label_dim).float()


def training(net: nn.Module, case: Case) -> Run:
    """A step of training; returns the loss of each element."""
    net.train()
    loss_fn = EDM2Loss()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    images, labels = example(case)
    generator = torch.Generator().manual_seed(2)

    def step() -> Tensor:
        loss = loss_fn(net, images / 2, labels, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        (loss.sum() / case.batch).backward()
        optimizer.step()
        return loss.detach()

    return step


def sampling(net: nn.Module, case: Case) -> Run:
    """A batch of samples from the same noise."""
    net.eval()
    noise, labels = example(case)
    return partial(heun_sampler, net, noise, labels, num_steps=case.num_steps)


MODES: dict[str, Callable[[nn.Module, Case], Run]] = {"training": training, "sampling": sampling}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(case: Case, mode: str, clock: Callable[[], float]) -> dict[str, Any]:
    """Time all contenders of one case in turns."""
    runs = {name: MODES[mode](net, case) for name, net in contenders(case.network).items()}
    # Three times, for the threads and caches to settle, and for training to move the weights.
    results = {name: [run() for _ in range(3)][-1] for name, run in runs.items()}
    expected = results[PLAIN]
    difference = (results[OURS] - expected).norm() / expected.norm()
    seconds = harness.interleave(runs, case.rounds, clock=clock)
    return {
        "relative_difference": float(difference),
        "seconds": seconds,
        "speedup": {name: harness.ratio(seconds[PLAIN], times) for name, times in seconds.items()},
    }


GROUPS = {
    "convolution, forward": ("mkldnn_convolution", "slow_conv2d_forward", "aten::_convolution"),
    "convolution, backward": ("aten::convolution_backward", "slow_conv2d_backward"),
    "attention products": ("aten::bmm", "softmax", "scaled_dot_product"),
    "matrix products": ("aten::mm", "aten::addmm"),
    "optimizer": ("aten::_fused_adam_",),
}
REST = "elementwise, norms, the rest"


def profile(case: Case, mode: str) -> dict[str, dict[str, float]]:
    """Milliseconds of one run by group of operations, for each contender."""
    found = {}
    for name, net in contenders(case.network).items():
        run = MODES[mode](net, case)
        run()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            run()
        groups = dict.fromkeys([*GROUPS, REST], 0.0)
        for event in profiler.key_averages():
            group = next(
                (g for g, keys in GROUPS.items() if any(k in event.key for k in keys)), REST
            )
            groups[group] += event.self_cpu_time_total / 1e3
        found[name] = groups
    return found


def report(name: str, mode: str, result: dict[str, Any], bars: bool) -> str:
    """The table of one case, and the bar that the project set itself."""
    rows = [
        [contender, f"{1e3 * statistics.median(times):.0f}", f"{result['speedup'][contender]:.2f}"]
        for contender, times in result["seconds"].items()
    ]
    lines = [
        f"\n{name}, {mode}: results differ by {result['relative_difference']:.1e} (relative RMS)\n",
        harness.table(["contender", "ms", "throughput, × plain"], rows),
    ]
    if bars:
        lines.append(harness.bar("throughput", result["speedup"][OURS], BAR, at_least=True))
    return "\n".join(lines)


def report_profile(name: str, mode: str, found: dict[str, dict[str, float]]) -> str:
    """Milliseconds by group, and each as a part of the plain transcription's whole."""
    whole = sum(found[PLAIN].values())
    rows = [
        [
            group,
            *(f"{groups[group]:.0f} ({groups[group] / whole:.0%})" for groups in found.values()),
        ]
        for group in [*GROUPS, REST]
    ]
    sums = [f"{sum(g.values()):.0f} ({sum(g.values()) / whole:.0%})" for g in found.values()]
    head = ["ms (part of the plain transcription's time)", *found]
    return f"\n{name}, {mode}: where the time goes\n\n" + harness.table(
        head, [*rows, ["all", *sums]]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)))
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--profile", action="store_true", help="say where the time goes instead")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = harness.machine()
    record: dict[str, Any] = {}
    for name in arguments.case:
        case = CASES[name]
        if arguments.quick:
            network = replace(case.network, model_channels=8, num_blocks=1)
            case = replace(case, network=network, batch=2, num_steps=2, rounds=1)
        for mode in arguments.mode:
            if arguments.profile:
                found = profile(case, mode)
                print(report_profile(name, mode, found), flush=True)
            else:
                found = measure(case, mode, CLOCKS[arguments.clock])
                print(report(name, mode, found, bars=not arguments.quick), flush=True)
            record[f"{name}, {mode}"] = found
    if not arguments.quick:
        settings = {
            "threads": arguments.threads,
            "clock": arguments.clock,
            "batch": {name: CASES[name].batch for name in arguments.case},
        }
        kind = "model_profile" if arguments.profile else "model_speed"
        print(f"\nraw numbers: {harness.save(kind, settings, started, record)}")


if __name__ == "__main__":
    main()
