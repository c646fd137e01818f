"""How long does a reconstruction take, compared with merely reading the files, and in what memory?

Every measurement is a process of its own, with the files in the page cache; the contenders take
turns. Memory is what the process adds that is no file's (RssAnon), its results not counted.

    python -m benchmarks.reconstruct_throughput [--dir FOLDER] [--case ...] [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.made_runs import SIGMA_RELS, MadeRun, drop_from_cache, read_all

READING, OURS, NUMPY = "reading the bytes", "posthoc_ema", "posthoc_ema, no torch loaded"
EVERY = "posthoc_ema, every snapshot (slack=0)"
EMA_PYTORCH, PYTORCH_POSTHOC_EMA = "ema-pytorch", "pytorch-posthoc-ema"
TARGETS = (1, 8)


@dataclass(frozen=True)
class Case:
    """One run to reconstruct from."""

    run: MadeRun
    targets: tuple[int, ...] = TARGETS
    peers: bool = True
    to_file: bool = False


CASES = {
    "float16": Case(MadeRun(32, 50_000_000, 300, "float16")),
    "float32": Case(MadeRun(32, 50_000_000, 300, "float32")),
    "out4gb": Case(
        MadeRun(2, 1_000_000_000, 100, "float16"), targets=(1,), peers=False, to_file=True
    ),
}


def quick(case: Case) -> Case:
    """The same on a scale of seconds."""
    run = replace(case.run, times=4, parameters=60_000, tensors=6)
    return replace(case, run=run, targets=(1,))


# What one worker process does.


def sigma_rels(targets: int) -> list[float]:
    return list(np.linspace(0.055, 0.095, targets)) if targets > 1 else [0.07]


def reconstruct_ours(
    path: Path, targets: int, out: str | None, contender: str
) -> Callable[[], Any]:
    from posthoc_ema import reconstruct

    framework = "numpy" if contender == NUMPY else "torch"
    if framework == "torch":
        import torch  # noqa: F401 - a program that uses torch has it loaded

    wanted = sigma_rels(targets)
    return lambda: reconstruct(
        path,
        wanted if targets > 1 else wanted[0],
        out=out,
        framework=framework,
        progress=False,
        slack=0 if contender == EVERY else None,
    )


def reconstruct_ema_pytorch(path: Path, targets: int, run: MadeRun) -> Callable[[], Any]:
    from benchmarks import peers

    ema = peers.load("ema-pytorch").PostHocEMA(
        _module(run), sigma_rels=SIGMA_RELS, checkpoint_folder=str(path)
    )
    return lambda: [ema.synthesize_ema_model(sigma_rel=s) for s in sigma_rels(targets)]


def reconstruct_pytorch_posthoc_ema(path: Path, targets: int, run: MadeRun) -> Callable[[], Any]:
    from benchmarks import peers

    ema = peers.load("pytorch-posthoc-ema").PostHocEMA.from_path(
        path, model=_module(run), sigma_rels=SIGMA_RELS
    )

    def call() -> list[Any]:
        results = []
        for sigma_rel in sigma_rels(targets):
            with ema.state_dict(sigma_rel=sigma_rel) as state:
                results.append(dict(state))
        return results

    return call


def _module(run: MadeRun) -> Any:
    import torch

    module = torch.nn.Module()
    layers = torch.nn.ModuleList()
    for _ in run.names:
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.zeros(run.size))
        layers.append(layer)
    module.layers = layers
    return module


def work(task: dict[str, Any]) -> None:
    """Run one task; talk to the parent by lines of JSON."""
    run, path, targets = MadeRun(**task["run"]), Path(task["path"]), task["targets"]
    contender = task["contender"]
    call: Callable[[], Any]
    if contender == READING:
        call = lambda: read_all(path)  # noqa: E731
    elif contender in (OURS, NUMPY, EVERY):
        call = reconstruct_ours(path, targets, task["out"], contender)
    elif contender == EMA_PYTORCH:
        call = reconstruct_ema_pytorch(path, targets, run)
    else:
        call = reconstruct_pytorch_posthoc_ema(path, targets, run)
    read_all(path)
    _tell({"ready": True})
    sys.stdin.readline()
    start = time.perf_counter()
    result = call()
    _tell({"seconds": time.perf_counter() - start, "snapshots_used": _used(result)})
    sys.stdin.readline()  # memory is still being looked at
    del result


def _used(result: Any) -> int | None:
    """How many snapshots have a coefficient in one of our results."""
    listed = result if isinstance(result, list) else [result]
    coefficients = [getattr(r, "coefficients", None) for r in listed]
    if any(x is None for x in coefficients):
        return None
    return int((np.stack(coefficients) != 0).any(axis=0).sum())


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


# What the parent does.


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Start a worker, time it, and watch its memory from outside."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.reconstruct_throughput", "--worker", json.dumps(task)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stderr is not None
    ready = worker.stdout.readline()
    if not ready:
        error = worker.stderr.read()
        worker.wait()
        if "NotInstalledError" in error:
            return {"not_installed": error.strip().splitlines()[-1]}
        raise RuntimeError(f"{task['contender']} failed:\n{error}")
    before = peak = harness.anonymous_bytes(worker.pid)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, harness.anonymous_bytes(worker.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    worker.stdin.write("\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    done.set()
    watcher.join()
    _, error = worker.communicate("\n")
    if not answer:
        raise RuntimeError(f"{task['contender']} failed:\n{error}")
    return {**json.loads(answer), "added_bytes": peak - before, "total_bytes": peak}


def contenders(case: Case, with_peers: bool) -> list[tuple[str, int]]:
    listed = [(READING, 0)]
    own = (OURS,) if case.to_file else (OURS, NUMPY, EVERY)
    others = (EMA_PYTORCH, PYTORCH_POSTHOC_EMA) if case.peers and with_peers else ()
    return listed + [(name, k) for k in case.targets for name in (*own, *others)]


def measure_case(
    case: Case, folder: Path, rounds: int, with_peers: bool
) -> dict[str, dict[str, Any]]:
    """Time all contenders of one case, in turns."""
    _in_child(case.run, folder, with_peers and case.peers)
    results: dict[str, dict[str, Any]] = {}
    cached: Path | None = None
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for round_ in range(rounds):
            for name, targets in contenders(case, with_peers):
                # Peers take a minute for many targets, by far the slowest: once is enough.
                if round_ and targets > 1 and name in (EMA_PYTORCH, PYTORCH_POSTHOC_EMA):
                    continue
                foreign = name in (EMA_PYTORCH, PYTORCH_POSTHOC_EMA)
                path = case.run.checkpoints(folder) if foreign else case.run.store(folder)
                if cached not in (None, path):
                    drop_from_cache(cached)  # memory may not hold both
                cached = path
                task = {
                    "contender": name,
                    "targets": targets,
                    "run": asdict(case.run),
                    "path": str(path),
                    "out": str(Path(scratch) / "out") if case.to_file else None,
                }
                key = f"{name}, {targets} target{'s'[: targets > 1]}" if targets else name
                result = results.setdefault(key, {"targets": targets, "measured": []})
                measured = measure(task)
                if "not_installed" in measured:
                    result.update(measured)
                else:
                    result["measured"].append(measured)
                print(f"  {key}: {_shown(measured)}", file=sys.stderr, flush=True)
    for key, result in results.items():
        if result["measured"]:
            result["seconds"] = statistics.median(m["seconds"] for m in result["measured"])
            held = 0 if case.to_file or key == READING else 4 * case.run.size * case.run.tensors
            added = max(m["added_bytes"] for m in result["measured"])
            result["above_outputs_bytes"] = max(added - held * result["targets"], 0)
            result["total_bytes"] = max(m["total_bytes"] for m in result["measured"])
    return results


def _in_child(run: MadeRun, folder: Path, with_peers: bool) -> None:
    """Make the files in another process: this one shall stay small."""
    code = (
        "import json, sys; from pathlib import Path; from benchmarks.made_runs import MadeRun\n"
        "run, folder = MadeRun(**json.loads(sys.argv[1])), Path(sys.argv[2])\n"
        "run.store(folder)\n"
        "if sys.argv[3] == 'True': run.checkpoints(folder)\n"
    )
    arguments = [json.dumps(asdict(run)), str(folder), str(with_peers)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def _shown(measured: dict[str, Any]) -> str:
    if "not_installed" in measured:
        return "not installed"
    return f"{measured['seconds']:.2f} s, {measured['added_bytes'] / harness.MB:.0f} MB added"


def report(name: str, case: Case, results: dict[str, dict[str, Any]], bars: bool) -> str:
    """The table, and the bars that the project set itself."""
    reading = results[READING]["seconds"]
    rows = []
    for key, result in results.items():
        if not result["measured"]:
            rows.append([key, "not installed", "", "", "", ""])
            continue
        rows.append(
            [
                key,
                f"{result['seconds']:.2f}",
                f"{result['seconds'] / reading:.2f}",
                f"{result['above_outputs_bytes'] / harness.MB:.0f}",
                f"{result['total_bytes'] / harness.MB:.0f}",
                result["measured"][-1].get("snapshots_used") or "",
            ]
        )
    run = case.run
    lines = [f"\n{name}: {run.times} times × 2 tracks × {run.parameters:,} weights\n"]
    head = ["contender", "s", "× reading", "MB above outputs", "MB in all", "snapshots used"]
    lines.append(harness.table(head, rows))
    if not bars:
        return "\n".join(lines)
    one = results[f"{OURS}, 1 target"]
    if case.to_file:
        lines.append(harness.bar("MB in all", one["total_bytes"] / harness.MB, 512))
        return "\n".join(lines)
    lines.append(harness.bar("1 target × reading", one["seconds"] / reading, 2))
    above = max(r.get("above_outputs_bytes", 0) for k, r in results.items() if k.startswith(OURS))
    lines.append(harness.bar("MB above outputs", above / harness.MB, 256))
    for targets in case.targets:
        mine = results[f"{OURS}, {targets} target{'s'[: targets > 1]}"]["seconds"]
        others = [
            r["seconds"]
            for key, r in results.items()
            if r["targets"] == targets and "seconds" in r and not key.startswith(OURS)
        ]
        if others:
            text = f"fastest peer × ours, {targets} target{'s'[: targets > 1]}"
            lines.append(harness.bar(text, min(others) / mine, 6, at_least=True))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--dir",
        type=Path,
        help="where to make the runs and keep them (up to 52 GB in all; default: a temporary "
        "folder, deleted at the end)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="only this library and reading")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    if arguments.worker:
        work(json.loads(arguments.worker))
        return
    started = harness.machine()
    record = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.dir or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.case:
            case = quick(CASES[name]) if arguments.quick else CASES[name]
            rounds = 1 if arguments.quick else arguments.rounds
            record[name] = measure_case(case, folder, rounds, not arguments.no_peers)
            print(report(name, case, record[name], bars=not arguments.quick), flush=True)
    if not arguments.quick:
        settings = {"rounds": arguments.rounds, "seed": 0, "cases": list(arguments.case)}
        print(f"\nraw numbers: {harness.save('reconstruct_throughput', settings, started, record)}")


if __name__ == "__main__":
    main()
