"""Links of Markdown pages: what they point to must be there, for readers of either form.

The pages are read on the web site and, as files, in the repository. So a link must lead to a
file, and an anchor to a heading under both rules by which headings get anchors.
"""

from __future__ import annotations

import re
from pathlib import Path

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"(`+).+?\1")
_HIDDEN = re.compile(r"^(```+).*?^\1|<!--.*?-->", re.MULTILINE | re.DOTALL)
_ELSEWHERE = ("http://", "https://", "mailto:")


def dead_links(page: Path, top: Path) -> list[str]:
    """One line for each link of a page that leads nowhere, or out of the folder ``top``."""
    problems = []
    for target in links(page):
        if target.startswith(_ELSEWHERE):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        if not found.exists():
            problems.append(f"{page.name}: {target}: no such file")
        elif not found.is_relative_to(top.resolve()):
            problems.append(f"{page.name}: {target}: outside of {top.name}, which is published")
        elif anchor and anchor not in anchors(found):
            problems.append(f"{page.name}: {target}: no such heading")
    return problems


def links(page: Path) -> list[str]:
    """Targets of the links and images of a page, in order, without those in code."""
    text = _HIDDEN.sub("", page.read_text(encoding="utf-8"))
    # A link's text may be code: only its quotes go, so that `[x](y)` as code does not count.
    return _LINK.findall(_CODE.sub(lambda code: "code" if "](" in code[0] else code[0], text))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings that GitHub and Python-Markdown agree on."""
    text = _HIDDEN.sub("", page.read_text(encoding="utf-8"))
    headings = [re.sub(r"[`*]", "", h) for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {_github(h) for h in headings} & {_python_markdown(h) for h in headings}


def _github(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _python_markdown(heading: str) -> str:
    plain = heading.encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
