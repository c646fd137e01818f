"""PyTorch tensors of every layout, size and fate: all end up as the explicit average."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from posthoc_ema import EMA, PowerFunction, SnapshotStore, StructureError
from tests.parity.runs import as_float64, assert_average, explicit_average, random_walk

SIGMA = 0.1


class Recorder:
    """Updates an EMA and remembers what it was given, by state-dict name."""

    def __init__(self, ema: EMA, tracked: Callable[[], dict[str, torch.Tensor]]) -> None:
        self.ema, self.tracked = ema, tracked
        self.history: list[dict[str, Any]] = []

    def update(self, model: Any) -> None:
        self.ema.update(model)
        self.history.append({n: as_float64(p).copy() for n, p in self.tracked().items()})

    def check(self, dtype: Any = np.float32) -> None:
        steps = len(self.history)
        expected = explicit_average(PowerFunction(SIGMA), range(1, steps + 1), self.history)
        found = {name: self.ema.average(SIGMA)[name] for name in expected}
        assert_average(found, expected, steps, dtype)


def recorded(module: nn.Module, ema: EMA | None = None) -> Recorder:
    return Recorder(ema or EMA(sigma_rel=SIGMA), lambda: dict(module.named_parameters()))


def jitter(model: nn.Module | dict[str, torch.Tensor], seed: int) -> None:
    """Move all floating tensors in place, as an optimiser does."""
    generator = torch.Generator().manual_seed(seed)
    tensors = model.parameters() if isinstance(model, nn.Module) else model.values()
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


def train(recorder: Recorder, model: Any, steps: int, start: int = 0) -> None:
    for step in range(steps):
        jitter(model, start + step)
        recorder.update(model)


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


# Wrappers ------------------------------------------------------------------------------------


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(nn.Linear(3, 3), backend="eager")
        self.head = nn.Linear(3, 1)


PLAIN = {"body.weight", "body.bias", "head.weight", "head.bias"}


def test_compiled_modules_have_plain_names() -> None:
    module = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 1)})
    compiled = torch.compile(module, backend="eager")
    ema = EMA(sigma_rel=SIGMA)
    for model in (compiled, module, compiled):
        jitter(module, 0)
        ema.update(model)
    assert set(ema.average()) == PLAIN
    # Three updates in fact, not one: the average moved away from the first weights.
    assert torch.allclose(ema.average()["body.weight"], module["body"].weight, atol=0.5)
    module.load_state_dict(ema.average(), strict=True)


def test_compiled_submodules_have_plain_names() -> None:
    module = Compiled()
    recorder = Recorder(
        EMA(sigma_rel=SIGMA),
        lambda: {n.replace("_orig_mod.", ""): p for n, p in module.named_parameters()},
    )
    train(recorder, module, 10)
    recorder.check()
    assert set(recorder.ema.average()) == PLAIN


def test_a_submodule_called_module_keeps_its_name() -> None:
    module = nn.ModuleDict({"module": nn.Linear(2, 2)})
    ema = EMA(sigma_rel=SIGMA)
    ema.update(module)
    assert set(ema.average()) == {"module.weight", "module.bias"}


def test_data_parallel_names_are_unwrapped(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        module = nn.Linear(3, 2)
        wrapped = nn.parallel.DistributedDataParallel(module)
        ema = EMA(sigma_rel=SIGMA, snapshots=tmp_path / "ema", every=5)
        recorder = Recorder(ema, lambda: dict(module.named_parameters()))
        train(recorder, wrapped, 10)
        recorder.check()
        both = EMA(sigma_rel=SIGMA)
        both.update(torch.compile(wrapped, backend="eager"))
        assert set(both.average()) == {"weight", "bias"}
        assert [s.t for s in SnapshotStore(tmp_path / "ema").list()] == [5, 10]
    finally:
        torch.distributed.destroy_process_group()


def test_other_processes_of_a_group_leave_writing_to_the_first(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    ema = EMA(sigma_rel=SIGMA, snapshots=tmp_path / "ema", every=1)
    ema.update(nn.Linear(2, 2))
    assert ema.snapshot() == []
    assert not (tmp_path / "ema").exists()


def test_parametrized_modules() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    recorder = recorded(module)
    train(recorder, module, 10)
    recorder.check()
    module.load_state_dict(recorder.ema.average(), strict=True)


# Modes of autograd ---------------------------------------------------------------------------


def test_updates_work_in_any_grad_mode() -> None:
    module = nn.Linear(3, 3)
    recorder = recorded(module)
    for step, mode in enumerate(
        [torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode] * 2
    ):
        jitter(module, step)
        with mode():
            recorder.update(module)
    recorder.check()
    assert not recorder.ema.average()["weight"].requires_grad


def test_an_update_does_not_touch_the_graph() -> None:
    module = nn.Linear(3, 1)
    ema = EMA(sigma_rel=SIGMA)
    loss = module(torch.ones(2, 3)).sum()
    ema.update(module)
    loss.backward()
    assert module.weight.grad is not None


# What an update may do ------------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """Notes every kernel that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def kernels_of(action: Callable[[], object]) -> list[str]:
    with Recording() as recording:
        action()
    # Views, and looks at where a tensor lies, start nothing.
    idle = ("aten.detach", "aten.is_set_to")
    return [name for name in recording.calls if not name.startswith(idle)]


SYNCHRONISING = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"}


def test_updates_never_wait_for_the_device() -> None:
    # Reading one number from a GPU waits for all work before it. The guard against NaN must.
    module = nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50))
    plain, guarded = EMA(), EMA(nonfinite="skip")
    for ema in (plain, guarded):
        for _ in range(2):
            ema.update(module)
    assert not SYNCHRONISING & set(kernels_of(lambda: plain.update(module)))
    assert SYNCHRONISING & set(kernels_of(lambda: guarded.update(module))), "the twin"


def test_small_tensors_are_gathered_into_few_kernels() -> None:
    model = {f"w{k}": torch.zeros(1000) for k in range(500)}
    ema = EMA(sigma_rel=(0.05, 0.10))
    for _ in range(2):
        ema.update(model)
    # 500,000 values: four blocks with a lerp for each track, and the copies that fill them.
    calls = kernels_of(lambda: ema.update(model))
    # is_set_to only compares where tensors lie: no kernel runs.
    calls = [name for name in calls if "is_set_to" not in name]
    assert sum("lerp" in name for name in calls) == 8
    assert len(calls) < 50, Counter(calls)


def test_large_tensors_are_read_where_they_are() -> None:
    model = {"w": torch.zeros(1 << 20)}
    ema = EMA(sigma_rel=(0.05, 0.10))
    for _ in range(2):
        ema.update(model)
    assert not any(
        "copy" in name or "cat" in name for name in kernels_of(lambda: ema.update(model))
    )


class Uncopyable(nn.Module):
    """Holds what deep copies choke on, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.lock = threading.Lock()
        self.stream = (x for x in range(3))

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("this model cannot be copied")


def test_models_that_cannot_be_copied(tmp_path: Any) -> None:
    module = Uncopyable()
    ema = EMA(sigma_rel=SIGMA, snapshots=tmp_path, every=1)
    recorder = recorded(module, ema)
    train(recorder, module, 5)
    recorder.check()
    with ema.applied(module):
        pass


def test_sharded_parameters_are_refused_by_name(tmp_path: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = {"plain": torch.ones(2), "sharded": distribute_tensor(torch.ones(4), mesh)}
        with pytest.raises(StructureError, match=r"sharded is a DTensor \(FSDP2"):
            EMA(sigma_rel=SIGMA).update(model)
    finally:
        torch.distributed.destroy_process_group()


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
