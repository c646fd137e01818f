"""Which module imports which, read from source: nothing is executed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name.

    Attributes:
        importer: Module that imports, relative to its package; ``__init__`` for the package.
        module: The imported module, ``posthoc_ema.solve`` or ``numpy.typing``.
        source: What stands after ``from`` or ``import``.
        name: What is taken from there, or None for ``import module``.
        line: Line of the statement.
    """

    importer: str
    module: str
    source: str
    name: str | None
    line: int

    def __str__(self) -> str:
        taken = f" ({self.name})" if self.name else ""
        return f"{self.importer}, line {self.line}, imports {self.module}{taken}"


def imports_of(package: Path) -> list[Import]:
    """All imports of a package, inside functions too; those for annotations alone are left out.

    ``from package import module`` counts as an import of ``package.module``.
    """
    found = []
    for path in sorted(package.rglob("*.py")):
        importer = ".".join(path.relative_to(package).with_suffix("").parts)
        for node in _executed(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [Import(importer, a.name, a.name, None, node.lineno) for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                source = node.module or ""
                if node.level:
                    base = [package.name, *importer.split(".")][: -node.level]
                    source = ".".join([*base, source]).rstrip(".")
                for alias in node.names:
                    inner = package.parent.joinpath(*source.split("."), alias.name)
                    is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                    module = f"{source}.{alias.name}" if is_module else source
                    found.append(Import(importer, module, source, alias.name, node.lineno))
    return found


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but the bodies of ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from _executed(node)


def layer_violations(
    package: Path, layers: Sequence[Sequence[str]], never: Sequence[tuple[str, str]] = ()
) -> list[str]:
    """Imports that do not point to a lower layer, and modules that no layer names.

    Args:
        package: Folder of the package.
        layers: Patterns of module names relative to the package, lowest first.
        never: Pairs (importer, imported) of patterns that are forbidden whatever their layers.
    """

    def layer(module: str) -> int | None:
        for height, patterns in enumerate(layers):
            if any(fnmatchcase(module, pattern) for pattern in patterns):
                return height
        return None

    modules = {
        ".".join(p.relative_to(package).with_suffix("").parts) for p in package.rglob("*.py")
    }
    problems = [
        f"{m} is in no layer; add it to LAYERS" for m in sorted(modules) if layer(m) is None
    ]
    for found in imports_of(package):
        if found.module.split(".")[0] != package.name:
            continue
        imported = found.module.removeprefix(package.name).lstrip(".") or "__init__"
        upper, lower = layer(found.importer), layer(imported)
        if upper is None or _unit(imported) == _unit(found.importer):
            continue
        if lower is None:
            # A package folder such as `trackers`: its __init__ holds nothing.
            lower = layer(f"{imported}.__init__")
        if lower is None or lower >= upper:
            problems.append(f"{found}, which is not in a lower layer")
        problems += [
            f"{found}, which it must never do"
            for importer, target in never
            if fnmatchcase(found.importer, importer) and fnmatchcase(imported, target)
        ]
    return problems


def _unit(module: str) -> str:
    """The files of the command line are one unit: its commands share options and output."""
    return "cli" if module.split(".")[0] == "cli" else module


def foreign_imports(package: Path, homes: Mapping[str, Sequence[str]]) -> list[str]:
    """Imports of third parties outside the files that are their home.

    Args:
        package: Folder of the package.
        homes: For each importable top-level name, patterns of the modules that may import it.
    """
    problems = []
    for found in imports_of(package):
        top = found.module.split(".")[0]
        if top == package.name or top in sys.stdlib_module_names:
            continue
        if not any(fnmatchcase(found.importer, pattern) for pattern in homes.get(top, ())):
            problems.append(f"{found}: {top} is not at home there")
    return problems


def private_imports(user: Path, package: str, public: Collection[str]) -> list[str]:
    """Imports from ``package`` other than ``from package import`` of its public names."""
    return [
        f"{found}: import public names only, `from {package} import ...`"
        for found in imports_of(user)
        if found.source.split(".")[0] == package
        and (found.source != package or found.name not in public)
    ]
