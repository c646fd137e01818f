"""Several processes of one process group (gloo, on the CPU), as a launcher would start them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Each process is forked from a server that has imported torch, and has no threads yet.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "posthoc_ema.ema"]
)
_SECONDS = 120  # until a process counts as hanging


def run_ranks(
    number: int, work: Callable[..., None], folder: Path, *args: Any, killed: int | None = None
) -> None:
    """Call ``work(rank, number, folder, *args)`` in each process of a group.

    Args:
        number: Of processes.
        work: A function of a module's top level.
        folder: Of the test; errors and the rendezvous go there.
        args: Further arguments.
        killed: The rank that will kill itself.

    Raises:
        AssertionError: With the trace of the first process that failed, or hung.
    """
    folder.mkdir(exist_ok=True, parents=True)
    meeting = folder / f".rendezvous-{len(list(folder.glob('.rendezvous-*')))}"
    meeting.touch()
    processes = [
        _CONTEXT.Process(target=_rank, args=(rank, number, folder, f"{meeting}.store", work, args))
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    failed = []
    for rank, process in enumerate(processes):
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            failed.append(f"rank {rank} hung")
        elif process.exitcode != (-9 if rank == killed else 0):
            trace = folder / f".error-{rank}"
            failed.append(trace.read_text() if trace.exists() else f"exit {process.exitcode}")
    if failed:
        raise AssertionError("\n".join(failed))


def _rank(
    rank: int,
    number: int,
    folder: Path,
    meeting: str,
    work: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=number
        )
        work(rank, number, folder, *args)
    except BaseException:
        (folder / f".error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # what others still hold of the group shall not matter


def small_model() -> nn.Sequential:
    """Sizes 5 and 3, which 2 to 4 processes cannot share evenly; buffers; a frozen tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))
    model[2].bias.requires_grad_(False)
    return model


def sharded_model(mesh: Any) -> nn.Sequential:
    """The same, cut by FSDP2; the batch norm stays whole in every process."""
    from torch.distributed.fsdp import fully_shard

    model = small_model()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return model


def perturb(model: nn.Module, step: int) -> None:
    """Change all weights in place, alike however they are cut."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in model.parameters():
            change = torch.randn(weight.shape, generator=generator)
            if isinstance(weight, DTensor):
                change = distribute_tensor(
                    change, weight.device_mesh, weight.placements, src_data_rank=None
                )
            weight.add_(change)
        model[3].running_mean.add_(1)  # type: ignore[index, operator, union-attr]


def whole(state: Any) -> dict[str, torch.Tensor]:
    """A state dict with every tensor gathered."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in state.items()
    }


def assert_same_tensors(actual: Any, expected: Any) -> None:
    """Raise unless both hold the same tensors by name, to the last bit."""
    actual, expected = whole(actual), whole(expected)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), (name, actual[name], value)
