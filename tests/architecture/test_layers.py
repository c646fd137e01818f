"""Imports point one way, and frameworks stay where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ROOT
from import_graph import foreign_imports, layer_violations, private_imports

# Lowest first. A module imports only from layers below its own; `cli` counts as one module.
LAYERS = [
    ["errors", "quadrature", "blocks", "digests", "memory", "boxes", "workers", "ahead", "places"],
    ["native", "draft"],
    ["conversion", "encoding"],
    ["profiles", "arrays", "tensorfile", "kernels", "importing.region"],
    ["schedule", "movement", "reading", "journal", "profile_text", "importing.foreign"],
    ["parts", "locking", "kriging", "tracker_state"],
    ["snapshot_file"],
    [
        *("solve", "chain", "consistency", "snapshot_writing", "sinks", "export", "request"),
        "trackers.base",
    ],
    ["evidence", "streaming", "parts_writing", "partition", "loading"],
    ["prediction", "removal"],
    ["reencode", "folder"],
    ["deletion"],
    ["snapshots"],
    ["choice", "importing.pickle_data", "importing.layout"],
    ["importing.torch_data"],
    ["importing.state_dict", "importing.edm2"],
    ["importing.checkpoints", "importing.ema_pytorch"],
    ["importing.recognise"],
    ["importing.write", "importing.__init__"],
    [
        "reconstruct",
        "convert",
        "selection",
        "trackers.numpy",
        "trackers.torch_sharded",
        "trackers.torch_ranks",
        "trackers.__init__",
    ],
    ["trackers.torch_model"],
    ["trackers.torch_plan"],
    ["forecast", "planning", "thinning", "evaluations", "trackers.torch", "trackers.jax"],
    ["sweep", "plots", "plan", "pruning", "trackers.pick"],
    ["recording"],
    ["ema"],
    ["cli", "cli.*"],
    ["integrations.__init__", "integrations.loop", "integrations.state_file"],
    ["integrations.pretrained", "integrations.jax"],
    [f"integrations.{name}" for name in ("lightning", "transformers", "diffusers", "optax")],
    ["__init__", "__main__"],
]

# What no layer forbids, and would be wrong: tracking knows nothing of reconstruction, and the
# command line runs where no framework is installed.
NEVER = [
    ("trackers.*", "reconstruct"), ("ema", "reconstruct"), ("ema", "solve"),
    ("recording", "reconstruct"),
    ("cli*", "trackers*"), ("cli*", "ema"), ("plots", "trackers*"), ("sweep", "trackers*"),
]  # fmt: skip

# Each third party with the files that need it. Only numpy is loaded by `import posthoc_ema`.
HOMES = {
    "numpy": ["*"],
    "scipy": ["sweep"],
    "safetensors": ["tensorfile"],
    "ml_dtypes": ["encoding"],
    "xxhash": ["digests"],
    "tqdm": ["convert", "importing.write", "reconstruct", "sweep", "cli.*"],
    "click": ["cli", "cli.*"],
    "fsspec": ["places"],
    "matplotlib": ["plots"],
    "torch": [
        "arrays",
        "export",
        "trackers.torch*",
        "integrations.state_file",
        "integrations.pretrained",
        "integrations.diffusers",
    ],
    "jax": ["arrays", "trackers.jax", "integrations.jax", "integrations.optax"],
    "transformers": ["integrations.transformers"],
    "optax": ["integrations.optax"],
}

PACKAGE = ROOT / "posthoc_ema"
PUBLIC = (Path(__file__).parent / "public_names.txt").read_text(encoding="utf-8").split()
USERS = [ROOT / "reference_model"]


def test_imports_point_downwards() -> None:
    problems = layer_violations(PACKAGE, LAYERS, NEVER)
    assert not problems, "\n".join(problems)


def test_third_parties_stay_at_home() -> None:
    problems = foreign_imports(PACKAGE, HOMES)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("user", USERS, ids=lambda path: path.name)
def test_users_import_public_names(user: Path) -> None:
    assert private_imports(user, "posthoc_ema", PUBLIC) == []


def _package(folder: Path, module: str, source: str) -> Path:
    """A package of one offending module, and the modules that it may refer to."""
    package = folder / "posthoc_ema"
    for name in ("__init__", "errors", "solve", "reconstruct", "ema", "trackers/__init__",
                 "trackers/base", "trackers/torch", "cli/__init__"):  # fmt: skip
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (package / f"{module}.py").write_text(source, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        (
            "errors",
            "from posthoc_ema.solve import solve",
            "errors, line 1, imports posthoc_ema.sol",
        ),
        ("solve", "import posthoc_ema.ema", "not in a lower layer"),
        ("solve", "def f():\n    from posthoc_ema import ema", "solve, line 2"),
        (
            "solve",
            "from posthoc_ema import solve as solve_it, anything",
            "(anything), which is not",
        ),
        ("solve", "from . import ema", "imports posthoc_ema.ema"),
        (
            "trackers/base",
            "from ..reconstruct import reconstruct",
            "imports posthoc_ema.reconstruct",
        ),
        ("trackers/torch", "from .. import reconstruct", "which it must never do"),
        ("cli/prune", "def f():\n    import posthoc_ema.trackers.torch", "which it must never do"),
        ("cli/prune", "from posthoc_ema.ema import EMA", "which it must never do"),
        ("invented", "", "invented is in no layer; add it to LAYERS"),
    ],
)
def test_a_wrong_direction_is_noticed(
    tmp_path: Path, module: str, source: str, message: str
) -> None:
    problems = layer_violations(_package(tmp_path, module, source), LAYERS, NEVER)
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    "source",
    [
        "from posthoc_ema.errors import StateError",
        "from posthoc_ema import errors",
        "from .errors import StateError",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from posthoc_ema.ema import EMA",
    ],
)
def test_a_right_direction_is_let_through(tmp_path: Path, source: str) -> None:
    assert layer_violations(_package(tmp_path, "solve", source), LAYERS, NEVER) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("solve", "import torch"),
        ("solve", "def f():\n    import torch.nn as nn"),
        ("ema", "from jax.tree_util import tree_map"),
        ("solve", "from safetensors.numpy import save_file"),
        ("solve", "import reference_model"),
        ("solve", "from tests.helpers import assert_close"),
        ("solve", "import an_undeclared_dependency"),
    ],
)
def test_a_stray_third_party_is_noticed(tmp_path: Path, module: str, source: str) -> None:
    (problem,) = foreign_imports(_package(tmp_path, module, source), HOMES)
    assert "is not at home there" in problem


@pytest.mark.parametrize(
    "source",
    [
        "from posthoc_ema.solve import solve",
        "import posthoc_ema.solve",
        "import posthoc_ema",
        "def f():\n    from posthoc_ema import _private",
        "from posthoc_ema import snapshots",
    ],
)
def test_a_private_import_is_noticed(tmp_path: Path, source: str) -> None:
    user = tmp_path / "reference_model"
    user.mkdir()
    (user / "train.py").write_text(source, encoding="utf-8")
    assert len(private_imports(user, "posthoc_ema", PUBLIC)) == 1
