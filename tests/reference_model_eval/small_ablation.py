"""An ablation of two variants and two seeds that takes seconds."""

from __future__ import annotations

from pathlib import Path

from reference_model.ablate import JUDGE, AblationPlan, AblationRun, Variant
from reference_model.ablate_worker import work
from reference_model.protocol import Protocol

PLAN = AblationPlan(
    "digits-tiny",
    (Variant("D"), Variant("G")),
    (0, 1),
    nimg=128,
    sigma_rels=(0.05, 0.2),
    protocol=Protocol(images=40, repeats=2, num_steps=1, batch_size=40),
)
OPTIONS = (
    *("--preset", "digits-tiny", "--configs", "D,G", "--seeds", "2", "--total-nimg", "128"),
    *("--sigma-rel", "0.05,0.2", "--images", "40", "--repeats", "2", "--num-steps", "1"),
    *("--batch-size", "40", "--quiet"),
)
"""The same plan on the command line."""


def in_process(run: AblationRun, plan: AblationPlan, out: Path) -> None:
    """What a worker does, without the seconds that a process takes to start."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    settings = run.job(plan, out / JUDGE).settings
    assert work({**settings, "run_dir": str(run.run_dir), "threads": 1}) == 0
