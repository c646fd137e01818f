"""One training step's gradients in one process or many: alone, replicated (DDP), sharded (FSDP2).

Gradients come out as those of one process that sees the whole batch, up to the order of sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reference_model.configs import PARALLEL
from reference_model.distributed import Processes
from reference_model.forced_weights import forced_layers, normalize_stored, weights_kept
from reference_model.precond import Denoiser


class Alone:
    """The network in one process.

    Args:
        net: The network, on its device.
        processes: Who trains it.

    Attributes:
        call: What to call in place of the network.
        scale: What a loss must be multiplied by, for means over processes to become sums.
    """

    def __init__(self, net: Denoiser, processes: Processes) -> None:
        self.net, self.processes = net, processes
        self.call: Any = net
        self.scale = processes.count
        self.forced = forced_layers(net)

    @contextmanager
    def micro_batch(self, *, first: bool, last: bool) -> Iterator[None]:
        """Run the forward and backward pass of one of the micro-batches of a step inside."""
        with weights_kept(self.forced, keep=not first):
            yield

    def finish(self) -> None:
        """Complete the gradients, after the last micro-batch."""

    def gradients(self) -> list[Tensor]:
        """Gradients, or what this process keeps of them; each number once over all processes."""
        return [p.grad for p in self.net.parameters() if p.grad is not None]

    def total(self, values: list[float]) -> list[float]:
        """Sum what was counted over `gradients`."""
        return values


class Replicated(Alone):
    """A copy of the network in each process; gradients are averaged as they come (DDP)."""

    def __init__(self, net: Denoiser, processes: Processes) -> None:
        super().__init__(net, processes)
        ddp = nn.parallel.DistributedDataParallel
        on_gpu = processes.device.type == "cuda"
        # Buffers are constants: nothing to broadcast. The option's name depends on the version.
        known = signature(ddp).parameters
        name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
        self.call = ddp(
            net,
            device_ids=[processes.device] if on_gpu else None,
            gradient_as_bucket_view=True,
            **{name: False},
        )

    @contextmanager
    def micro_batch(self, *, first: bool, last: bool) -> Iterator[None]:
        """As `Alone.micro_batch`; processes exchange gradients in the last."""
        with super().micro_batch(first=first, last=last):
            if last:
                yield
            else:
                with self.call.no_sync():
                    yield


class Sharded(Alone):
    """Rows of each weight in each process, gathered block by block where they are used (FSDP2).

    Gains are single numbers, which cannot be cut: each process has them all.
    """

    def __init__(self, net: Denoiser, processes: Processes) -> None:
        from torch.distributed.fsdp import fully_shard

        super().__init__(net, processes)
        self.gains = [p for p in net.parameters() if p.ndim == 0]
        mesh = dist.init_device_mesh(processes.device.type, (processes.count,))
        blocks = [*net.unet.enc.values(), *net.unet.dec.values()]
        for module in (*blocks, net):
            fully_shard(module, mesh=mesh, ignored_params=set(self.gains))
        # Forwards see gathered copies: overwriting those would not reach the rows that are kept.
        for layer in self.forced:
            layer.forced = False

    @contextmanager
    def micro_batch(self, *, first: bool, last: bool) -> Iterator[None]:
        """As `Alone.micro_batch`; processes exchange gradients in the last."""
        if first:
            normalize_stored(self.forced)
        self.call.set_requires_gradient_sync(last)
        with warnings.catch_warnings():
            # log variances are a view; nothing here writes to it
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            yield

    def finish(self) -> None:
        """Average the gradients of the gains."""
        if not self.gains:
            return
        together = torch.stack([p.grad for p in self.gains])
        dist.all_reduce(together)
        for gain, mean in zip(self.gains, together / self.processes.count, strict=True):
            gain.grad = mean
        if not self.processes.is_first:
            zero_bad_gradients([gain.grad for gain in self.gains])  # counted by the first

    def gradients(self) -> list[Tensor]:
        """Those of this process's rows, and in the first process those of the gains."""
        kept = [p for p in self.net.parameters() if p.ndim > 0 or self.processes.is_first]
        return [local(p.grad) for p in kept if p.grad is not None]

    def total(self, values: list[float]) -> list[float]:
        """Sum over the processes."""
        return self.processes.total(values)


def parallelize(net: Denoiser, processes: Processes, parallel: str) -> Alone:
    """Prepare a network for the processes of a run.

    Args:
        net: The network, on its device, the same in all processes.
        processes: Who trains it.
        parallel: One of `PARALLEL`; with one process there is nothing to divide.

    Raises:
        ValueError: For another way.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be one of {', '.join(PARALLEL)} (got {parallel!r})")
    if processes.count == 1:
        return Alone(net, processes)
    return {"ddp": Replicated, "fsdp": Sharded}[parallel](net, processes)


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process keeps; all of a tensor that is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def zero_bad_gradients(gradients: list[Tensor]) -> Tensor:
    """Set NaN and infinite numbers to zero, in place, and count them without waiting for a GPU.

    Returns:
        int64 `[]`.
    """
    bad = torch.zeros((), dtype=torch.int64, device=gradients[0].device if gradients else None)
    for gradient in gradients:
        bad += (gradient - gradient).count_nonzero()  # 0, or NaN
        torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0)
    return bad


def sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """Return the squared norm of all gradients together, float64 `[]`."""
    return torch.stack([g.double().square().sum() for g in gradients if g.numel()]).sum()
