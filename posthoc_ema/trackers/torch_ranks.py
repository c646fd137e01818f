"""The processes that hold one sharded model, where they must do something together.

Only snapshots need it: none of this happens in an ordinary step. An error in one process is
raised in all of them, so that none waits for ever; so is the end of one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import distributed

from posthoc_ema import errors
from posthoc_ema.errors import SnapshotWriteError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Outcome:
    """What some work gave: a value, or an error and where it happened."""

    value: Any
    error: Exception | None
    rank: int


class Ranks:
    """Processes that hold shards of the same tensors. All make it together.

    They talk over a group of their own (gloo): messages of a thread in the background never mix
    with those of training, and none of them needs a GPU.

    Args:
        tensors: DTensors; the processes are those of their device meshes.
    """

    def __init__(self, tensors: Iterable[Any]) -> None:
        meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors)
        ranks = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
        self._ranks = sorted(ranks)
        self._rank = distributed.get_rank()
        self._group = distributed.new_group(
            self._ranks,
            backend="gloo",
            use_local_synchronization=len(ranks) < distributed.get_world_size(),
        )

    @property
    def number(self) -> int:
        """Number of this process among them, from 0 on."""
        return self._ranks.index(self._rank)

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self._ranks)

    def first(self, work: Callable[[], T]) -> T:
        """What the first process gets from some work, in all of them."""
        return self._share(self._attempt(work) if self.number == 0 else None)

    def together(self, work: Callable[[], T], then: Callable[[list[T]], R]) -> R:
        """All work, the first goes on with what they got, and all get what comes out."""
        own, outcome = self._attempt(work), None
        gathered: list[Any] | None = [None] * self.size if self.number == 0 else None
        self._talk(
            lambda: distributed.gather_object(own, gathered, dst=self._ranks[0], group=self._group)
        )
        if gathered is not None:
            failed = [outcome for outcome in gathered if outcome.error is not None]
            values = [outcome.value for outcome in gathered]
            outcome = failed[0] if failed else self._attempt(lambda: then(values))
        return self._share(outcome)

    def _share(self, outcome: _Outcome | None) -> Any:
        """The value or error of the first process, in all of them."""
        shared = [outcome]
        self._talk(
            lambda: distributed.broadcast_object_list(
                shared, src=self._ranks[0], group=self._group, device=torch.device("cpu")
            )
        )
        outcome = shared[0]
        assert outcome is not None
        if outcome.error is None:
            return outcome.value
        if outcome.rank != self._rank:
            outcome.error.add_note(f"(raised on rank {outcome.rank})")
        raise outcome.error

    def _attempt(self, work: Callable[[], Any]) -> _Outcome:
        try:
            return _Outcome(work(), None, self._rank)
        except Exception as error:
            return _Outcome(None, _sendable(error), self._rank)

    def _talk(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise SnapshotWriteError(
                errno.EPIPE,
                "a snapshot was not written, for another process of the group failed or was killed "
                f"meanwhile ({error}); snapshots already there are unharmed",
            ) from error


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same, if it cannot be sent to another process for sure."""
    known = type(error).__module__ in ("builtins", errors.__name__)
    if known and all(isinstance(value, str | int | float | NoneType) for value in error.args):
        return error.with_traceback(None)
    return RuntimeError(f"{type(error).__name__}: {error}")
