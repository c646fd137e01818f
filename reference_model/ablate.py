"""Train variants of the network under the same conditions and measure each: an ablation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from reference_model.ablate_pool import Failure, Job, run_jobs
from reference_model.checkpoint import STATS_FILE, RunDirError, load_config
from reference_model.configs import TrainConfig, check_lengths
from reference_model.ladder import (
    HABITS,
    INGREDIENTS,
    LADDER,
    check_leave_out,
    leave_out,
    with_config,
)
from reference_model.presets import preset
from reference_model.protocol import LENGTHS, Protocol
from reference_model.stats import last_nimg
from reference_model.sweep_record import DISTANCE, SWEEP_FILE, load_record

JUDGE = "judge"
"""Folder of an ablation with the classifier and the features of real images that all runs share."""


@dataclass(frozen=True)
class Variant:
    """A config of the ladder, without some of its ingredients or whole.

    Attributes:
        config: One of `HABITS`: of the ladder, or beside it.
        leave_out: Some of `INGREDIENTS`.
    """

    config: str
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.config not in HABITS:
            raise ValueError(f"config must be one of {', '.join(HABITS)} (got {self.config!r})")
        check_leave_out(self.config, self.leave_out)

    @property
    def name(self) -> str:
        """Short name, as `G` or `G-pixel_norm`."""
        return "-".join((self.config, *self.leave_out))

    @property
    def about(self) -> str:
        """What it is, in words."""
        if not self.leave_out:
            return LADDER.get(self.config, "unit scaling, beside the ladder")
        return "without " + "; ".join(INGREDIENTS[name][1] for name in self.leave_out)

    def has(self, ingredient: str) -> bool:
        """Whether one of `INGREDIENTS` is part of it."""
        try:
            check_leave_out(self.config, (ingredient,))
        except ValueError:
            return False
        return ingredient not in self.leave_out


@dataclass(frozen=True)
class AblationPlan:
    """What an ablation trains and measures.

    Attributes:
        preset: Training config by name; all variants share its data and its number of images.
        variants: What to compare.
        seeds: Each variant is trained once with each.
        nimg: Length of training in images; `None`: the preset's. Another length than the preset's
            stretches its schedule, and all its intervals, in proportion. It is rounded down to
            whole steps of all variants.
        data: Data set instead of the preset's.
        sigma_rels: EMA lengths to measure; each variant's best is one of them.
        fixed_sigma_rel: The one length at which all variants are compared beside their own best.
        protocol: How each is measured.
    """

    preset: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0,)
    nimg: int | None = None
    data: str | None = None
    sigma_rels: tuple[float, ...] = LENGTHS
    fixed_sigma_rel: float = 0.1
    protocol: Protocol = field(default_factory=Protocol)

    def __post_init__(self) -> None:
        for what, values in (("variants", self.variants), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{what} must name at least one, each once (got {values})")
        check_lengths(self.lengths)
        if self.total_nimg == 0:
            raise ValueError(
                f"{self.nimg or preset(self.preset).total_nimg:,} images are less than one step of "
                f"all variants: their batches meet at multiples of {self._whole_steps():,} images"
            )

    @property
    def lengths(self) -> tuple[float, ...]:
        """All EMA lengths to measure, the fixed one among them."""
        return tuple(sorted({*self.sigma_rels, self.fixed_sigma_rel}))

    @property
    def total_nimg(self) -> int:
        """Images that every run is trained on."""
        wanted = preset(self.preset).total_nimg if self.nimg is None else self.nimg
        return wanted // self._whole_steps() * self._whole_steps()

    def config(self, variant: Variant, seed: int) -> TrainConfig:
        """Training config of one run."""
        base = preset(self.preset)
        stretch = self.total_nimg / base.total_nimg

        def interval(nimg: int) -> int:
            return max(round(nimg * stretch), 1)

        base = replace(
            base,
            data=self.data or base.data,
            seed=seed,
            total_nimg=self.total_nimg,
            ref_batches=base.ref_batches * stretch,
            rampup_nimg=round(base.rampup_nimg * stretch),
            snapshot_nimg=interval(base.snapshot_nimg),
            checkpoint_nimg=interval(base.checkpoint_nimg),
            stats_nimg=interval(base.stats_nimg),
            magnitudes_nimg=interval(base.magnitudes_nimg),
        )
        return leave_out(with_config(base, variant.config), variant.leave_out)

    def runs(self, out: str | os.PathLike[str]) -> list[AblationRun]:
        """All runs with their directories, seed by seed: early reports have all variants."""
        return [
            AblationRun(v, seed, Path(out) / f"{v.name}-seed{seed}", self.config(v, seed))
            for seed in self.seeds
            for v in self.variants
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for records."""
        return {
            **asdict(self),
            "variants": [v.name for v in self.variants],
            "total_nimg": self.total_nimg,
        }

    def _whole_steps(self) -> int:
        base = preset(self.preset)
        return math.lcm(*(with_config(base, v.config).batch_size for v in self.variants))


@dataclass(frozen=True)
class AblationRun:
    """One variant trained with one seed.

    Attributes:
        variant: What is trained.
        seed: Of all its random numbers.
        run_dir: Where; an ordinary run for `sweep`, `generate` and `report`.
        config: What it is started with.
    """

    variant: Variant
    seed: int
    run_dir: Path
    config: TrainConfig

    @property
    def name(self) -> str:
        """Name of its directory."""
        return self.run_dir.name

    def is_finished(self, plan: AblationPlan) -> bool:
        """Whether everything of it that the plan asks for was trained and measured.

        Raises:
            RunDirError: If a file of it cannot be understood.
        """
        return self.measured(plan) == len(plan.lengths) + 1 and (
            load_config(self.run_dir).to_dict() == self.config.to_dict()
        )

    def measured(self, plan: AblationPlan) -> int:
        """How many of its sets of weights were measured: EMA lengths, and the raw weights."""
        if not (self.run_dir / SWEEP_FILE).exists():
            return 0
        record = load_record(self.run_dir)
        if record is None or record.settings["protocol"] != asdict(plan.protocol):
            return 0
        found = {
            m.sigma_rel
            for m in record.imaged
            if m.point.plain and m.point.t == plan.total_nimg and DISTANCE in m.scores
        }
        return len(found & {None, *plan.lengths})

    def job(self, plan: AblationPlan, judge_dir: Path) -> Job:
        """What a worker needs to know."""
        return Job(
            self.name,
            self.run_dir,
            {
                "config": self.config.to_dict(),
                "sigma_rels": plan.lengths,
                "protocol": asdict(plan.protocol),
                "judge_dir": str(judge_dir.resolve()),
            },
        )


def leave_one_out(config: str, names: Iterable[str] | None = None) -> tuple[Variant, ...]:
    """A config whole, and without each ingredient in turn.

    Args:
        config: One of `LADDER`.
        names: The ingredients; `None`: all that it has.

    Raises:
        ValueError: If the config does not have one of them.
    """
    whole = Variant(config)
    chosen = [n for n in INGREDIENTS if whole.has(n)] if names is None else list(names)
    return (whole, *(Variant(config, (name,)) for name in chosen))


def ablate(
    plan: AblationPlan,
    out: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    progress: bool = True,
) -> list[Failure]:
    """Train and measure all runs of a plan that are not finished yet, several at a time.

    Every run is a process of its own, so that one that fails leaves the others alone. What is
    finished is not done again; an interrupted run goes on from its checkpoint. All runs are
    measured with one classifier.

    Args:
        plan: What to train and measure.
        out: Directory of the ablation.
        jobs: Runs at a time, which share the CPU cores; `None`: one for each core.
        progress: Whether to show progress.

    Returns:
        The runs that failed, each with its log; empty if all went well.

    Raises:
        ValueError: If the data set cannot be judged, or a run's files cannot be understood.
        StoppedError: If asked to stop by SIGTERM or Ctrl-C; the same call goes on from there.
    """
    out = Path(out)
    runs = plan.runs(out)
    open_runs = [run for run in runs if not _finished(run, plan)]
    if not open_runs:
        return []
    out.mkdir(parents=True, exist_ok=True)
    make_judge(plan, out, progress=progress)
    return run_jobs(
        [run.job(plan, out / JUDGE) for run in open_runs],
        parallel=jobs or cores(),
        threads=max(1, cores() // (jobs or cores())),
        total=len(runs) * (plan.total_nimg + (len(plan.lengths) + 1) * generated(plan)),
        done=Progress(plan, runs),
        progress=progress,
    )


class Progress:
    """Counts images trained on and generated so far, over all runs.

    Args:
        plan: What is trained and measured.
        runs: All of its runs.
    """

    def __init__(self, plan: AblationPlan, runs: Sequence[AblationRun]) -> None:
        self._plan, self._runs = plan, runs
        # Asked for every second, for every run: worked out once.
        self._trained, self._generated = plan.total_nimg, generated(plan)
        # Records hold all coefficients: they are read only when they have changed.
        self._measured: dict[Path, tuple[int, int]] = {}

    def __call__(self) -> int:
        """The number now."""
        return sum(self._of(run) for run in self._runs)

    def _of(self, run: AblationRun) -> int:
        path = run.run_dir / SWEEP_FILE
        changed = path.stat().st_mtime_ns if path.exists() else 0
        known = self._measured.get(path)
        if known is None or known[0] != changed:
            try:
                known = changed, run.measured(self._plan)
            except RunDirError:
                known = changed, 0  # its worker says what is wrong
            self._measured[path] = known
        measured = known[1]
        trained = self._trained if measured else last_nimg(run.run_dir / STATS_FILE)
        return trained + measured * self._generated


def generated(plan: AblationPlan) -> int:
    """Images that one set of weights is measured by."""
    return plan.protocol.repeats * plan.protocol.images


def make_judge(plan: AblationPlan, out: Path, *, progress: bool = True) -> None:
    """Train the classifier that all runs are measured with, unless it is there already."""
    from reference_model.judge import Judge

    config = plan.config(plan.variants[0], plan.seeds[0])
    Judge(config, plan.protocol, out / JUDGE, progress=progress)


def cores() -> int:
    """CPU cores that this process may use."""
    affinity: Sequence[int] | set[int] = getattr(
        os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1)
    )(0)
    return len(affinity)


def _finished(run: AblationRun, plan: AblationPlan) -> bool:
    try:
        return run.is_finished(plan)
    except RunDirError:
        return False  # its worker will say what is wrong, and leave the others alone
