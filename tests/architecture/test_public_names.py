"""What users may import, and that each of it is documented."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import posthoc_ema

LIST = Path(__file__).parent / "public_names.txt"


def public_names() -> list[str]:
    return sorted(
        name
        for name, value in vars(posthoc_ema).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    )


def test_public_names_equal_the_list() -> None:
    """Adding or removing one is a decision: change the list, and the change log with it."""
    assert public_names() == LIST.read_text(encoding="utf-8").split()


def test_everything_public_is_exported_explicitly() -> None:
    """`from x import y as y`: type checkers treat anything else as private."""
    tree = ast.parse(inspect.getsource(posthoc_ema))
    aliases = [a for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]
    assert sorted(a.asname or "" for a in aliases) == public_names()


def test_version_is_that_of_the_distribution() -> None:
    assert posthoc_ema.__version__ == version("posthoc-ema")


def docstring_gaps(name: str, public: Any) -> list[str]:
    """What the docstring of a public function or class lacks.

    A function documents each parameter, its result if there is one, and what it raises itself.
    A class documents the parameters of its constructor, and each public method in one line.
    """
    text = inspect.getdoc(public) or ""
    if not text or (inspect.isclass(public) and public.__doc__ is None):
        return [f"{name} has no docstring"]
    gaps = []
    if inspect.isclass(public):
        if not issubclass(public, Exception):
            gaps += _missing_parameters(name, public, text)
        for member, value in vars(public).items():
            documented = isinstance(value, property) or inspect.isroutine(value)
            if not member.startswith("_") and documented and not inspect.getdoc(value):
                gaps.append(f"{name}.{member} has no docstring")
        return gaps
    gaps += _missing_parameters(name, public, text)
    if inspect.signature(public).return_annotation not in (None, "None") and not any(
        f"{section}:" in text for section in ("Returns", "Yields")
    ):
        gaps.append(f"{name} does not say what it returns")
    tree = ast.parse(textwrap.dedent(inspect.getsource(public)))
    if any(isinstance(node, ast.Raise) for node in ast.walk(tree)) and "Raises:" not in text:
        gaps.append(f"{name} does not say what it raises")
    return gaps


def _missing_parameters(name: str, public: Any, text: str) -> list[str]:
    listed = {line.strip().split(":")[0] for line in text.splitlines() if ":" in line}
    # One line may describe several: ``a, b: ...``.
    listed |= {part.strip() for entry in listed for part in entry.split(",")}
    return [
        f"{name} does not describe {parameter}"
        for parameter in inspect.signature(public).parameters
        if not parameter.startswith("_") and parameter not in listed
    ]


@pytest.mark.parametrize("name", public_names())
def test_public_names_are_documented(name: str) -> None:
    assert docstring_gaps(name, getattr(posthoc_ema, name)) == []


def undocumented(x: float) -> float:
    return x


def without_parameters(x: float) -> float:
    """Double.

    Returns:
        Twice.
    """
    return 2 * x


def without_result(x: float) -> float:
    """Double.

    Args:
        x: A number.
    """
    return 2 * x


def without_errors(x: float) -> None:
    """Refuse.

    Args:
        x: A number.
    """
    raise ValueError(x)


@dataclass
class WithoutField:
    """A class.

    Args:
        a: Documented.
    """

    a: float
    b: float


class WithoutMethod:
    """A class."""

    def method(self) -> None:
        pass


@pytest.mark.parametrize(
    ("faulty", "gap"),
    [
        (undocumented, "f has no docstring"),
        (without_parameters, "f does not describe x"),
        (without_result, "f does not say what it returns"),
        (without_errors, "f does not say what it raises"),
        (WithoutField, "f does not describe b"),
        (WithoutMethod, "f.method has no docstring"),
    ],
)
def test_gaps_are_noticed(faulty: Callable[..., Any], gap: str) -> None:
    assert docstring_gaps("f", faulty) == [gap]


FORMULAS = ["EMA", "Exponential", "PowerFunction", "beta", "gamma_to_sigma_rel", "reconstruct",
            "sigma_rel_to_gamma", "solve"]  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_name_their_source(name: str) -> None:
    text = inspect.getdoc(getattr(posthoc_ema, name)) or ""
    assert "Source:" in text
    assert "arXiv:2312.02696" in text


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        ("StructureError", ValueError),
        ("StateError", RuntimeError),
        ("SnapshotError", ValueError),
        ("CorruptSnapshotError", ValueError),
        ("SnapshotVersionError", ValueError),
        ("ForeignSnapshotError", ValueError),
        ("NonFiniteError", ArithmeticError),
        ("SnapshotWriteError", OSError),
    ],
)
def test_exceptions_are_of_a_builtin_kind(error: str, builtin: type[Exception]) -> None:
    """So that code that knows nothing of this library can catch them."""
    kind = getattr(posthoc_ema, error)
    assert issubclass(kind, posthoc_ema.PosthocEMAError)
    assert issubclass(kind, builtin)
