"""One tiny finished demo for all tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reference_model.demo import demo


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
