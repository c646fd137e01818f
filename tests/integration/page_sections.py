"""Sections of docs/integrations.md, and examples: each run where its framework is loaded."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

from docs_examples import PYTHON, read_blocks
from helpers import ROOT

PAGE = ROOT / "docs" / "integrations.md"
EXAMPLES = ROOT / "examples"

# Every section with code, and the tests that run it.
SECTIONS = {
    "PyTorch": "test_torch_loops",
    "PyTorch Lightning": "test_lightning",
    "transformers.Trainer": "test_transformers",
    "accelerate and diffusers": "test_diffusers",
    "PEFT and LoRA": "test_diffusers",
    "JAX and Optax": "test_jax_loops",
    "Flax NNX": "test_jax_loops",
    "Equinox": "test_jax_loops",
    "numpy": "test_torch_loops",
}


def sections_with_code() -> list[str]:
    """Headings of the page under which Python blocks stand."""
    headings = _headings()
    return [name for name, lines in headings.items() if _blocks(lines)]


def run_section(heading: str) -> int:
    """Run the Python blocks of one section in the current folder; returns how many."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    blocks = _blocks(_headings()[heading])
    for block in blocks:
        source = "\n" * (block.line - 1) + block.code
        exec(compile(source, str(PAGE), "exec"), namespace)
    return len(blocks)


def run_example(name: str, folder: Path) -> dict[Any, float]:
    """Run an example's main; its losses by EMA length, that of the raw weights under None."""
    losses: dict[Any, float] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](str(folder))
    return losses


def assert_averaging_helped(losses: dict[Any, float]) -> None:
    """Raise unless the best length beats the raw weights, as the example wants to show."""
    if not min(loss for length, loss in losses.items() if length) < losses[None]:
        raise AssertionError(f"no average is better than the raw weights: {losses}")


def _headings() -> dict[str, range]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [
        (k + 1, match[1]) for k, line in enumerate(lines) if (match := re.match("## (.+)", line))
    ]
    ends = [*(start for start, _ in found[1:]), len(lines) + 1]
    return {name: range(start, end) for (start, name), end in zip(found, ends, strict=True)}


def _blocks(lines: range) -> list[Any]:
    return [
        b for b in read_blocks(PAGE) if b.line in lines and b.language in PYTHON and not b.excuse
    ]
