"""Published code is executed code: README, documentation pages and docstrings."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import pytest
from docs_examples import PYTHON, SHELL, Block, read_blocks, shell_commands
from helpers import ROOT, run_python

import posthoc_ema
from reference_model.cli import main as reference_cli

# That on integrations runs section by section, where each framework is loaded: page_sections.py.
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.name != "integrations.md"
]


def run_page(path: Path) -> int:
    """Run all blocks of a page in the current folder; returns how many Python blocks ran."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for block in read_blocks(path):
        if block.excuse is not None:
            continue
        if block.language in PYTHON:
            # Empty lines in front, so that a traceback names the line of the page.
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, str(path), "exec"), namespace)
            count += 1
        elif block.language in SHELL:
            check_commands(path, block)
    return count


def check_commands(path: Path, block: Block) -> None:
    """Run the commands of this project; of others, see that what they name exists."""
    for words in shell_commands(block):
        name, rest = words[0], words[1:]
        place = f"{path.name}, line {block.line}: `{' '.join(words)}`"
        if name == "posthoc-ema":
            # As a shell does; words that match nothing stay.
            rest = [found for word in rest for found in sorted(glob(word)) or [word]]
            run_python("-m", "posthoc_ema", *rest)
        elif name == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            unknown = {word for word in rest if "=" not in word} - set(targets)
            assert not unknown, f"{place}: the Makefile has no target {unknown}"
        elif name in ("python", "python3") and rest[:1] == ["-m"]:
            assert importlib.util.find_spec(rest[1]), f"{place}: no module {rest[1]}"
            if rest[1] == "reference_model":
                unknown = unknown_options(rest[2:])
                assert not unknown, f"{place}: there is no {', '.join(unknown)}"
        elif name in ("python", "python3"):
            assert (ROOT / rest[0]).is_file(), f"{place}: no file {rest[0]}"
        else:
            assert name in ("pip", "git", "cd"), f"{place}: test_docs.py does not know {name}"


def unknown_options(words: list[str]) -> list[str]:
    """What a command line of the reference model names that does not exist."""
    if not words:
        return []
    command = reference_cli.commands.get(words[0])
    if command is None:
        return words[:1]
    known = {"--help"}.union(*(p.opts + p.secondary_opts for p in command.params))
    options = (word.split("=")[0] for word in words[1:] if word.startswith("--"))
    return [option for option in options if option not in known]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(path)


def test_readme_shows_running_code() -> None:
    shown = [b for b in read_blocks(ROOT / "README.md") if b.language in PYTHON and not b.excuse]
    assert shown, "the README has no Python block that runs"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nx = 1\n```\n```python\nassert x == 2\n```", AssertionError),
        ("```python\nfrom posthoc_ema import a_name_that_is_gone\n```", ImportError),
        ("<!-- setup\nraise ValueError\n-->", ValueError),
        ("```bash\nposthoc-ema an-unknown-command\n```", AssertionError),
        ("```console\n$ posthoc-ema list nowhere\n```", AssertionError),
        ("```bash\nmake an-unknown-target\n```", AssertionError),
        ("```bash\npython examples/gone.py\n```", AssertionError),
        ("```bash\npython -m reference_model_gone\n```", AssertionError),
        ("```bash\npython -m reference_model an-unknown-command\n```", AssertionError),
        ("```bash\npython -m reference_model generate --an-unknown-option 1\n```", AssertionError),
        ("```bash\nsomething-else\n```", AssertionError),
        ("```python\nx = 1\n", ValueError),
    ],
)
def test_stale_pages_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: type[Exception]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        run_page(page)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<!-- setup\nx = 1\n-->\nText.\n```python\nassert x == 1\n```", 2),
        ("<!-- not run: needs a GPU -->\n```python\n1 / 0\n```", 0),
        ("```\nplain text\n```\n```json\n{}\n```", 0),
        ("```bash\n# a comment\nmake test\npip install x\npython -m reference_model\n```", 0),
        ("```console\n$ posthoc-ema --help\nUsage: whatever it prints\n```", 0),
    ],
)
def test_good_pages_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, count: int
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run_page(page) == count


INTEGRATIONS = "posthoc_ema.integrations."

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(posthoc_ema.__path__, "posthoc_ema.")
    # Loading every framework would take a minute: the tests of each run their examples.
    if not info.name.endswith("__main__") and not info.name.startswith(INTEGRATIONS)
)


def failed_examples(module: Any) -> tuple[int, str]:
    """How many examples of a module's docstrings ran, and what the failing ones printed."""
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=report.append)
    results = runner.summarize(verbose=False)
    return results.attempted, "".join(report)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, report = failed_examples(importlib.import_module(name))
    assert not report, report


def test_there_are_examples() -> None:
    """A skipped example is no example: the core has some that run."""
    for name in ("conversion", "profiles", "schedule", "solve", "ema"):
        attempted, _ = failed_examples(importlib.import_module(f"posthoc_ema.{name}"))
        assert attempted > 0, f"posthoc_ema.{name} has no example that runs"


def stale() -> None:
    """Add.

    Example:
        >>> 1 + 1
        3
    """


def fresh() -> None:
    """Add.

    Example:
        >>> 1 + 1
        2
    """


@pytest.mark.parametrize(("example", "fails"), [(stale, True), (fresh, False)])
def test_stale_examples_are_noticed(example: Callable[[], None], fails: bool) -> None:
    _, report = failed_examples(example)
    assert bool(report) == fails
