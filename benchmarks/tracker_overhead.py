"""What does one update of two tracks cost, in time and in memory?

All contenders run in one process, in rounds. The floor is one flat lerp for each track over the
same number of values: no tracker that reads its averages once can do much better.

    python -m benchmarks.tracker_overhead [--case large small ...] [--quick]
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from benchmarks import harness, peers
from posthoc_ema import EMA

SIGMA_RELS = (0.05, 0.10)
DECAY = 0.999
FLOOR, OURS = "floor: flat lerps", "posthoc_ema"

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        sizes: Number of values of each tensor.
        dtype: Type of the weights.
        rounds: How often each contender is timed, for each time that all are built.
    """

    sizes: list[int]
    dtype: torch.dtype = torch.float32
    rounds: int = 20


def mixed_sizes(tensors: int, total: int) -> list[int]:
    """Sizes as in a real network: many small tensors, most values in few large ones."""
    generator = random.Random(0)
    raw = [10 ** generator.uniform(1.5, 6) for _ in range(tensors)]
    return [max(int(size * total / sum(raw)), 1) for size in raw]


CASES = {
    "large": Case([50_000_000 // 300] * 300),
    "small": Case([1000] * 2000, rounds=100),
    "mixed": Case(mixed_sizes(300, 50_000_000)),
    "bfloat16": Case([50_000_000 // 300] * 300, dtype=torch.bfloat16),
}


def make_model(case: Case) -> torch.nn.Module:
    """Blocks of two parameters each."""
    model = torch.nn.Module()
    parameters = [torch.nn.Parameter(torch.randn(size).to(case.dtype)) for size in case.sizes]
    for k in range(0, len(parameters), 2):
        block = torch.nn.Module()
        block.weight = parameters[k]
        if k + 1 < len(parameters):
            block.bias = parameters[k + 1]
        model.add_module(f"block{k // 2}", block)
    return model


def floor(model: torch.nn.Module) -> Step:
    flat = torch.cat([parameter.detach() for parameter in model.parameters()])
    single = flat.float().clone()
    averages = [single.clone() for _ in SIGMA_RELS]

    def step() -> None:
        if flat.dtype != torch.float32:
            single.copy_(flat)
        for average in averages:
            average.lerp_(single, 1 - DECAY)

    return step


def ours(model: torch.nn.Module, **options: Any) -> Step:
    return partial(EMA(SIGMA_RELS, **options).update, model)


def ema_pytorch(model: torch.nn.Module) -> Step:
    with tempfile.TemporaryDirectory() as folder:  # wanted, but nothing is written there
        ema = peers.load("ema-pytorch").PostHocEMA(
            model,
            sigma_rels=SIGMA_RELS,
            update_every=1,
            checkpoint_every_num_steps="manual",
            checkpoint_folder=folder,
        )
    return ema.update


def pytorch_posthoc_ema(model: torch.nn.Module) -> Step:
    with tempfile.TemporaryDirectory() as folder:
        ema = peers.load("pytorch-posthoc-ema").PostHocEMA.from_model(
            model,
            folder,
            sigma_rels=SIGMA_RELS,
            update_every=1,
            update_after_step=0,
            checkpoint_every=10**9,
        )
    return partial(ema.update_, model)


def averaged_model(model: torch.nn.Module, **functions: Any) -> Step:
    averages = [AveragedModel(model, **functions) for _ in SIGMA_RELS]
    return partial(_each, [partial(average.update_parameters, model) for average in averages])


def diffusers(model: torch.nn.Module, foreach: bool) -> Step:
    kind = peers.load("diffusers").EMAModel
    averages = [kind(model.parameters(), decay=DECAY, foreach=foreach) for _ in SIGMA_RELS]
    return partial(_each, [lambda a=average: a.step(model.parameters()) for average in averages])


def timm(model: torch.nn.Module) -> Step:
    kind = peers.load("timm").ModelEmaV3
    averages = [kind(model, decay=DECAY, dtype=torch.float32) for _ in SIGMA_RELS]
    return partial(_each, [partial(average.update, model) for average in averages])


def _each(steps: list[Step]) -> None:
    for step in steps:
        step()


CONTENDERS: dict[str, Callable[[torch.nn.Module], Step]] = {
    FLOOR: floor,
    OURS: ours,
    'posthoc_ema, nonfinite="skip"': partial(ours, nonfinite="skip"),
    "ema-pytorch": ema_pytorch,
    "pytorch-posthoc-ema": pytorch_posthoc_ema,
    "torch AveragedModel, multi_avg_fn": partial(
        averaged_model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)
    ),
    "torch AveragedModel, avg_fn": partial(averaged_model, avg_fn=get_ema_avg_fn(DECAY)),
    "diffusers": partial(diffusers, foreach=False),
    "diffusers, foreach": partial(diffusers, foreach=True),
    "timm": timm,
}
OWN = [name for name in CONTENDERS if name == FLOOR or name.startswith(OURS)]


def measure(case: Case, builds: int, with_peers: bool) -> dict[str, dict[str, Any]]:
    """Time every contender; an absent one says so.

    All are built several times in different orders, for how the system places their memory
    decides about a tenth of the time.
    """
    model = make_model(case)
    seconds: dict[str, list[float]] = {}
    results: dict[str, dict[str, Any]] = {}
    for build in range(builds):
        steps: dict[str, Step] = {}
        names = [name for name in CONTENDERS if with_peers or name in OWN]
        random.Random(build).shuffle(names)
        for name in names:
            try:
                step = CONTENDERS[name](model)
            except peers.NotInstalledError as error:
                results[name] = {"not_installed": str(error)}
                continue
            for _ in range(3):
                step()
            results[name] = {"extra_bytes": harness.extra_memory(step)}
            steps[name] = step
        for name, times in harness.interleave(steps, case.rounds, seed=build).items():
            seconds.setdefault(name, []).extend(times)
        del steps
        gc.collect()
    for name in CONTENDERS:
        if name in seconds:
            results[name]["seconds"] = seconds[name]
            results[name]["times_floor"] = harness.ratio(seconds[name], seconds[FLOOR])
            results[name]["times_ours"] = harness.ratio(seconds[name], seconds[OURS])
    return {name: results[name] for name in CONTENDERS if name in results}


def report(name: str, case: Case, results: dict[str, dict[str, Any]], bars: bool) -> str:
    """The table, and the bars that the project set itself."""
    rows = []
    for contender, result in results.items():
        if "seconds" not in result:
            rows.append([contender, "not installed", "", "", ""])
            continue
        rows.append(
            [
                contender,
                f"{1e3 * statistics.median(result['seconds']):.2f}",
                f"{result['times_floor']:.2f}",
                f"{result['times_ours']:.2f}",
                f"{result['extra_bytes'] / harness.MB:.1f}",
            ]
        )
    head = ["contender", "ms", "× floor", "× ours", "MB of memory during"]
    lines = [f"\n{name}: {len(case.sizes)} tensors, {sum(case.sizes):,} values, {case.dtype}\n"]
    lines.append(harness.table(head, rows))
    if bars and name == "large":
        lines.append(harness.bar("× floor", results[OURS]["times_floor"], 1.05))
    if bars and name == "small":
        lines.append(harness.bar("× floor", results[OURS]["times_floor"], 3))
        others = [r["times_ours"] for c, r in results.items() if c not in OWN and "seconds" in r]
        if others:
            lines.append(harness.bar("fastest peer × ours", min(others), 8, at_least=True))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--builds", type=int, default=3, help="how often all are built anew")
    parser.add_argument("--no-peers", action="store_true", help="only this library and the floor")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    started = harness.machine()
    record = {}
    for name in arguments.case:
        case = CASES[name]
        if arguments.quick:
            sizes = [size % 1000 + 1 for size in case.sizes[:50]]
            case = replace(case, sizes=sizes, rounds=3)
        record[name] = measure(case, arguments.builds, not arguments.no_peers)
        print(report(name, case, record[name], bars=not arguments.quick), flush=True)
    if not arguments.quick:
        settings = {"threads": arguments.threads, "builds": arguments.builds, "seed": 0}
        print(f"\nraw numbers: {harness.save('tracker_overhead', settings, started, record)}")


if __name__ == "__main__":
    main()
