"""What the API pages show: docstrings as Markdown, options as fields with a description.

Docstrings are written for Python's tools: roles (``:func:`posthoc_ema.solve```), examples for
doctest. Fields of configs have their description in `option`, where the command line finds it.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")
_FLAG = re.compile(r"[ \t]*# doctest: \+\w+")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Prepares a package for its pages."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Go through all objects once the package was read."""
        _prepare(pkg)


def _prepare(obj: griffe.Object) -> None:
    if isinstance(obj, griffe.Class):
        _hide_private_fields(obj)
        _describe_options(obj)
    if obj.docstring is not None:
        text = _EXAMPLE.sub("Examples:", _FLAG.sub("", obj.docstring.value))
        obj.docstring.value = _ROLE.sub(lambda role: _link(role[1], obj), text)
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            _prepare(member)


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
    # `posthoc_ema.plan` is a function for whoever imports it, and a module for whoever reads files.
    last = path.removeprefix(f"{obj.package.name}.")
    module = obj.package.members.get(last)
    if isinstance(module, griffe.Module) and last in module.members:
        path = f"{path}.{last}"
    # Optional: what no page documents stays plain code.
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


def _hide_private_fields(cls: griffe.Class) -> None:
    """Of a dataclass: they would be shown as arguments of its constructor."""
    for name in [name for name in cls.members if re.match("_[^_]", name)]:
        if isinstance(cls.members[name], griffe.Attribute):
            cls.del_member(name)


def _describe_options(cls: griffe.Class) -> None:
    """``x: int = option("What.", default=3)`` becomes a field of value 3 with a docstring.

    The constructor of a dataclass is made of its fields later on, and then is right, too.
    """
    fields = [member for member in cls.members.values() if isinstance(member, griffe.Attribute)]
    for field in fields:
        call = field.value
        if not isinstance(call, griffe.ExprCall) or str(call.function) != "option":
            continue
        text, *rest = call.arguments
        field.value = rest[0].value if rest and isinstance(rest[0], griffe.ExprKeyword) else None
        if isinstance(text, str):  # else it is put together when the program runs
            field.docstring = griffe.Docstring(ast.literal_eval(text), parent=field)
