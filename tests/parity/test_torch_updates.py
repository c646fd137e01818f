"""Wrapped models, modes of autograd, and what an update does and does not do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from posthoc_ema import EMA, SnapshotStore, native
from tests.parity.torch_runs import SIGMA, Recorder, jitter, recorded, train

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


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled loops, which serve the CPU alone, all work is PyTorch's."""
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_updates_never_wait_for_the_device() -> None:
    # Reading one number from a GPU waits for all work before it. The guard against NaN must.
    module = nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50))
    plain, guarded = EMA(), EMA(nonfinite="skip")
    for ema in (plain, guarded):
        for _ in range(2):
            ema.update(module)
    assert not SYNCHRONISING & set(kernels_of(lambda: plain.update(module)))
    assert SYNCHRONISING & set(kernels_of(lambda: guarded.update(module))), "the twin"


@pytest.mark.usefixtures("as_on_a_gpu")
def test_small_tensors_are_gathered_into_few_kernels() -> None:
    model = {f"w{k}": torch.zeros(1000) for k in range(500)}
    ema = EMA(sigma_rel=(0.05, 0.10))
    for _ in range(2):
        ema.update(model)
    # 500,000 values: four blocks with one lerp for both tracks, and the copies that fill them.
    calls = kernels_of(lambda: ema.update(model))
    # is_set_to only compares where tensors lie: no kernel runs.
    calls = [name for name in calls if "is_set_to" not in name]
    assert sum("lerp" in name for name in calls) == 4
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
