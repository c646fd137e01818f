"""``EMA.applied``: averaged weights inside, raw weights afterwards, whatever happens between."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from posthoc_ema import EMA, StateError, StructureError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.add_(1)
        return self.last(self.drop(self.norm(self.first(x))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def ema(net: Net) -> EMA:
    """Two updates: averages and weights differ."""
    ema = EMA(sigma_rel=(0.05, 0.20))
    for _ in range(3):
        ema.update(net)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
    return ema


def everything(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, the non-persistent ones too, as copies."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = everything(module)
    if set(after) != set(before):
        raise AssertionError(f"tensors {set(after) ^ set(before)} appeared or vanished")
    changed = [
        name
        for name in before
        if after[name].dtype != before[name].dtype or not torch.equal(after[name], before[name])
    ]
    if changed:
        raise AssertionError(f"changed: {changed}")


@pytest.mark.parametrize("sigma_rel", [0.05, 0.20])
def test_the_model_holds_the_average_inside_and_its_weights_afterwards(
    net: Net, ema: EMA, sigma_rel: float
) -> None:
    before = everything(net)
    average = ema.average(sigma_rel)
    with ema.applied(net, sigma_rel) as averaged:
        assert averaged is net
        assert net.last.weight is net.first.weight
        for name, value in averaged.named_parameters():
            assert torch.equal(value, average[name]), name
        with pytest.raises(AssertionError, match="changed"):  # the check below can fail
            assert_same(net, before)
    assert_same(net, before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_weights_come_back_after_an_exception(net: Net, ema: EMA, error: Any) -> None:
    before = everything(net)
    with pytest.raises(error), ema.applied(net, 0.05):
        raise error
    assert_same(net, before)
    ema.update(net)  # and the tracker goes on


@pytest.mark.parametrize("number", [1, 2, 3])
def test_weights_come_back_when_the_swap_itself_is_interrupted(
    net: Net, ema: EMA, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # Control-C while the second of several tensors is being copied in.
    before = everything(net)
    original, calls = torch.Tensor.copy_, 0

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt), ema.applied(net, 0.05):
        pytest.fail("the block must not run on half of the averages")
    assert calls > number, "the interruption was real, and copies brought the weights back"
    monkeypatch.undo()
    assert_same(net, before)
    ema.update(net)


def _normalise_weights(net: Net) -> None:
    # Forced weight normalisation rewrites the weights in every forward pass.
    with torch.no_grad():
        net.first.weight.div_(net.first.weight.norm())


def _forward_in_train_mode(net: Net) -> None:
    net.train()
    net(torch.randn(5, 4))


def _train(net: Net) -> None:
    net.train()
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0)
    net(torch.randn(5, 4)).sum().backward()
    optimiser.step()
    net.zero_grad()


def _load(net: Net) -> None:
    net.load_state_dict(Net().state_dict())


def _replace_data(net: Net) -> None:
    net.first.weight.data = torch.zeros(4, 4)


def _replace_parameter(net: Net) -> None:
    net.norm.weight = nn.Parameter(torch.zeros(4))


def _replace_buffer(net: Net) -> None:
    net.norm.running_mean = torch.full((4,), 9.0)


def _replace_submodule(net: Net) -> None:
    net.last = nn.Identity()  # as people do to get features


def _add_submodule(net: Net) -> None:
    net.extra = nn.Linear(2, 2)


def _halve(net: Net) -> None:
    net.half()


def _widen(net: Net) -> None:
    net.double()


@pytest.mark.parametrize(
    "harm",
    [
        _normalise_weights,
        _forward_in_train_mode,
        _train,
        _load,
        _replace_data,
        _replace_parameter,
        _replace_buffer,
        _replace_submodule,
        _add_submodule,
        _halve,
        _widen,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_nothing_done_inside_lasts(net: Net, ema: EMA, harm: Any) -> None:
    before = everything(net)
    identities = [id(parameter) for parameter in net.parameters()]  # what the optimiser holds
    averages = ema.average(0.05)
    with ema.applied(net, 0.05):
        harm(net)
    assert_same(net, before)
    assert [id(parameter) for parameter in net.parameters()] == identities
    for name, value in ema.average(0.05).items():
        assert torch.equal(value, averages[name]), name


def test_tensors_left_out_of_the_averages_come_back_too(net: Net) -> None:
    ema = EMA(sigma_rel=0.1, exclude=["norm.*"])
    ema.update(net)
    before = everything(net)
    with ema.applied(net):
        _train(net)
    assert_same(net, before)


@pytest.mark.parametrize("training", [True, False])
def test_modes_come_back(net: Net, ema: EMA, training: bool) -> None:
    net.train(training)
    net.norm.eval()  # one submodule unlike the others, as when fine-tuning
    modes = [module.training for module in net.modules()]
    with ema.applied(net, 0.05):
        net.train(not training)
    assert [module.training for module in net.modules()] == modes


def test_an_optimiser_goes_on_with_the_same_parameters(net: Net, ema: EMA) -> None:
    identities = [id(parameter) for parameter in net.parameters()]
    addresses = [parameter.data_ptr() for parameter in net.parameters()]
    with ema.applied(net, 0.05):
        pass
    assert [id(parameter) for parameter in net.parameters()] == identities
    assert [parameter.data_ptr() for parameter in net.parameters()] == addresses


def test_nesting_and_updating_inside_are_refused(net: Net, ema: EMA) -> None:
    before = everything(net)
    with ema.applied(net, 0.05):
        with pytest.raises(StateError, match="already active"), ema.applied(net, 0.20):
            pytest.fail("averages of two tracks at once")
        with pytest.raises(StateError, match=r"inside applied\(\): the model holds averages"):
            ema.update(net)
    assert_same(net, before)
    assert ema.t == 3


def test_before_the_first_update_there_is_nothing_to_apply(net: Net) -> None:
    before = everything(net)
    with pytest.raises(StateError, match="call update first"), EMA(sigma_rel=0.1).applied(net):
        pytest.fail("the model would hold zeros")
    assert_same(net, before)


def test_the_track_must_be_named_and_kept(net: Net, ema: EMA) -> None:
    with pytest.raises(ValueError, match=r"several tracks are kept.*say which"), ema.applied(net):
        pass
    with pytest.raises(ValueError, match=r"is not tracked.*reconstruct"), ema.applied(net, 0.07):
        pass


def test_a_model_of_another_structure_is_refused_untouched(ema: EMA) -> None:
    other = nn.Linear(4, 4)
    before = everything(other)
    with pytest.raises(StructureError, match="weight appeared"), ema.applied(other, 0.05):
        pass
    assert_same(other, before)


def test_another_copy_of_the_model_may_take_the_averages(net: Net, ema: EMA) -> None:
    twin = Net()
    with ema.applied(twin, 0.05):
        assert torch.equal(twin.first.weight, ema.average(0.05)["first.weight"])


def test_after_resuming_averages_apply_before_the_first_update(net: Net, ema: EMA) -> None:
    resumed = EMA(sigma_rel=(0.05, 0.20))
    resumed.load_state_dict(ema.state_dict())
    before = everything(net)
    with resumed.applied(net, 0.05):
        assert torch.equal(net.first.weight, ema.average(0.05)["first.weight"])
    assert_same(net, before)


def test_low_precision_models_get_rounded_averages_and_exact_weights_back() -> None:
    net = nn.Linear(8, 8).bfloat16()
    ema = EMA(sigma_rel=0.1)
    for _ in range(3):
        ema.update(net)
        with torch.no_grad():
            net.weight.add_(torch.randn_like(net.weight))
    before = everything(net)
    with ema.applied(net):
        assert net.weight.dtype == torch.bfloat16
        assert torch.equal(net.weight, ema.average()["weight"].bfloat16())
    assert_same(net, before)


def test_frozen_complex_and_compiled_weights() -> None:
    net = nn.Module()
    net.c = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    net.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
    net.layer = nn.Linear(2, 2)
    compiled = torch.compile(net, backend="eager")
    ema = EMA(sigma_rel=0.1)
    ema.update(compiled)
    before = everything(net)
    with torch.no_grad():
        net.c.mul_(1j)
    with ema.applied(compiled):
        assert torch.equal(net.c.detach(), before["c"])
    assert torch.equal(net.c.detach(), before["c"] * 1j)
    assert not net.frozen.requires_grad


# Other frameworks ----------------------------------------------------------------------------


def test_numpy_arrays_are_swapped_in_place() -> None:
    model = {"w": np.zeros(3, np.float32), "inner": {"n": np.array([1])}}
    array = model["w"]
    ema = EMA(sigma_rel=0.1)
    for step in range(3):
        array[:] = step
        ema.update(model)
    with pytest.raises(RuntimeError, match="stop"), ema.applied(model) as averaged:  # noqa: PT012
        assert averaged["w"] is array
        np.testing.assert_array_equal(array, ema.average()["w"])
        array[:] = 100
        averaged["inner"]["n"][:] = 100
        raise RuntimeError("stop")
    np.testing.assert_array_equal(array, 2)
    np.testing.assert_array_equal(model["inner"]["n"], 1)


def test_numpy_arrays_that_cannot_be_swapped_are_named() -> None:
    fixed = np.ones(2)
    fixed.flags.writeable = False
    for odd in (fixed, np.float32(1)):
        model = {"w": np.zeros(1), "odd": odd}
        ema = EMA(sigma_rel=0.1)
        ema.update(model)
        with pytest.raises(StructureError, match="odd cannot be changed"), ema.applied(model):
            pass


def test_mappings_of_torch_tensors_are_swapped_in_place() -> None:
    model = {"w": torch.zeros(3), "n": torch.tensor(1)}
    ema = EMA(sigma_rel=0.1)
    for step in range(3):
        model["w"].fill_(step)
        ema.update(model)
    with ema.applied(model):
        assert torch.equal(model["w"], ema.average()["w"])
        model["n"].fill_(7)
    assert torch.equal(model["w"], torch.full((3,), 2.0))
    assert int(model["n"]) == 1


def test_jax_trees_are_handed_out_in_the_types_of_the_model() -> None:
    model = {"w": jnp.zeros(3, jnp.bfloat16), "n": jnp.array(1), "rate": 0.1}
    ema = EMA(sigma_rel=0.1)
    for step in range(3):
        model = {**model, "w": jnp.full(3, step, jnp.bfloat16)}
        ema.update(model)
    with ema.applied(model) as averaged:
        assert averaged["w"].dtype == jnp.bfloat16
        assert bool((averaged["w"] == ema.average()["w"].astype(jnp.bfloat16)).all())
        assert averaged["n"] is model["n"]
        assert averaged["rate"] == 0.1
        with pytest.raises(StateError, match="inside applied"):
            ema.update(model)
    assert float(model["w"][0]) == 2
