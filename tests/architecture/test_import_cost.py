"""`import posthoc_ema` loads numpy, and nothing else that was installed."""

from __future__ import annotations

import tempfile

import pytest
from helpers import run_python

FRAMEWORKS = {"torch", "jax", "scipy", "matplotlib", "ml_dtypes"}
IMPORT_SECONDS = 0.15


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement adds to those of bare numpy, standard library apart."""
    printed = run_python(
        "-c",
        "import sys, numpy; before = set(sys.modules)\n"
        f"{statement}\n"
        "tops = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(tops - set(sys.stdlib_module_names)))",
    )
    return set(printed.split())


def test_only_numpy_is_loaded() -> None:
    assert loaded_by("import posthoc_ema") - {"numpy"} == {"posthoc_ema"}


@pytest.mark.parametrize("stray", ["click", "tqdm", "safetensors", "scipy"])
def test_more_is_noticed(stray: str) -> None:
    assert loaded_by(f"import posthoc_ema, {stray}") - {"numpy"} != {"posthoc_ema"}


def test_core_work_needs_no_framework() -> None:
    """Solving, tracking numpy arrays, writing and reconstructing snapshots."""
    loaded = loaded_by(
        "import tempfile, numpy as np\n"
        "from posthoc_ema import EMA, reconstruct, solve\n"
        "solve([(1, 0.05), (2, 0.05)], (2, 0.1))\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    ema = EMA(snapshots=folder, every=2)\n"
        "    for step in range(4):\n"
        "        ema.update({'w': np.full(3, float(step))})\n"
        "    reconstruct(folder, sigma_rel=0.07).state_dict()\n"
    )
    assert loaded & FRAMEWORKS == set()


def test_command_line_needs_no_framework() -> None:
    assert loaded_by("import posthoc_ema.cli") & FRAMEWORKS == set()


def test_frameworks_are_noticed() -> None:
    """matplotlib for all of them: it is the quickest to load."""
    assert loaded_by("import posthoc_ema.cli, matplotlib") & FRAMEWORKS == {"matplotlib"}


def import_seconds(statement: str, enough: float) -> float:
    """Processor time of a statement after `import numpy`: the first of three below ``enough``.

    Processor time, not that of the clock, and several chances: what other processes do on the
    machine shall not decide; nor shall compiling the sources, which a user's second start spares.
    """
    code = (
        "import time, numpy; start = time.process_time()\n"
        f"{statement}\n"
        "print(time.process_time() - start)"
    )
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        cached = f"import sys; sys.pycache_prefix, sys.dont_write_bytecode = {folder!r}, False\n"
        run_python("-c", f"{cached}{code}")
        for _ in range(3):
            seconds = float(run_python("-c", f"{cached}{code}"))
            if seconds < enough:
                break
    return seconds


def test_import_is_quick() -> None:
    assert import_seconds("import posthoc_ema", IMPORT_SECONDS) < IMPORT_SECONDS


def test_slow_import_is_noticed() -> None:
    slow = "import posthoc_ema\nwhile time.process_time() - start < 0.2: pass"
    assert import_seconds(slow, IMPORT_SECONDS) > IMPORT_SECONDS
