"""How near do reconstructions come to the true averages, and does the predicted error say so?

Small real training runs (``training_runs.py``) of different models, optimizers and learning rates,
with true averages accumulated in float64. For every run, number of snapshot times, encoding,
method and EMA length: the RMS difference from the true average over the RMS of that average, the
gain over the paper's solve on float16 files, and the predicted error. Also what the difference
does to the model's outputs and loss on held-out data.

    python -m benchmarks.reconstruct_accuracy --dir FOLDER [--quick] [--encodings float16]

The folder keeps what was recorded while training (1 GB), so that a second call does not train.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import harness
from benchmarks.trajectories import TARGETS, TRACKS, Recording, of_each_run
from posthoc_ema import SnapshotStore, reconstruct
from posthoc_ema.encoding import ENCODINGS

TIMES = (8, 16, 32, 64)
BAR_TIMES = (8, 16, 32)
REFERENCE = "float16"
METHODS = ("kriging", "paper")
WHEN = ("middle", "end")
UNSTORED = tuple(s for s in TARGETS if s not in TRACKS)
LOSS_TIMES = 16
LOSS_TARGETS = (0.02, 0.075, 0.13, 0.25)
# What kriging must gain over the paper's solve on float16 files, in geometric mean.
GAIN_BARS = {"float16": 2.5, "delta16": 12.0, "delta8": 6.0, "delta4": 4.0}
BYTES_BARS = {"delta16": 4.0, "delta8": 2.0, "delta4": 1.5}  # for a weight and time, two tracks
WORST_GAIN_BAR = 0.99
COARSE = "bfloat16"  # its eight bits lose what no solver brings back


@dataclass(frozen=True)
class Curve:
    """One store, one method: errors over the EMA lengths ``TARGETS``.

    Attributes:
        run: Name of the run.
        when: ``"middle"`` (not a snapshot time) or ``"end"`` of training.
        times: Number of snapshot times.
        encoding: Of the store.
        method: ``"kriging"`` or ``"paper"``.
        bytes: Of tensors on disk, for each weight and snapshot time.
        error: True RMS error relative to the RMS of the true average.
        predicted: The same as predicted.
        gain: Error of the paper's solve on float16 files over this one's.
    """

    run: str
    when: str
    times: int
    encoding: str
    method: str
    bytes: float
    error: tuple[float, ...]
    predicted: tuple[float, ...]
    gain: tuple[float, ...] = ()


@dataclass(frozen=True)
class Effect:
    """What one reconstruction does to the model, beside the true average.

    Attributes:
        run: Name of the run.
        encoding: Of the store.
        method: As in :class:`Curve`.
        sigma_rel: EMA length.
        loss: Held-out loss with the true average.
        loss_change: Magnitude of its change, relative.
        output_change: RMS change of the outputs relative to their RMS.
    """

    run: str
    encoding: str
    method: str
    sigma_rel: float
    loss: float
    loss_change: float
    output_change: float


Apply = Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]]
"""Held-out loss and outputs of a model with the given weights."""


def measure_run(
    name: str, folder: Path, numbers: Sequence[int], encodings: Sequence[str], steps: int | None
) -> tuple[list[Curve], list[Effect]]:
    """All of one run; trains it first if the folder does not hold it."""
    from benchmarks.training_runs import RUNS

    run = RUNS[name] if steps is None else replace(RUNS[name], steps=steps)
    recording = Recording.of(run, folder)
    curves: list[Curve] = []
    effects: list[Effect] = []
    for number in numbers:
        for encoding in encodings:
            with tempfile.TemporaryDirectory() as path:
                store = recording.write(Path(path), number, encoding)
                for method in METHODS:
                    for when in WHEN:
                        curve, made = measure(name, recording, store, method, when)
                        curves.append(curve)
                        if when == "end" and number == min(LOSS_TIMES, max(numbers)):
                            apply = _application(run.make())
                            effects += _effects(curve, recording, made, apply)
    return with_gains(curves), effects


def measure(
    name: str, recording: Recording, store: SnapshotStore, method: str, when: str
) -> tuple[Curve, list[NDArray[np.float64]]]:
    """One curve, and the reconstructed weights as vectors."""
    place = WHEN.index(when)
    made, predicted = _reconstruct(store, TARGETS, int(recording.ends[place]), method)
    snapshots = store.list()
    files = [*snapshots, *(s.base for s in snapshots if s.base is not None)]
    payload = sum(e.nbytes for s in files for e in s.entries.values())
    number = len({s.t for s in snapshots})
    curve = Curve(
        name,
        when,
        number,
        snapshots[-1].encoding,
        method,
        payload / number / recording.true.shape[-1],
        tuple(relative_error(m, t) for m, t in zip(made, recording.true[place], strict=True)),
        tuple(predicted),
    )
    return curve, made


def _reconstruct(
    store: SnapshotStore, sigma_rels: Sequence[float], t: int, method: str
) -> tuple[list[NDArray[np.float64]], list[float]]:
    """Weights as vectors and their predicted errors."""
    try:
        with warnings.catch_warnings():
            # Some lengths are beyond what the snapshots support: that is part of the question.
            warnings.simplefilter("ignore", UserWarning)
            results = reconstruct(
                store, sigma_rels, t=t, method=method, framework="numpy", progress=False
            )
    except ValueError:
        # The paper's solve has nothing for short lengths well past the last snapshot; for others.
        if len(sigma_rels) == 1:
            return [np.full(1, np.nan)], [np.nan]
        single = [_reconstruct(store, [s], t, method) for s in sigma_rels]
        return [made for (made,), _ in single], [predicted for _, (predicted,) in single]
    vectors = [
        np.concatenate([values.ravel() for values in r.params.values()], dtype=np.float64)
        for r in results
    ]
    return vectors, [r.predicted_error for r in results]


def relative_error(made: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """RMS difference over the RMS of what is true."""
    return float(np.linalg.norm(made - true) / np.linalg.norm(true))


def with_gains(curves: Sequence[Curve]) -> list[Curve]:
    """The same curves, compared with the paper's solve on float16 files of the same times."""
    reference = {
        (c.run, c.when, c.times): c.error
        for c in curves
        if c.encoding == REFERENCE and c.method == "paper"
    }
    return [
        replace(c, gain=tuple(np.divide(reference[c.run, c.when, c.times], c.error).tolist()))
        for c in curves
    ]


def _application(task: Any) -> Apply:
    import torch
    from torch.nn.utils import vector_to_parameters

    def apply(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        vector_to_parameters(torch.from_numpy(weights).float(), task.model.parameters())
        task.model.eval()
        with torch.inference_mode():
            loss, outputs = task.held_out()
        return float(loss), outputs.double().numpy()

    return apply


def _effects(
    curve: Curve, recording: Recording, made: Sequence[NDArray[np.float64]], apply: Apply
) -> list[Effect]:
    effects = []
    for sigma_rel in LOSS_TARGETS:
        k = TARGETS.index(sigma_rel)
        loss, outputs = apply(recording.true[-1, k])
        loss_made, outputs_made = apply(made[k])
        effects.append(
            Effect(
                curve.run,
                curve.encoding,
                curve.method,
                sigma_rel,
                loss,
                abs(loss_made - loss) / abs(loss),
                relative_error(outputs_made, outputs),
            )
        )
    return effects


@dataclass(frozen=True)
class Cell:
    """One EMA length of one curve: what the summaries count."""

    curve: Curve
    sigma_rel: float
    error: float
    predicted: float
    gain: float

    @property
    def calibration(self) -> float:
        """Predicted over true error."""
        return self.predicted / self.error


def cells(curves: Iterable[Curve], sigma_rels: Sequence[float] = UNSTORED) -> list[Cell]:
    """All lengths but those of the tracks, which no method has to reconstruct.

    Nor those for which the paper's solve has no answer.
    """
    return [
        Cell(c, *row)
        for c in curves
        for row in zip(TARGETS, c.error, c.predicted, c.gain, strict=True)
        if row[0] in sigma_rels and np.isfinite(row[-1])
    ]


def geometric_mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


def within(listed: Sequence[Cell], factor: float) -> float:
    """Share whose predicted error is right within a factor."""
    return float(np.mean([1 / factor <= c.calibration <= factor for c in listed]))


def report(curves: Sequence[Curve], effects: Sequence[Effect], bars: bool) -> str:
    """Everything that is printed."""
    kriging = [c for c in curves if c.method == "kriging"]
    ends = [c for c in kriging if c.when == "end"]
    parts = [
        f"Kriging beside the paper's solve on {REFERENCE} files, over {_count(ends, 'run')} runs "
        f"and {len(UNSTORED)} EMA lengths ({UNSTORED[0]:g} … {UNSTORED[-1]:g}) at the end of "
        "training\n",
        _summary(ends),
        "\nThe same at a time between snapshots, 0.7 of training\n",
        _summary([c for c in kriging if c.when == "middle"]),
        "\nBy run, 8 to 32 times\n",
        _by_run([c for c in ends if c.times in BAR_TIMES] or ends),
        f"\nRelative error, {curves[0].run}, end of training\n",
        _one_run([c for c in curves if c.run == curves[0].run and c.when == "end"]),
        f"\nWorst gains, without {COARSE}\n",
        _worst(cells(c for c in ends if c.encoding != COARSE), lambda c: c.gain),
        f"\nWorst gains on {REFERENCE} files\n",
        _worst(cells(c for c in ends if c.encoding == REFERENCE), lambda c: c.gain),
        "\nWorst predictions\n",
        _worst(cells(ends), lambda c: -abs(np.log(c.calibration))),
        f"\nHeld-out loss and outputs, {LOSS_TIMES} times; median over EMA lengths "
        f"{', '.join(map(str, LOSS_TARGETS))} (largest)\n",
        _effect_table(effects),
    ]
    if bars:
        parts += ["", *_bars([c for c in ends if c.times in BAR_TIMES])]
    return "\n".join(parts)


def _count(curves: Sequence[Curve], field: str) -> int:
    return len({getattr(c, field) for c in curves})


def _summary(curves: Sequence[Curve]) -> str:
    rows = []
    for encoding in dict.fromkeys(c.encoding for c in curves):
        for times in sorted({c.times for c in curves}):
            chosen = [c for c in curves if (c.encoding, c.times) == (encoding, times)]
            rows.append([encoding, times, f"{chosen[0].bytes:.2f}", *_statistics(chosen)])
    return harness.table(["encoding", "times", "bytes", *_STATISTICS], rows)


_STATISTICS = ("gain", "worst", "within 1.5 ×", "2.5 ×", "predicted / true")


def _statistics(curves: Sequence[Curve]) -> list[str]:
    listed = cells(curves)
    ratios = [c.calibration for c in listed]
    return [
        f"{geometric_mean(c.gain for c in listed):.2f}",
        f"{min(c.gain for c in listed):.2f}",
        f"{within(listed, 1.5):.0%}",
        f"{within(listed, 2.5):.1%}",
        f"{min(ratios):.2f} … {max(ratios):.2f}",
    ]


def _by_run(curves: Sequence[Curve]) -> str:
    rows = [
        [run, encoding, *_statistics([c for c in curves if (c.run, c.encoding) == (run, encoding)])]
        for run in dict.fromkeys(c.run for c in curves)
        for encoding in dict.fromkeys(c.encoding for c in curves)
    ]
    return harness.table(["run", "encoding", *_STATISTICS], rows)


def _one_run(curves: Sequence[Curve]) -> str:
    shown = [k for k, sigma_rel in enumerate(TARGETS) if sigma_rel in UNSTORED]
    rows = [
        [f"{c.times}, {c.encoding}", c.method, *(f"{c.error[k]:.1e}" for k in shown)]
        for c in sorted(curves, key=lambda c: (c.times, c.encoding, c.method == "kriging"))
    ]
    return harness.table(["times, storage", "solver", *(f"{TARGETS[k]:g}" for k in shown)], rows)


def _worst(listed: Sequence[Cell], key: Callable[[Cell], float], number: int = 10) -> str:
    rows = [
        [
            c.curve.run,
            c.curve.times,
            c.curve.encoding,
            f"{c.sigma_rel:g}",
            f"{c.gain:.2f}",
            f"{c.error:.2e}",
            f"{c.predicted:.2e}",
            f"{c.calibration:.2f}",
        ]
        for c in sorted(listed, key=key)[:number]
    ]
    head = ["run", "times", "encoding", "σ_rel", "gain", "true error", "predicted", "ratio"]
    return harness.table(head, rows)


def _effect_table(effects: Sequence[Effect]) -> str:
    rows = []
    for run in dict.fromkeys(e.run for e in effects):
        of_run = [e for e in effects if e.run == run]
        for encoding, method in dict.fromkeys((e.encoding, e.method) for e in of_run):
            chosen = [e for e in of_run if (e.encoding, e.method) == (encoding, method)]
            loss, output = [e.loss_change for e in chosen], [e.output_change for e in chosen]
            rows.append(
                [
                    run,
                    encoding,
                    method,
                    f"{np.mean([e.loss for e in chosen]):.4f}",
                    f"{np.median(loss):.1e} ({max(loss):.1e})",
                    f"{np.median(output):.1e} ({max(output):.1e})",
                ]
            )
    head = ["run", "encoding", "solver", "loss", "its change", "change of outputs"]
    return harness.table(head, rows)


def _bars(curves: Sequence[Curve]) -> list[str]:
    """What the project set itself for kriging with 8 to 32 times."""
    lines = []
    for encoding in dict.fromkeys(c.encoding for c in curves):
        chosen = [c for c in curves if c.encoding == encoding]
        listed = cells(chosen)
        if encoding in GAIN_BARS:
            gain = geometric_mean(c.gain for c in listed)
            text = f"{encoding}, gain"
            lines.append(harness.bar(text, gain, GAIN_BARS[encoding], at_least=True))
        if encoding in BYTES_BARS:
            size = float(np.mean([c.bytes for c in chosen]))
            lines.append(harness.bar(f"{encoding}, bytes", size, BYTES_BARS[encoding]))
        if encoding != COARSE:
            worst = min(c.gain for c in listed)
            text = f"{encoding}, smallest gain"
            lines.append(harness.bar(text, worst, WORST_GAIN_BAR, at_least=True))
        for factor, share in ((1.5, 0.9), (2.5, 1.0)):
            text = f"{encoding}, share predicted within {factor} ×"
            lines.append(harness.bar(text, within(listed, factor), share, at_least=True))
    return lines


def _compact(curves: Sequence[Curve], effects: Sequence[Effect]) -> dict[str, Any]:
    """Raw numbers to three digits; of the paper's solve no predictions."""
    rows: dict[str, Any] = {}
    for c in curves:
        key = f"{c.run} {c.when} {c.times} {c.encoding} {c.method}"
        rows[key] = {"bytes": _short(c.bytes), "error": [_short(e) for e in c.error]}
        if c.method == "kriging":
            rows[key]["predicted"] = [_short(e) for e in c.predicted]
    return {
        "errors": rows,
        "effects": {
            f"{e.run} {e.encoding} {e.method} {e.sigma_rel:g}": [
                _short(value) for value in (e.loss, e.loss_change, e.output_change)
            ]
            for e in effects
        },
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    from benchmarks.training_runs import RUNS

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, help="where recordings are kept (default: nowhere)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=list(ENCODINGS))
    parser.add_argument("--times", nargs="+", type=int, choices=TIMES, default=list(TIMES))
    parser.add_argument("--quick", action="store_true", help="two short runs, to see that it works")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    started = harness.machine()
    runs, numbers = arguments.runs, arguments.times
    if arguments.quick:
        runs, numbers = runs[:2], numbers[:1]
    # What everything is compared with is always measured.
    encodings = list(dict.fromkeys([*arguments.encodings, REFERENCE]))

    one = partial(measure_run, numbers=numbers, encodings=encodings)
    steps = 64 if arguments.quick else None
    measured = of_each_run(one, runs, arguments.dir, steps, arguments.workers)
    curves = [c for of_run, _ in measured for c in of_run]
    effects = [e for _, of_run in measured for e in of_run]

    print(report(curves, effects, bars=not arguments.quick))
    everything = runs == list(RUNS) and set(encodings) == set(ENCODINGS) and numbers == list(TIMES)
    if everything and not arguments.quick:
        settings = {"targets": TARGETS, "tracks": TRACKS, "runs": runs}
        path = harness.save("reconstruct_accuracy", settings, started, _compact(curves, effects))
        print(f"\nraw numbers: {path}")


if __name__ == "__main__":
    main()
