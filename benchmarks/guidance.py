"""What does guidance by the same run's own snapshots give?

Trains the digits with several seeds and measures averages alone, and guided by three denoisers that
cost no training: a shorter average, a longer one, and one of an eighth of the training. Fréchet
distance and the fraction of images read as intended, as the reference model's `sweep` measures
them; all combinations start from the same noise, so that differences to no guidance are paired.

    python -m benchmarks.guidance --dir FOLDER [--quick]

Interrupt at will: what was trained and measured under FOLDER is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# Before torch loads, as `python -m reference_model` does: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from tqdm import tqdm

from benchmarks import harness
from reference_model.averages import Weights, load_networks
from reference_model.checkpoint import load_config, write_atomically
from reference_model.judge import Judge
from reference_model.metrics import mean_and_error
from reference_model.presets import preset
from reference_model.protocol import Protocol
from reference_model.train import train

ALONE = (0.02, 0.05, 0.10, 0.15, 0.20, 0.25)
MAINS = (0.05, 0.15)
GUIDES = {"σ_rel 0.02": (0.02, 1.0), "σ_rel 0.25": (0.25, 1.0), "1/8 of training": (0.10, 0.125)}
"""EMA length of each guide, and its time as a fraction of training."""
STRENGTHS = (1.25, 1.5, 2.0)

Cell = tuple[float, str, float]  # EMA length of the main network, guide, strength
UNGUIDED = "none"


def cells() -> list[Cell]:
    """All combinations; averages alone have strength 1."""
    alone = [(length, UNGUIDED, 1.0) for length in ALONE]
    return alone + [(m, guide, w) for m in MAINS for guide in GUIDES for w in STRENGTHS]


def measure_run(folder: Path, seed: int, protocol: Protocol, quick: bool) -> dict[Cell, Any]:
    """Scores of all combinations for one training seed."""
    run_dir, path = folder / f"digits-{seed}", folder / f"scores-{seed}.json"
    train(replace(preset("digits-tiny" if quick else "digits"), seed=seed), run_dir)
    config = load_config(run_dir)
    done = json.loads(path.read_text()) if path.exists() else []
    scores = {tuple(cell): score for cell, used, score in done if used == asdict(protocol)}
    if missing := [cell for cell in cells() if cell not in scores]:
        lengths = dict.fromkeys((*ALONE, *MAINS))
        wanted = {length: Weights(run_dir, length) for length in lengths}
        at = {
            g: Weights(run_dir, s, None if f == 1 else config.total_nimg * f)
            for g, (s, f) in GUIDES.items()
        }
        nets = load_networks([*wanted.values(), *at.values()])
        by_name = dict(zip([*wanted, *at], nets, strict=True))
        judge = Judge(config, protocol, folder)
        for cell in tqdm(missing, desc=f"measure run {seed}"):
            main, guide, strength = cell
            score = judge.score(by_name[main], gnet=by_name.get(guide), guidance=strength)
            scores[cell] = asdict(score)
            text = json.dumps([(c, asdict(protocol), s) for c, s in scores.items()])
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
    return scores


def summarise(runs: list[dict[Cell, Any]]) -> list[dict[str, Any]]:
    """Means over runs, with standard errors over runs: training decides more than sampling."""

    def over_runs(cell: Cell, kind: str) -> list[float]:
        return [float(np.mean(run[cell][kind])) for run in runs]

    def best_alone(kind: str) -> list[float]:
        # Which length is best is decided for all runs together.
        best = min(ALONE, key=lambda s: np.mean(over_runs((s, UNGUIDED, 1.0), "distances")))
        return over_runs((best, UNGUIDED, 1.0), kind)

    rows = []
    for cell in cells():
        main, guide, strength = cell
        row: dict[str, Any] = {"sigma_rel": main, "guide": guide, "guidance": strength}
        for kind in ("distances", "agreement"):
            values = over_runs(cell, kind)
            row[kind] = mean_and_error(values)
            alone = over_runs((main, UNGUIDED, 1.0), kind)
            row[f"{kind}_minus_unguided"] = mean_and_error(np.subtract(values, alone))
            row[f"{kind}_minus_best_alone"] = mean_and_error(np.subtract(values, best_alone(kind)))
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    head = ["σ_rel", "guide", "w", "distance", "to same length alone", "to best alone",
            "read as intended, %"]  # fmt: skip

    def text(pair: tuple[float, float], scale: float, sign: str = "") -> str:
        return f"{scale * pair[0]:{sign}.1f} ± {scale * pair[1]:.1f}"

    cells = [
        [
            f"{r['sigma_rel']:g}",
            r["guide"],
            f"{r['guidance']:g}",
            text(r["distances"], 1e3),
            text(r["distances_minus_unguided"], 1e3, "+") if r["guide"] != UNGUIDED else "",
            text(r["distances_minus_best_alone"], 1e3, "+"),
            text(r["agreement"], 100),
        ]
        for r in rows
    ]
    return harness.table(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, help="where runs and scores are kept")
    parser.add_argument("--seeds", type=int, default=3, help="training runs, seeds 0, 1, ...")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    arguments = parser.parse_args()
    started = harness.machine()
    protocol = Protocol(images=1000, repeats=3, num_steps=8)
    if arguments.quick:
        protocol = Protocol(images=40, repeats=1, num_steps=2, batch_size=40)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        seeds = range(2 if arguments.quick else arguments.seeds)
        runs = [measure_run(folder, seed, protocol, arguments.quick) for seed in seeds]
    rows = summarise(runs)
    print("Fréchet distance × 1000 ± standard error over training runs\n")
    print(report(rows))
    if not arguments.quick:
        settings = {"seeds": len(seeds), "protocol": asdict(protocol), "guides": GUIDES}
        raw = [[[*cell, score] for cell, score in run.items()] for run in runs]
        path = harness.save("guidance", settings, started, {"rows": rows, "runs": raw})
        print(f"\nWrote {path}")


if __name__ == "__main__":
    main()
