"""Parts of tensors that are cut across several processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, order=True)
class Box:
    """A rectangular part of a tensor, possibly empty.

    Attributes:
        offsets: Of its first element, one for each axis.
        shape: Its own shape.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index that takes it out of the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.shape, strict=True))

    def __str__(self) -> str:
        ranges = ", ".join(f"{s.start}:{s.stop}" for s in self.slices)
        return f"[{ranges}]"
