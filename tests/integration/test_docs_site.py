"""The documentation site: links lead somewhere, and nothing public is left out."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ROOT
from page_links import anchors, dead_links, links

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REFERENCE = sorted((DOCS / "api").glob("*.md"))
PUBLIC = (ROOT / "tests/architecture/public_names.txt").read_text(encoding="utf-8").split()
INTEGRATIONS = ["lightning", "transformers", "diffusers", "optax", "jax", "pretrained"]


def documented() -> list[str]:
    """Every name that a page of the API describes."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE)
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


def place(name: str) -> str:
    """Of a public name in the reference, where `posthoc_ema.plan` is the module of that name."""
    own_module = (ROOT / "posthoc_ema" / f"{name}.py").exists()
    return f"posthoc_ema.{name}.{name}" if own_module else f"posthoc_ema.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_of_pages(page: Path) -> None:
    assert dead_links(page, DOCS) == []


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", "CHANGELOG.md"])
def test_links_of_other_files(page: str) -> None:
    assert dead_links(ROOT / page, ROOT) == []


def test_the_changelog_has_no_links_into_the_repository() -> None:
    """It is a page of the site too, where they would lead elsewhere."""
    assert [link for link in links(ROOT / "CHANGELOG.md") if not link.startswith("http")] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](gone.md)", "no such file"),
        ("![a](images/gone.png)", "no such file"),
        ("[`a`](gone.md)", "no such file"),
        ("[a](other.md#gone)", "no such heading"),
        ("[a](#gone)", "no such heading"),
        ("[a](../outside.md)", "outside of docs"),
        ("[a](other.md#a--b)", "no such heading"),  # Python-Markdown makes it a-b
    ],
)
def test_dead_links_are_noticed(tmp_path: Path, text: str, problem: str) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "other.md").write_text("# Other: a – b\n## A – b\n", encoding="utf-8")
    (tmp_path / "outside.md").write_text("# Outside\n", encoding="utf-8")
    (docs / "page.md").write_text(text, encoding="utf-8")
    (found,) = dead_links(docs / "page.md", docs)
    assert problem in found


def test_live_links_pass(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# `plan`: before training\n", encoding="utf-8")
    (tmp_path / "page.md").write_text(
        "# Here\n[a](other.md#plan-before-training) [b](#here) [c](https://example.org/x)\n"
        "`[d](code.md)`\n```\n[e](block.md)\n```\n<!-- [f](hidden.md) -->\n",
        encoding="utf-8",
    )
    assert dead_links(tmp_path / "page.md", tmp_path) == []
    assert anchors(tmp_path / "page.md") == {"here"}


def test_the_menu_names_every_page() -> None:
    menu = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_everything_public_is_in_the_reference() -> None:
    assert {place(name) for name in PUBLIC} <= set(documented())


@pytest.mark.parametrize("module", INTEGRATIONS)
def test_integrations_are_in_the_reference(module: str) -> None:
    """What users call: whatever the page on integrations imports from there."""
    text = (DOCS / "integrations.md").read_text(encoding="utf-8")
    path = f"posthoc_ema.integrations.{module}"
    imported = re.findall(rf"^from {re.escape(path)} import (.+)$", text, re.MULTILINE)
    assert imported
    names = {name for line in imported for name in line.split(", ")}
    assert {f"{path}.{name}" for name in names} <= set(documented())


def test_the_reference_names_each_thing_once() -> None:
    names = documented()
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", documented())
def test_the_reference_names_what_exists(name: str) -> None:
    module, _, member = name.rpartition(".")
    if module == "posthoc_ema":
        assert member in PUBLIC
        assert place(member) == name
        return
    # Read, not imported: that would load every framework.
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert member in {getattr(node, "name", None) for node in ast.parse(source).body}


# The site itself --------------------------------------------------------------------------------

NEEDS_ZENSICAL = pytest.mark.skipif(
    not (find_spec("zensical") and find_spec("mkdocstrings_handlers")),
    reason="zensical and mkdocstrings are not installed (pip install 'posthoc-ema[docs]')",
)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a copy of what it is made from, as `make docs` does."""
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for name in ("docs", "docs_site", "posthoc_ema", "reference_model"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.npz")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.slow
@NEEDS_ZENSICAL
def test_the_site_builds(sources: Path) -> None:
    done = build(sources)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "griffe" not in done.stderr, "a docstring cannot be understood"
    for page in PAGES:
        built = sources / "site" / page.relative_to(DOCS).with_suffix(".html")
        html = built.read_text(encoding="utf-8")
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert f'id="{name}"' in html, f"{page.name} does not show {name}"
        assert not re.search(r":(func|class|meth|attr):|doctest: \+", html), page.name
    html = (sources / "site/api/reference_model.html").read_text(encoding="utf-8")
    assert "Height and width of the images" in html
    assert not re.search(r">option<", html), "a field of a config is shown as its source"
    html = (sources / "site/api/averages.html").read_text(encoding="utf-8")
    assert ">_load<" not in html, "a private field is shown"
    for section in ("Parameters:", "Returns:", "Raises:", "Examples:", "Source"):
        assert f"{section}<" in html, f"sections {section} are not shown"
    assert 'href="solving.html#posthoc_ema.solve.solve"' in html, "a role did not become a link"


@pytest.mark.slow
@NEEDS_ZENSICAL
@pytest.mark.parametrize("text", ["[a](gone.md)", "[a](cli.md#gone)"])
def test_the_build_fails_where_a_link_is_dead(sources: Path, text: str) -> None:
    with (sources / "docs/index.md").open("a", encoding="utf-8") as page:
        page.write(text + "\n")
    assert build(sources).returncode != 0


@pytest.mark.slow
@NEEDS_ZENSICAL
def test_the_build_fails_where_a_name_is_gone(sources: Path) -> None:
    with (sources / "docs/api/errors.md").open("a", encoding="utf-8") as page:
        page.write("\n::: posthoc_ema.a_name_that_is_gone\n")
    done = build(sources)
    assert done.returncode != 0
    assert "a_name_that_is_gone" in done.stderr
