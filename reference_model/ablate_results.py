"""What the runs of an ablation found: quality by EMA length and magnitudes, variant by variant."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference_model.ablate import AblationPlan, AblationRun, Variant
from reference_model.checkpoint import RunDirError
from reference_model.configs import TrainConfig
from reference_model.lr_schedule import learning_rate
from reference_model.magnitude_log import MAGNITUDES_FILE, by_level, read_magnitudes
from reference_model.metrics import mean_and_error
from reference_model.precond import Denoiser
from reference_model.sweep_record import SweepRecord, load_record

NEAR_BEST = 1.05
"""Lengths within this factor of the best distance count as good."""


@dataclass(frozen=True)
class Score:
    """A distance with its chance.

    Attributes:
        mean: Over seeds; over repeats where there is one seed.
        error: Standard error of it; NaN where it cannot be told.
    """

    mean: float
    error: float


@dataclass(frozen=True)
class Drift:
    """Magnitudes over training: means over the levels of the network, then over seeds.

    Attributes:
        nimg: Images seen at each record; the first is the step after initialisation.
        activation: Of activations.
        weight: Of stored weights.
        law: What stored weights follow if every update is orthogonal to them and has the RMS of
            the learning rate, √(1 + Σα²): for variants that normalise weights at use and leave
            stored ones alone; empty for others.
    """

    nimg: tuple[int, ...] = ()
    activation: tuple[float, ...] = ()
    weight: tuple[float, ...] = ()
    law: tuple[float, ...] = ()

    def growth(self, field: str, since: float = 0.0) -> float:
        """Last value of `activation`, `weight` or `law`, relative to one earlier in training.

        Args:
            field: Which.
            since: Part of training after which the earlier one was recorded.
        """
        values: tuple[float, ...] = getattr(self, field)
        if not values:
            return math.nan
        start = next(i for i, nimg in enumerate(self.nimg) if nimg >= since * self.nimg[-1])
        return values[-1] / values[start] if values[start] else math.nan


@dataclass(frozen=True)
class Outcome:
    """One variant.

    Attributes:
        variant: What was trained.
        parameters: Of the network, without the uncertainty head.
        batch_size: Images of a step.
        lr: Highest learning rate.
        seeds: Those whose runs are finished.
        lengths: EMA lengths measured.
        distances: Fréchet distance for each length: of each seed, or of each repeat of one seed.
        raw: The same of the raw weights.
        best_by_seed: Best length of each seed.
        drift: Magnitudes over training.
    """

    variant: Variant
    parameters: int
    batch_size: int
    lr: float
    seeds: tuple[int, ...]
    lengths: tuple[float, ...]
    distances: tuple[tuple[float, ...], ...]
    raw: tuple[float, ...]
    best_by_seed: tuple[float, ...]
    drift: Drift

    @property
    def name(self) -> str:
        """The variant's."""
        return self.variant.name

    @property
    def curve(self) -> tuple[Score, ...]:
        """Score for each length."""
        return tuple(Score(*mean_and_error(values)) for values in self.distances)

    @property
    def best_sigma_rel(self) -> float:
        """Length of the lowest mean distance."""
        return min(zip(self.lengths, self.curve, strict=True), key=lambda pair: pair[1].mean)[0]

    @property
    def best(self) -> Score:
        """Score at the variant's own best length."""
        return self.at(self.best_sigma_rel)

    @property
    def best_at_edge(self) -> bool:
        """Whether the best is the shortest or longest measured, so that another may be better."""
        return self.best_sigma_rel in (self.lengths[0], self.lengths[-1])

    @property
    def good_lengths(self) -> tuple[float, float]:
        """Shortest and longest length, next to the best, within `NEAR_BEST` of it."""
        good = [score.mean <= NEAR_BEST * self.best.mean for score in self.curve]
        low = high = self.lengths.index(self.best_sigma_rel)
        while low > 0 and good[low - 1]:
            low -= 1
        while high + 1 < len(good) and good[high + 1]:
            high += 1
        return self.lengths[low], self.lengths[high]

    @property
    def worst_sigma_rel(self) -> float:
        """Length of the highest mean distance."""
        return max(zip(self.lengths, self.curve, strict=True), key=lambda pair: pair[1].mean)[0]

    def at(self, sigma_rel: float) -> Score:
        """Score at a length that was measured."""
        return self.curve[self.lengths.index(sigma_rel)]

    def cost(self, sigma_rel: float) -> float:
        """How many times the best distance another length has."""
        return self.at(sigma_rel).mean / self.best.mean if self.best.mean else math.nan

    def to_dict(self, fixed_sigma_rel: float) -> dict[str, Any]:
        """Everything, derived numbers included, as plain data without NaN."""
        good = self.good_lengths
        return _finite(
            {
                "name": self.name,
                **asdict(self.variant),
                "about": self.variant.about,
                "parameters": self.parameters,
                "batch_size": self.batch_size,
                "learning_rate": self.lr,
                "seeds": self.seeds,
                "best": {
                    "sigma_rel": self.best_sigma_rel,
                    **asdict(self.best),
                    "at_edge": self.best_at_edge,
                    "by_seed": self.best_by_seed,
                    "good_from": good[0],
                    "good_to": good[1],
                },
                "fixed": {
                    "sigma_rel": fixed_sigma_rel,
                    **asdict(self.at(fixed_sigma_rel)),
                    "cost": self.cost(fixed_sigma_rel),
                },
                "worst": {
                    "sigma_rel": self.worst_sigma_rel,
                    "cost": self.cost(self.worst_sigma_rel),
                },
                "raw": asdict(Score(*mean_and_error(self.raw))),
                "curve": [
                    {"sigma_rel": s, **asdict(score), "distances": values}
                    for s, score, values in zip(
                        self.lengths, self.curve, self.distances, strict=True
                    )
                ],
                "magnitudes": asdict(self.drift),
            }
        )


def gather(plan: AblationPlan, out: str | os.PathLike[str]) -> list[Outcome]:
    """Read the finished runs of an ablation.

    Args:
        plan: What was asked for.
        out: Directory of the ablation.

    Returns:
        Variants in the order of the plan; those without a finished run are left out.

    Raises:
        RunDirError: If runs were measured by different classifiers, so that their distances
            cannot be compared.
    """
    finished: dict[str, list[tuple[AblationRun, SweepRecord]]] = {}
    digests: dict[str, str] = {}
    for run in plan.runs(out):
        try:
            if not run.is_finished(plan):
                continue
            record = load_record(run.run_dir)
        except RunDirError:
            continue  # reported as failed where it was tried
        assert record is not None  # it is finished
        digests.setdefault(record.settings["judge"]["digest"], run.name)
        finished.setdefault(run.variant.name, []).append((run, record))
    if len(digests) > 1:
        raise RunDirError(
            f"runs of {out} were measured by different classifiers ({', '.join(digests.values())} "
            "first), so that their distances cannot be compared; remove sweep.json and "
            "classifier-*.safetensors of all runs to measure them anew"
        )
    return [
        _outcome(v, finished[v.name], plan.lengths) for v in plan.variants if v.name in finished
    ]


def _outcome(
    variant: Variant,
    runs: Sequence[tuple[AblationRun, SweepRecord]],
    lengths: tuple[float, ...],
) -> Outcome:
    """Put the seeds of one variant together."""

    def values(sigma_rel: float | None) -> list[tuple[float, ...]]:
        return [
            m.distances
            for run, record in runs
            for m in record.imaged
            if m.point.plain and m.sigma_rel == sigma_rel and m.point.t == run.config.total_nimg
        ]

    def pooled(of_seeds: list[tuple[float, ...]]) -> tuple[float, ...]:
        # Repeats of one run share its training: between seeds lies more than between them.
        if len(of_seeds) == 1:
            return of_seeds[0]
        return tuple(float(np.mean(repeats)) for repeats in of_seeds)

    curves = [values(s) for s in lengths]
    by_seed = np.array([[np.mean(repeats) for repeats in of_seeds] for of_seeds in curves])
    config = runs[0][0].config
    return Outcome(
        variant,
        count_parameters(config),
        config.batch_size,
        config.ref_lr,
        tuple(run.seed for run, _ in runs),
        lengths,
        tuple(pooled(of_seeds) for of_seeds in curves),
        pooled(values(None)),
        tuple(lengths[i] for i in by_seed.argmin(axis=0)),
        _drift(variant, config, [run.run_dir for run, _ in runs]),
    )


def count_parameters(config: TrainConfig) -> int:
    """Number of a network's parameters without the uncertainty head, as the paper counts."""
    with torch.device("meta"):
        net = Denoiser(config.network)
    return sum(p.numel() for n, p in net.named_parameters() if not n.startswith("logvar."))


def _drift(variant: Variant, config: TrainConfig, run_dirs: Sequence[Path]) -> Drift:
    """Magnitudes that the runs recorded, at the images that all of them have."""
    logs = [
        {nimg: layers for nimg, _, layers in read_magnitudes(run_dir / MAGNITUDES_FILE)}
        for run_dir in run_dirs
    ]
    nimg = sorted(set.intersection(*(set(log) for log in logs)))

    def mean(field: str) -> tuple[float, ...]:
        return tuple(
            float(np.mean([value for log in logs for value in by_level(log[n], field).values()]))
            for n in nimg
        )

    free = variant.has("weight_norm") and not variant.has("forced_norm")
    return Drift(
        tuple(nimg), mean("activation"), mean("weight"), weight_law(config, nimg) if free else ()
    )


def weight_law(config: TrainConfig, nimg: Sequence[int]) -> tuple[float, ...]:
    """RMS of stored weights that begin with RMS one, if updates are orthogonal to them.

    Args:
        config: Its learning rates are the RMS of an update of Adam.
        nimg: Images seen after the steps whose weights, before the update, are asked for.

    Returns:
        √(1 + Σα²) over the updates before; √(1 + α²t) for a constant rate.

    Source:
        Karras et al. 2024, arXiv:2312.02696, Sec. 2.3 and App. B.4, on configs D and E.
    """
    starts = range(0, config.total_nimg, config.batch_size)
    squares = [
        learning_rate(
            n, config.batch_size, config.ref_lr, config.ref_batches, config.rampup_nimg
        ) ** 2
        for n in starts
    ]  # fmt: skip
    sums = np.concatenate([[0.0], np.cumsum(squares)])
    return tuple(float(np.sqrt(1 + sums[n // config.batch_size - 1])) for n in nimg)


def _finite(value: Any) -> Any:
    """Plain data with `None` for what is not a number."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
