"""What other people's snapshots have in common, whatever they are: a time, a profile, tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from posthoc_ema.encoding import ITEM_SIZE
from posthoc_ema.profiles import Profile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ForeignTensor:
    """One tensor, not yet read.

    Attributes:
        name: Its name in the state dict.
        dtype: Safetensors name of its type in the file.
        shape: Its shape.
        averaged: Whether it is one of the weights, or copied (buffers, integers).
        read: Reads its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    averaged: bool
    read: Callable[[], NDArray[np.uint8]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return prod(self.shape) * ITEM_SIZE.get(self.dtype, 16)


@dataclass(frozen=True, eq=False)
class Contents:
    """The weights of one snapshot.

    Attributes:
        tensors: In the model's order.
        aliases: Tied names, each with the name that holds the values.
    """

    tensors: Sequence[ForeignTensor]
    aliases: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ForeignSnapshot:
    """One average of the weights, or the weights of one moment, in other people's files.

    Attributes:
        path: The file, or the folder, that it is known by.
        files: The files that hold it.
        t: Its time.
        profile: How it averages.
        open: Looks into the files; reads no weights.
    """

    path: Path
    files: tuple[Path, ...]
    t: float
    profile: Profile
    open: Callable[[], Contents] = field(repr=False)


@dataclass(frozen=True, eq=False)
class ForeignRun:
    """All snapshots of one training run.

    Attributes:
        kind: What wrote them.
        unit: Name of the unit of time.
        snapshots: In order of time.
        remarks: What was left out or taken for granted, for people.
    """

    kind: str
    unit: str
    snapshots: Sequence[ForeignSnapshot]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """What users say about files that do not say it themselves.

    Attributes:
        sigma_rel: EMA lengths of the tracks, in the order of their numbers.
        profile: How single checkpoints average.
        update_every: Steps between updates of the averages.
        unit: Name of the unit of time.
        key: Where in each file the weights are, if there are several sets of them.
        subfolder: Which folder or file in each checkpoint, if there are several.
        allow: Further names that pickles may hold.
    """

    sigma_rel: tuple[float, ...] = ()
    profile: Profile | None = None
    update_every: int = 1
    unit: str | None = None
    key: str | None = None
    subfolder: str | None = None
    allow: tuple[str, ...] = ()
