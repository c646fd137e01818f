"""Averages of sharded weights: those of one process that holds them all, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import (
    assert_same_tensors,
    perturb,
    run_ranks,
    sharded_model,
    small_model,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from posthoc_ema import EMA, StructureError

SIGMA = (0.05, 0.1)
STEPS = 6


def expected_ema(steps: int = STEPS) -> Any:
    """The same run in one process."""
    model, ema = small_model(), EMA(sigma_rel=SIGMA)
    for step in range(steps):
        perturb(model, step)
        ema.update(model)
    return ema


def track(model: Any, ema: EMA, steps: int = STEPS) -> None:
    for step in range(int(ema.t), steps):
        perturb(model, step)
        with CommDebugMode() as communication:
            ema.update(model)
        assert communication.get_total_counts() == 0


def assert_expected(ema: EMA) -> None:
    for sigma_rel in SIGMA:
        assert_same_tensors(ema.average(sigma_rel), expected_ema().average(sigma_rel))


def updates(rank: int, number: int, folder: Path) -> None:
    model = sharded_model(init_device_mesh("cpu", (number,)))
    ema = EMA(sigma_rel=SIGMA)
    track(model, ema)
    assert_expected(ema)
    local = ema.average(0.05)["0.weight"].to_local()
    assert local.shape == model[0].weight.to_local().shape
    model.load_state_dict(ema.average(0.05))


@pytest.mark.parametrize("number", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_averages_equal_those_of_one_process(tmp_path: Path, number: int) -> None:
    """On four, the last holds nothing of some tensors; and no update communicates."""
    run_ranks(number, updates, tmp_path)


def communication_is_noticed(rank: int, number: int, folder: Path) -> None:
    model = sharded_model(init_device_mesh("cpu", (number,)))
    with CommDebugMode() as communication:
        whole(dict(model.named_parameters()))
    assert communication.get_total_counts() > 0


def other_meshes(rank: int, number: int, folder: Path) -> None:
    """Replicas of shards (HSDP), and both axes of a matrix cut (tensor parallel)."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, ema = sharded_model(mesh), EMA(sigma_rel=SIGMA)
    track(model, ema)
    assert_expected(ema)

    for placements in ([Shard(0), Shard(1)], [Replicate(), Replicate()], [Shard(1), Shard(1)]):
        value = torch.arange(35.0).reshape(5, 7)
        cut = {"w": distribute_tensor(value, mesh, placements)}
        ema, one = EMA(sigma_rel=0.1), EMA(sigma_rel=0.1)
        for _ in range(3):
            ema.update(cut)
            one.update({"w": value})
            cut["w"].add_(1)
            value += 1
        assert_same_tensors(ema.average(), one.average())


@pytest.mark.slow
def test_meshes_of_two_axes(tmp_path: Path) -> None:
    run_ranks(4, other_meshes, tmp_path)


def evaluations(rank: int, number: int, folder: Path) -> None:
    """A forward pass alone leaves the root's weights gathered; nothing of that may stay."""
    model = small_model()
    fully_shard(model[0])
    fully_shard(model)
    ema = EMA(sigma_rel=SIGMA)
    perturb(model, 0)
    ema.update(model)
    perturb(model, 1)
    inputs = torch.ones(2, 3)
    model.eval()
    raw = model(inputs)
    assert not hasattr(model[2].weight, "to_local")  # gathered: the test means something
    ema.update(model)
    plain = small_model().eval()
    with ema.applied(model, 0.1):
        averaged = model(inputs)
    plain.load_state_dict(whole(ema.average(0.1)))
    torch.testing.assert_close(averaged, plain(inputs), rtol=0, atol=0)
    assert not torch.equal(averaged, raw)
    torch.testing.assert_close(model(inputs), raw, rtol=0, atol=0)
    with pytest.raises(RuntimeError), ema.applied(model, 0.1):
        model(torch.ones(2, 7))
    torch.testing.assert_close(model(inputs), raw, rtol=0, atol=0)


def test_evaluation_with_averages(tmp_path: Path) -> None:
    run_ranks(2, evaluations, tmp_path)


def nonfinite(rank: int, number: int, folder: Path) -> None:
    """One process sees the NaN, all leave the update out."""
    model = sharded_model(init_device_mesh("cpu", (number,)))
    ema = EMA(sigma_rel=SIGMA, nonfinite="skip")
    ema.update(model)
    if rank == 1:
        with torch.no_grad():
            model[0].weight.to_local()[0] = torch.nan
    ema.update(model)
    assert ema.skipped == 1


def saved(rank: int, number: int, folder: Path) -> None:
    nonfinite(rank, number, folder)
    communication_is_noticed(rank, number, folder)
    model = sharded_model(init_device_mesh("cpu", (number,)))
    ema = EMA(sigma_rel=SIGMA)
    track(model, ema, steps=3)
    dcp.save({"ema": ema}, checkpoint_id=folder / "checkpoint")
    file = folder / f"rank{rank}.pt"
    torch.save(ema.state_dict(), file)

    again = EMA(sigma_rel=SIGMA)  # on as many processes a file of each will do
    again.load_state_dict(torch.load(file, weights_only=True))
    again.load_state_dict(again.state_dict())
    track(model, again)
    assert_expected(again)


def resumed(rank: int, number: int, folder: Path) -> None:
    model = sharded_model(init_device_mesh("cpu", (number,)))
    for step in range(3):
        perturb(model, step)
    ema = EMA(sigma_rel=SIGMA)
    ema.bind(model)
    dcp.load({"ema": ema}, checkpoint_id=folder / "checkpoint")
    assert ema.t == 3
    track(model, ema)
    assert_expected(ema)

    other = EMA(sigma_rel=SIGMA)
    other.load_state_dict(torch.load(folder / "rank0.pt", weights_only=True))
    with pytest.raises(StructureError, match=r"the state holds \[0:3, 0:3\] of 0.weight, this pro"):
        other.bind(model)

    # A state of one process: each takes its part.
    ema = EMA(sigma_rel=SIGMA)
    ema.load_state_dict(expected_ema(3).state_dict())
    model = sharded_model(init_device_mesh("cpu", (number,)))
    for step in range(3):
        perturb(model, step)
    track(model, ema)
    assert_expected(ema)


def test_resuming_on_another_number_of_processes(tmp_path: Path) -> None:
    run_ranks(2, saved, tmp_path)
    run_ranks(3, resumed, tmp_path)


def resumed_alone(rank: int, number: int, folder: Path) -> None:
    ema, model = EMA(sigma_rel=SIGMA), small_model()
    ema.bind(model)
    dcp.load({"ema": ema}, checkpoint_id=folder / "checkpoint")
    for step in range(3):
        perturb(model, step)
    track(model, ema)
    assert_expected(ema)


def begun(rank: int, number: int, folder: Path) -> None:
    """A checkpoint from before the first update: averages begin with it."""
    model = sharded_model(init_device_mesh("cpu", (number,)))
    ema = EMA(sigma_rel=SIGMA)
    ema.bind(model)
    dcp.save({"ema": ema}, checkpoint_id=folder / "beginning")
    dcp.load({"ema": ema}, checkpoint_id=folder / "beginning")
    track(model, ema)
    assert_expected(ema)
    dcp.save({"ema": expected_ema(3)}, checkpoint_id=folder / "checkpoint")


@pytest.mark.slow
def test_one_process_and_several(tmp_path: Path) -> None:
    run_ranks(2, begun, tmp_path)
    run_ranks(1, resumed_alone, tmp_path)


def refused(rank: int, number: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (number,))
    from torch.distributed.tensor import DTensor

    summand = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(StructureError, match=r"w has the placements .*yet to be summed"):
        EMA().update({"w": summand})
    # Cut along an axis of one, the other process lies elsewhere; and cut anew.
    model = {"w": distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])}
    ema = EMA()
    ema.update(model)
    model["w"] = distribute_tensor(torch.ones(4, 2), mesh, [Shard(1)])
    with pytest.raises(StructureError, match=r"w was cut anew, from \[.*\] to \["):
        ema.update(model)
    with pytest.raises(StructureError, match=r"FSDP1.*use torch\.distributed\.fsdp"):
        EMA().update(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))


def test_what_cannot_be_tracked(tmp_path: Path) -> None:
    run_ranks(2, refused, tmp_path)
