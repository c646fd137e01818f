"""How near do other libraries come, from the same averages in their own files?

Both solve for the L2 distance of densities, as the paper does, and do not rescale coefficients.
Their files hold float16 here, their synthesis runs at the end of training.

    python -m benchmarks.peer_synthesis --dir FOLDER [--times 16]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import harness, peers
from benchmarks.reconstruct_accuracy import TIMES, UNSTORED, geometric_mean, relative_error
from benchmarks.training_runs import RUNS
from benchmarks.trajectories import CANDIDATES, TARGETS, TRACKS, Recording
from posthoc_ema import reconstruct

Synthesis = Callable[[float], Mapping[str, torch.Tensor]]
OURS, PAPER = "posthoc_ema", "posthoc_ema, paper's solve"


def ema_pytorch(folder: Path, model: nn.Module) -> Synthesis:
    library = peers.load("ema-pytorch")
    ema = library.PostHocEMA(model, sigma_rels=TRACKS, checkpoint_folder=str(folder))
    return lambda s: ema.synthesize_ema_model(sigma_rel=s).ema_model.state_dict()


def pytorch_posthoc_ema(folder: Path, model: nn.Module) -> Synthesis:
    library = peers.load("pytorch-posthoc-ema")
    ema = library.PostHocEMA.from_path(folder, model=model, sigma_rels=TRACKS)

    def synthesise(sigma_rel: float) -> dict[str, torch.Tensor]:
        with ema.state_dict(sigma_rel=sigma_rel) as state:
            return {name.removeprefix("ema_model."): values for name, values in state.items()}

    return synthesise


PEERS = {"ema-pytorch": ema_pytorch, "pytorch-posthoc-ema": pytorch_posthoc_ema}


def write_checkpoints(recording: Recording, model: nn.Module, folder: Path, number: int) -> None:
    """As both libraries keep them: ``track.step.pt``, half precision."""
    step = CANDIDATES // number
    for k in range(step - 1, CANDIDATES, step):
        t = int(recording.times[k])
        for track in range(len(TRACKS)):
            state: dict[str, Any] = {
                f"ema_model.{name}": torch.from_numpy(values).half()
                for name, values in recording.split(recording.tracks[k, track]).items()
            }
            state |= {f"ema_model.{name}": values for name, values in model.named_buffers()}
            state |= {"initted": torch.tensor(True), "step": torch.tensor(float(t))}
            torch.save(state, folder / f"{track}.{t}.pt")


def errors_of_run(name: str, folder: Path, number: int) -> dict[str, dict[float, float]]:
    """Relative error by contender and EMA length."""
    recording = Recording.of(RUNS[name], folder)
    true = dict(zip(TARGETS, recording.true[-1], strict=True))
    errors: dict[str, dict[float, float]] = {}

    def compare(contender: str, synthesis: Callable[[float], Mapping[str, Any]]) -> None:
        errors[contender] = {}
        for sigma_rel in UNSTORED:
            state = synthesis(sigma_rel)
            made = [np.asarray(state[n], np.float64).ravel() for n in recording.shapes]
            errors[contender][sigma_rel] = relative_error(np.concatenate(made), true[sigma_rel])

    with tempfile.TemporaryDirectory() as path:
        store = recording.write(Path(path), number, "float16")
        for contender, method in ((OURS, "kriging"), (PAPER, "paper")):
            compare(
                contender,
                lambda s, method=method: (
                    reconstruct(store, s, method=method, framework="numpy", progress=False).params
                ),
            )
    with tempfile.TemporaryDirectory() as path:
        model = RUNS[name].make().model
        write_checkpoints(recording, model, Path(path), number)
        for contender, load in PEERS.items():
            compare(contender, load(Path(path), model))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="where recordings are kept")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--times", type=int, choices=TIMES, default=16)
    arguments = parser.parse_args()
    started = harness.machine()
    results = {name: errors_of_run(name, arguments.dir, arguments.times) for name in arguments.runs}
    rows = [
        [
            name,
            contender,
            *(f"{error:.1e}" for error in errors.values()),
            f"{geometric_mean(errors[s] / of_run[OURS][s] for s in errors):.1f}",
        ]
        for name, of_run in results.items()
        for contender, errors in of_run.items()
    ]
    print(f"Relative error from {arguments.times} times in float16; the mean beside ours\n")
    print(harness.table(["run", "library", *map(str, UNSTORED), "× ours"], rows))
    if arguments.runs == list(RUNS):
        settings = {"times": arguments.times, "targets": UNSTORED}
        print(f"\nraw numbers: {harness.save('peer_synthesis', settings, started, results)}")


if __name__ == "__main__":
    main()
