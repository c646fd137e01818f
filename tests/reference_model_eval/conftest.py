"""One tiny finished demo, and one ablation, for all tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_ablation import PLAN, in_process

from reference_model.ablate import JUDGE, ablate
from reference_model.demo import demo
from reference_model.train import train


@pytest.fixture(scope="session")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: tests that write take `run_dir`."""
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    demo(run_dir, quick=True, progress=False)
    return run_dir


@pytest.fixture
def run_dir(finished_demo: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(finished_demo, tmp_path / "run"))


@pytest.fixture(scope="session")
def finished_ablation(finished_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs made here, the fourth by `ablate` itself. Read only."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    (out / JUDGE).mkdir(parents=True)
    for pattern in ("classifier-*", "reference-*"):  # the digits' own, seconds to train
        for path in finished_demo.glob(pattern):
            shutil.copy(path, out / JUDGE)
    *first, last = PLAN.runs(out)
    for run in first:
        in_process(run, PLAN, out)
    # Interrupted in the middle of training.
    train(last.config, last.run_dir, progress=False, stop_at=64)
    assert ablate(PLAN, out, jobs=1, progress=False) == []
    return out


@pytest.fixture
def out(finished_ablation: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(finished_ablation, tmp_path / "out"))
