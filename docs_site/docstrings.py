"""Docstrings are written for Sphinx's eyes and doctest's; the site's pages need Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")
_FLAG = re.compile(r"[ \t]*# doctest: \+\w+")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Makes links of roles, and sections of examples."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all docstrings of a package once it was read."""
        _rewrite(pkg)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring is not None:
        text = _EXAMPLE.sub("Examples:", _FLAG.sub("", obj.docstring.value))
        obj.docstring.value = _ROLE.sub(lambda role: _link(role[1], obj), text)
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            _rewrite(member)


def _link(name: str, obj: griffe.Object) -> str:
    """A link to what Sphinx would find: a full path, or a name of this class or module."""
    path, owner = name, obj
    while "." not in path:
        if path in owner.members:
            path = f"{owner.path}.{name}"
        elif owner.parent is None or owner.is_module:
            break
        else:
            owner = owner.parent
    # Optional: what no page documents stays plain code.
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
