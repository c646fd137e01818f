"""The processes that train one model together: who they are, and how they agree and fail."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

_FAILURE = "failure"


class OtherProcessError(RuntimeError):
    """Another process of the run failed, and says why itself."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        device: Where this process computes.
        rank: Its number, from 0.
        count: How many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    # Decisions are made on the CPU, so that no process waits for a GPU.
    _group: Any = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and shows what is common to all."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must ask."""
        return self.total([flag])[0] > 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over the processes, in float64; all must take part."""
        if self.count == 1:
            return [float(value) for value in values]
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self._group)
        return summed.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Plain values of all processes, by rank; all must take part."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something in every process, or in none: where it fails in one, all stop.

        Raises:
            OtherProcessError: Where it went well, or another process reports its error.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        errors = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        failed = [rank for rank, text in enumerate(errors) if text is not None]
        if not failed:
            return
        if error is not None and failed[0] == self.rank:
            raise error
        raise OtherProcessError(f"process {failed[0]} failed: {errors[failed[0]]}") from error


@contextmanager
def processes(device: str | torch.device = "cpu") -> Iterator[Processes]:
    """Join the processes that torchrun started, or be the only one.

    Of a machine's GPUs each process takes the one of its local rank. Where a process fails, the
    others soon find it gone.

    Args:
        device: `cpu`, or `cuda` for one GPU a process.

    Yields:
        The processes.

    Raises:
        OtherProcessError: In all processes but the one that failed first.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by a program of one's own, which also ends it
        rank, count = dist.get_rank(), dist.get_world_size()
        yield Processes(device, rank, count, dist.new_group(backend="gloo"))
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes(device)
        return
    store, rank, count = next(dist.rendezvous("env://"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, **bound)
    try:
        yield Processes(device, rank, count, dist.new_group(backend="gloo"))
    except Exception as error:
        cause = _explained(error, store, rank)
        if device.type == "cpu":  # on GPUs that could wait for a process which is gone
            dist.destroy_process_group()
        if cause is error:
            raise
        raise cause from error
    dist.destroy_process_group()


def _explained(error: Exception, store: Any, rank: int) -> Exception:
    """Return the error of this process, or what made it fail if that was another process.

    The store outlives the process that fails; it holds what that had to say.
    """
    if isinstance(error, OtherProcessError):
        return error
    try:
        first = store.compare_set(_FAILURE, "", f"process {rank} failed: {error}").decode()
    except Exception:
        return error  # the store went with the process that kept it
    return error if first.startswith(f"process {rank} ") else OtherProcessError(first)
