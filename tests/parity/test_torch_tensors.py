"""PyTorch tensors of every layout, size and role: all end up as the explicit average."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from posthoc_ema import EMA, PowerFunction, StructureError
from tests.parity.runs import assert_average, explicit_average, random_walk
from tests.parity.torch_runs import SIGMA, Recorder, jitter, recorded, train

# Layouts -------------------------------------------------------------------------------------


def layouts() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "scalar": torch.randn(()),
        "empty": torch.randn(0),
        "empty_2d": torch.randn(3, 0),
        "plain": torch.randn(5, 4),
        "transposed": torch.randn(4, 7).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "strided": torch.randn(6, 8)[:, ::2],
        "offset": torch.randn(10)[3:],
        "one_wide": torch.randn(4, 1, 3).transpose(1, 2),
        "after": torch.randn(3),
    }


def test_every_layout_as_a_mapping() -> None:
    model = layouts()
    recorder = Recorder(EMA(sigma_rel=SIGMA), lambda: model)
    train(recorder, model, 30)
    recorder.check()


def test_every_layout_as_parameters() -> None:
    module = nn.Module()
    for name, tensor in layouts().items():
        module.register_parameter(name, nn.Parameter(tensor))
    recorder = recorded(module)
    train(recorder, module, 30)
    recorder.check()


def test_averages_keep_the_memory_order_of_their_parameters() -> None:
    # load_state_dict and kernels are fastest so; values must not depend on it.
    model = layouts()
    ema = EMA(sigma_rel=SIGMA)
    ema.update(model)
    average = ema.average()
    assert average["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert average["transposed"].stride() == model["transposed"].stride()
    for name, tensor in model.items():
        assert torch.equal(average[name], tensor), name


def test_lazily_conjugated_tensors_are_read_afresh() -> None:
    base = torch.tensor([1 + 2j, 3 - 1j])
    model = {"w": base.conj(), "n": torch.tensor([1.0, 2.0])._neg_view()}
    recorder = Recorder(EMA(sigma_rel=SIGMA), lambda: model)
    for _ in range(20):
        base.mul_(1.1 + 0.1j)
        recorder.update(model)
    recorder.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thousands_of_small_tensors_cross_the_limits_of_blocks(dtype: torch.dtype) -> None:
    # 120 × 12,000 = 1.44 M elements: several blocks are gathered, sizes not dividing evenly.
    torch.manual_seed(0)
    model = {f"w{k}": torch.randn(12_000 + k).to(dtype) for k in range(120)}
    recorder = Recorder(EMA(sigma_rel=SIGMA), lambda: model)
    train(recorder, model, 3)
    recorder.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_tensors_are_taken_in_chunks(dtype: torch.dtype) -> None:
    # 2.5 M elements: ten chunks and a rest; small ones before, between and after.
    torch.manual_seed(0)
    model = {
        "small0": torch.randn(7).to(dtype),
        "large": torch.randn(2_500_001).to(dtype),
        "small1": torch.randn(11).to(dtype),
        "large_t": torch.randn(700, 600).to(dtype).t(),
        "small2": torch.randn(13).to(dtype),
    }
    recorder = Recorder(EMA(sigma_rel=SIGMA), lambda: model)
    train(recorder, model, 3)
    recorder.check()


def test_types_may_be_mixed_in_any_order() -> None:
    torch.manual_seed(0)
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    model = {f"w{k}": torch.randn(50 + k).to(kinds[k % 5]) for k in range(40)}
    recorder = Recorder(EMA(sigma_rel=SIGMA), lambda: model)
    train(recorder, model, 20)
    recorder.check()
    assert recorder.ema.average()["w2"].dtype == torch.float64


def test_float64_weights_are_averaged_to_float64_precision() -> None:
    module = nn.Linear(5, 4).double()
    recorder = recorded(module)
    train(recorder, module, 50)
    recorder.check(np.float64)


def test_device_cpu_gives_the_same_averages() -> None:
    module = nn.Linear(4, 4)
    near, far = EMA(sigma_rel=SIGMA), EMA(sigma_rel=SIGMA, device="cpu")
    for step in range(10):
        jitter(module, step)
        near.update(module)
        far.update(module)
    assert torch.equal(near.average()["weight"], far.average()["weight"])
    assert far.average()["weight"].device.type == "cpu"


# Modules -------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.norm


def test_tied_tensors_are_averaged_once_and_given_under_all_names() -> None:
    module = Tied()
    recorder = recorded(module)
    train(recorder, module, 20)
    recorder.check()
    average = recorder.ema.average()
    assert set(average) == set(module.state_dict())
    assert average["head.weight"] is average["embed.weight"]
    fresh = Tied()
    fresh.load_state_dict(average, strict=True)
    assert fresh.head.weight is fresh.embed.weight
    # Once, not twice: one embedding and one norm layer's weight and bias in the state.
    assert set(recorder.ema.state_dict()["averages"][0]) == {
        "embed.weight",
        "norm.weight",
        "norm.bias",
    }


def test_frozen_parameters_stay_and_join_in_when_unfrozen() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[0].requires_grad_(False)
    recorder = recorded(module)
    for step in range(30):
        if step == 15:
            module[0].requires_grad_(True)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        recorder.update(module)
    recorder.check()


def test_a_parameter_frozen_throughout_is_its_own_average() -> None:
    module = nn.Linear(3, 3).requires_grad_(False)
    with torch.no_grad():
        module.weight.fill_(1.2346)
    ema = EMA(sigma_rel=(0.05, 0.1))
    for _ in range(100):
        ema.update(module)
    assert torch.equal(ema.average(0.05)["weight"], module.weight)


def test_integer_parameters_are_copied() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(2))
    module.codes = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    ema = EMA(sigma_rel=SIGMA)
    ema.update(module)
    with torch.no_grad():
        module.codes.add_(36)
    ema.update(module)
    assert torch.equal(ema.average()["codes"], torch.tensor([37, 38]))


def test_buffers_are_copied_not_averaged() -> None:
    module = nn.BatchNorm1d(3)
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    ema = EMA(sigma_rel=SIGMA)
    for step in range(5):
        module(torch.full((4, 3), float(step)) + torch.randn(4, 3))
        ema.update(module)
    average = ema.average()
    assert set(average) == set(module.state_dict())
    assert "scratch" not in average
    assert torch.equal(average["running_mean"], module.running_mean)
    assert average["num_batches_tracked"].dtype == torch.int64
    assert int(average["num_batches_tracked"]) == 5
    module.running_mean.fill_(9)
    assert not (average["running_mean"] == 9).any()


def test_a_buffer_replaced_by_assignment_is_the_one_copied() -> None:
    module = nn.BatchNorm1d(2)
    ema = EMA(sigma_rel=SIGMA)
    ema.update(module)
    module.running_mean = torch.full((2,), 7.0)
    ema.update(module)
    assert torch.equal(ema.average()["running_mean"], torch.full((2,), 7.0))


# Tensors that cannot be tracked ---------------------------------------------------------------


def test_unsuitable_tensors_are_named() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(StructureError, match=r"1\.weight is not initialised yet; run the model"):
        EMA(sigma_rel=SIGMA).update(module)
    with pytest.raises(StructureError, match="weight is on the meta device"):
        EMA(sigma_rel=SIGMA).update(nn.Linear(2, 2, device="meta"))
    with pytest.raises(StructureError, match=r"s has layout torch\.sparse_coo"):
        EMA(sigma_rel=SIGMA).update({"s": torch.eye(3).to_sparse()})
    with pytest.raises(StructureError, match=r"x is a float, expected a torch\.Tensor"):
        EMA(sigma_rel=SIGMA).update({"w": torch.ones(1), "x": 1.0})


def test_unsuitable_tensors_can_be_left_out() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    ema = EMA(sigma_rel=SIGMA, exclude="1.*")
    ema.update(module)
    assert set(ema.average()) == {"0.weight", "0.bias"}


def test_random_walk_moves_enough_for_the_tolerances_to_bite() -> None:
    # The twin of all comparisons here: an average one step behind is not within them.
    history = random_walk(20, {"w": (50,)})
    expected = explicit_average(PowerFunction(SIGMA), range(1, 21), history)
    behind = explicit_average(PowerFunction(SIGMA), range(1, 20), history[:-1])
    with pytest.raises(AssertionError, match="w is off by"):
        assert_average(behind, expected, 20)
