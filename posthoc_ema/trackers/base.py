"""What every tracker does, whatever the framework: names, roles, and the errors about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from posthoc_ema.boxes import Box
from posthoc_ema.errors import StructureError
from posthoc_ema.snapshot_file import AverageSource, CopySource

FLOATING = frozenset(
    {"F64", "F32", "F16", "BF16", "C64", "C128"}
    | {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"}
)
T = TypeVar("T")
R = TypeVar("R")

CHUNK = 1 << 20
"""Elements handed to the snapshot writer at once."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model.

    Attributes:
        name: Unwrapped name.
        shape: Shape in the model.
        dtype: Safetensors name of the model's own type.
        averaged: Averaged, or copied as it is (buffers, integers).
        part: What this process holds of a tensor that is cut across several; None for the others.
        first: Whether no other process before this one holds the same part.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    averaged: bool
    part: Box | None = None
    first: bool = True

    @property
    def box(self) -> Box:
        """What this process holds."""
        return Box.whole(self.shape) if self.part is None else self.part

    @property
    def kept(self) -> str:
        """Precision of the average: float64 for 64-bit weights, else float32."""
        return "F64" if self.dtype in ("F64", "C128") else "F32"

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Shape of the average: complex numbers are pairs of reals."""
        return (*self.shape, 2) if self.dtype.startswith("C") else self.shape


@dataclass(frozen=True)
class Selection:
    """Which tensors to track, by shell-style patterns of their names."""

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
    ) -> Selection:
        """From the arguments as users give them: one pattern, several, or None."""
        return cls(_patterns(include), _patterns(exclude) or ())

    def __call__(self, name: str) -> bool:
        """Whether to track the tensor of this name."""
        chosen = self.include is None or _matches(name, self.include)
        return chosen and not _matches(name, self.exclude)

    def check(self, names: Sequence[str]) -> None:
        """Each pattern must match something: a misspelt one would silently track the wrong set.

        Raises:
            StructureError: If a pattern matches no name.
        """
        known = frozenset(names)
        for pattern in (*(self.include or ()), *self.exclude):
            if pattern not in known and not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(list(names)[:8])
                raise StructureError(
                    f"the pattern {pattern!r} matches no tensor of the model; its names are "
                    f"{shown}{', ...' if len(names) > 8 else ''}"
                )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name is one of the patterns, or matches one.

    Lists of plain names may be long: those of an adapter, thousands, for each of as many tensors.
    """
    names, wildcards = _split(patterns)
    return name in names or any(fnmatchcase(name, pattern) for pattern in wildcards)


@lru_cache(maxsize=64)
def _split(patterns: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Plain names, and patterns with wildcards."""
    wildcards = tuple(p for p in patterns if any(c in p for c in "*?["))
    return frozenset(patterns), wildcards


def _patterns(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(value)


class Ranks(Protocol):
    """Processes that hold shards of one model, and write snapshots together."""

    @property
    def number(self) -> int:
        """Number of this process among them, from 0 on."""

    @property
    def size(self) -> int:
        """How many they are."""

    def first(self, work: Callable[[], T]) -> T:
        """What the first process gets from some work, in all of them; or its error."""

    def together(self, work: Callable[[], T], then: Callable[[list[T]], R]) -> R:
        """All work, the first goes on with what they got, and all get what comes out.

        An error in any process is raised in all of them.
        """


class Tracker(ABC):
    """Averages of one model's tensors, one set for each track.

    Attributes:
        framework: Name of the framework.
        specs: Tensors in the model's order.
        aliases: Tied names, each with the name that is tracked.
        ranks: The processes that each hold a part of the tensors, once :meth:`connect` was
            called; None if this one holds all.
    """

    ranks: Ranks | None = None

    framework: str
    specs: list[TensorSpec]
    aliases: dict[str, str]

    @property
    def averaged(self) -> list[TensorSpec]:
        """Tensors that are averaged."""
        return [spec for spec in self.specs if spec.averaged]

    def connect(self) -> None:
        """Get ready to write snapshots with other processes, if they hold parts; all call it."""
        self.ranks = None

    @abstractmethod
    def check(self, model: Any) -> None:
        """Make sure that the model is still the one that was bound, at small cost.

        Raises:
            StructureError: If tensors appeared, vanished or changed shape.
        """

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether all weights to be averaged are finite."""

    @abstractmethod
    def update(self, weights: Sequence[float] | None) -> None:
        """Move averages: average ← average + weight·(current - average), a weight each track.

        With None the averages become copies of the current weights.
        """

    @abstractmethod
    def average(self, track: int, name: str) -> Any:
        """A copy of one average in the framework's own kind, in its own shape."""

    @abstractmethod
    def load(self, track: int, name: str, value: Any) -> None:
        """Set one average from an array of any framework."""

    def check_loadable(self, averages: Mapping[str, Any]) -> None:
        """Make sure that :meth:`load` will take the averages of one track.

        Raises:
            StructureError: If names or shapes differ.
        """
        expected = {spec.name: spec.shape for spec in self.averaged}
        found = {name: tuple(value.shape) for name, value in averages.items()}
        if found != expected:
            wrong = sorted(
                name for name in {*found, *expected} if found.get(name) != expected.get(name)
            )
            raise StructureError(
                f"the state's averages do not fit the model: {wrong[0]} has shape "
                f"{found.get(wrong[0], 'none')} in the state and "
                f"{expected.get(wrong[0], 'none')} in the model ({len(wrong)} such names)"
            )

    @abstractmethod
    def average_sources(self, track: int) -> list[AverageSource]:
        """What this process shall write of the averages of one track."""

    @abstractmethod
    def copy_sources(self) -> list[CopySource]:
        """What it shall write of buffers and integer tensors, as they are now."""

    @abstractmethod
    def assemble(self, averages: Mapping[str, Any]) -> Any:
        """A model state in the form the user gave it, from averages by name."""

    @abstractmethod
    def applied(self, model: Any, track: int) -> AbstractContextManager[Any]:
        """Put averages in place of the weights, and the weights back at the end."""


def check_specs(bound: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> None:
    """Compare a model with the one that was bound.

    Raises:
        StructureError: Naming what appeared, vanished or changed.
    """
    before = {spec.name: spec for spec in bound}
    now = {spec.name: spec for spec in found}
    problems = [f"{name} appeared" for name in now if name not in before]
    problems += [f"{name} vanished" for name in before if name not in now]
    for name in now:
        if name in before and now[name].shape != before[name].shape:
            problems.append(f"{name} changed from shape {before[name].shape} to {now[name].shape}")
        elif name in before and now[name].part != before[name].part:
            problems.append(f"{name} was cut anew, from {before[name].box} to {now[name].box}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise StructureError(
            f"the model changed since its averages began: {'; '.join(problems[:5])}{more}. "
            "Start a new EMA for the changed model, or leave such tensors out with exclude="
        )


def flatten_mapping(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by dotted names; a flat mapping keeps its names."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten_mapping(value, f"{name}.")
        else:
            yield name, value


def unflatten_like(tree: Mapping[str, Any], leaves: Mapping[str, Any], prefix: str = "") -> Any:
    """Nested mappings of the same form with other leaves; leaves without a new value stay."""
    return {
        key: unflatten_like(value, leaves, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else leaves.get(f"{prefix}{key}", value)
        for key, value in tree.items()
    }


def unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Name to leaf, refusing names that only differ in how they nest.

    Raises:
        StructureError: If two leaves have the same dotted name.
    """
    named: dict[str, Any] = {}
    for name, leaf in pairs:
        if name in named:
            raise StructureError(
                f"two leaves of the model are both called {name!r}; rename one, or exclude it"
            )
        named[name] = leaf
    return named
