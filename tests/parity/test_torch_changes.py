"""What may happen to a module in mid-run, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from posthoc_ema import EMA, StructureError
from tests.parity.torch_runs import SIGMA, Recorder, jitter, recorded, train

# What happens to parameters in mid-run --------------------------------------------------------


def _replace_data(module: Any) -> None:
    module[0].weight.data = module[0].weight.data.clone() + 1


def _new_parameter(module: Any) -> None:
    module[0].weight = nn.Parameter(torch.randn(4, 4))


def _new_submodule(module: Any) -> None:
    module[0] = nn.Linear(4, 4)


def _to_float64(module: Any) -> None:
    module.double()


def _to_bfloat16(module: Any) -> None:
    module.bfloat16()


def _channels_last(module: Any) -> None:
    module[1].weight.data = module[1].weight.data.to(memory_format=torch.channels_last)


def _transposed_in_place(module: Any) -> None:
    # Same address, same shape, other order.
    module[0].weight.data = module[0].weight.data.t()


def _into_one_buffer(module: Any) -> None:
    # What flattening optimisers do: all parameters become views of one vector.
    flat = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    start = 0
    for parameter in module.parameters():
        stop = start + parameter.numel()
        parameter.data = flat[start:stop].view(parameter.shape)
        start = stop


def _swapped_tensors(module: Any) -> None:
    torch.utils.swap_tensors(module[0].weight, nn.Parameter(torch.randn(4, 4)))


@pytest.mark.parametrize(
    "change",
    [
        _replace_data,
        _new_parameter,
        _new_submodule,
        _to_float64,
        _to_bfloat16,
        _channels_last,
        _transposed_in_place,
        _into_one_buffer,
        _swapped_tensors,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_changes_that_keep_shapes_are_followed(change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 4, 3))
    recorder = recorded(module)
    train(recorder, module, 10)
    change(module)
    train(recorder, module, 10, start=10)
    recorder.check()


def _appears(module: Any) -> None:
    module[0].extra = nn.Parameter(torch.zeros(2))


def _vanishes(module: Any) -> None:
    module[0].bias = None


def _deleted(module: Any) -> None:
    del module[1]


def _new_shape(module: Any) -> None:
    module[0].weight = nn.Parameter(torch.zeros(5, 4))


def _data_of_another_shape(module: Any) -> None:
    module[0].weight.data = torch.zeros(2, 4)


def _data_cut_off(module: Any) -> None:
    # Same address, fewer rows.
    module[0].weight.data = module[0].weight.data[:2]


def _data_reshaped(module: Any) -> None:
    module[0].weight.data = module[0].weight.data.view(2, 8)


def _untied(module: Any) -> None:
    module[1].bias = nn.Parameter(module[0].bias.detach().clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_appears, r"0\.extra appeared"),
        (_vanishes, r"0\.bias vanished"),
        (_deleted, r"1\.weight vanished"),
        (_new_shape, r"0\.weight changed from shape \(4, 4\) to \(5, 4\)"),
        (_data_of_another_shape, r"0\.weight changed from shape \(4, 4\) to \(2, 4\)"),
        (_data_cut_off, r"0\.weight changed from shape \(4, 4\) to \(2, 4\)"),
        (_data_reshaped, r"0\.weight changed from shape \(4, 4\) to \(2, 8\)"),
        (_untied, r"1\.bias appeared"),
    ],
    ids=lambda f: f.__name__.strip("_") if callable(f) else "",
)
def test_changes_of_structure_are_refused_by_name(change: Any, message: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].bias = module[0].bias
    ema = EMA(sigma_rel=SIGMA)
    ema.update(module)
    before = {name: w.clone() for name, w in ema.average().items()}
    change(module)
    with pytest.raises(StructureError, match=message):
        ema.update(module)
    assert ema.t == 1, "a refused update must not count"
    for name, values in ema.state_dict()["averages"][0].items():
        assert torch.equal(values, before[name])


def test_the_same_model_from_another_object() -> None:
    # Gradient checkpointing libraries, reloads: names decide, not identity.
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    ema = EMA(sigma_rel=SIGMA)
    recorder = Recorder(ema, lambda: dict(current.named_parameters()))
    for step in range(10):
        current = (first, second)[step % 2]
        jitter(current, step)
        recorder.update(current)
    recorder.check()
