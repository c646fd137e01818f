"""PyTorch Lightning, run for real: steps, checkpoints, validation with averages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT
from loop_averages import assert_average, same, snapshot_of
from page_sections import assert_averaging_helped, run_example, run_section

from posthoc_ema import SnapshotStore, StateError, reconstruct

pytestmark = [
    # Advice of the framework about worker processes and tiny data, and its own deprecations.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    import lightning_runs

    return lightning_runs


@pytest.fixture(scope="module")
def ema_callback(runs: ModuleType) -> Any:
    from posthoc_ema.integrations.lightning import EMACallback

    return EMACallback


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_optimizer_step_is_averaged(
    runs: Any, ema_callback: Any, tmp_path: Path, accumulate: int
) -> None:
    callback = ema_callback(snapshots=tmp_path / "ema", every=5)
    net = runs.make_net()
    trainer = runs.make_trainer(tmp_path, callback, accumulate_grad_batches=accumulate)
    trainer.fit(net, runs.data())
    # 8 batches an epoch; Lightning steps at the end of an epoch too.
    steps = 2 * 8 if accumulate == 1 else 2 * 3
    assert callback.ema.t == trainer.global_step == steps
    assert len(net.history) == steps
    for sigma_rel in (0.05, 0.10):
        assert_average(callback.ema.average(sigma_rel), net.history, sigma_rel)
    # One more at the end, though none was due.
    written = {s.t for s in SnapshotStore(tmp_path / "ema").list()}
    assert written == {*range(5, steps + 1, 5), steps}
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_average(callback.ema.average(0.05), net.history, 0.10)
    net.load_state_dict(reconstruct(tmp_path / "ema", 0.07).state_dict())


@pytest.mark.parametrize("optimizers", [1, 2])
def test_manual_optimization(runs: Any, ema_callback: Any, tmp_path: Path, optimizers: int) -> None:
    callback = ema_callback()
    net = runs.make_net(manual=optimizers)
    runs.make_trainer(tmp_path, callback).fit(net, runs.data())
    assert callback.ema.t == 16 * optimizers  # the steps of all optimizers
    assert_average(callback.ema.average(0.1), net.history, 0.1)


def test_time_in_images(runs: Any, ema_callback: Any, tmp_path: Path) -> None:
    callback = ema_callback(0.1, t=lambda trainer, module: 8 * trainer.global_step, unit="images")
    net = runs.make_net()
    runs.make_trainer(tmp_path, callback).fit(net, runs.data())
    assert callback.ema.t == 128
    assert_average(callback.ema.average(), net.history, 0.1)  # its shape follows relative time


def test_a_resumed_run_equals_an_uninterrupted_one(
    runs: Any, ema_callback: Any, tmp_path: Path
) -> None:
    whole = ema_callback(snapshots=tmp_path / "whole", every=4)
    runs.make_trainer(tmp_path, whole).fit(runs.make_net(), runs.data())

    first = ema_callback(snapshots=tmp_path / "cut", every=4)
    trainer = runs.make_trainer(tmp_path, first, max_epochs=1)
    trainer.fit(runs.make_net(), runs.data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    # The first process goes on a little: that future will be given up.
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, runs.data())
    second = ema_callback(snapshots=tmp_path / "cut", every=4)
    runs.make_trainer(tmp_path, second).fit(
        runs.make_net(), runs.data(), ckpt_path=tmp_path / "half.ckpt"
    )

    for sigma_rel in (0.05, 0.10):
        assert same(whole.ema.average(sigma_rel), second.ema.average(sigma_rel))
    digests = [
        [s.digests["averages"] for s in SnapshotStore(tmp_path / name).list()]
        for name in ("whole", "cut")
    ]
    assert digests[0] == digests[1]
    assert len(list((tmp_path / "cut" / "abandoned").rglob("*.safetensors"))) == 4


def test_fit_twice_goes_on(runs: Any, ema_callback: Any, tmp_path: Path) -> None:
    callback = ema_callback()
    net = runs.make_net()
    trainer = runs.make_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(net, runs.data())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, runs.data())
    assert callback.ema.t == 16
    assert_average(callback.ema.average(0.05), net.history, 0.05)


def test_averages_of_another_run_do_not_go_on(runs: Any, ema_callback: Any, tmp_path: Path) -> None:
    callback = ema_callback()
    runs.make_trainer(tmp_path, callback, max_epochs=1).fit(runs.make_net(), runs.data())
    before = callback.ema.average(0.1)
    with pytest.raises(StateError, match=r"stand at t=8, but training goes on at t=0 .*new callb"):
        runs.make_trainer(tmp_path, callback).fit(runs.make_net(), runs.data())
    assert same(before, callback.ema.average(0.1))


@pytest.fixture
def old_checkpoint(runs: Any, tmp_path: Path) -> Path:
    """From before the EMA was added."""
    trainer = runs.make_trainer(tmp_path, max_epochs=1)
    trainer.fit(runs.make_net(), runs.data())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    return tmp_path / "old.ckpt"


def test_a_checkpoint_without_averages_is_refused(
    runs: Any, ema_callback: Any, tmp_path: Path, old_checkpoint: Path
) -> None:
    callback = ema_callback()
    with pytest.raises(StateError, match=r'at step 8 .*holds no averages.*start="here"'):
        runs.make_trainer(tmp_path, callback).fit(
            runs.make_net(), runs.data(), ckpt_path=old_checkpoint
        )
    assert callback.ema.t == 0


def test_averages_in_memory_do_not_outlive_an_older_checkpoint(
    runs: Any, ema_callback: Any, tmp_path: Path, old_checkpoint: Path
) -> None:
    # The same step, even: those in memory are of another run.
    callback = ema_callback(start="here")
    runs.make_trainer(tmp_path, callback, max_epochs=1).fit(runs.make_net(), runs.data())
    with pytest.raises(StateError, match="from a checkpoint that holds no averages"):
        runs.make_trainer(tmp_path, callback).fit(
            runs.make_net(), runs.data(), ckpt_path=old_checkpoint
        )
    evaluating = ema_callback(validate_with=0.1)
    runs.make_trainer(tmp_path, evaluating, max_epochs=1).fit(runs.make_net(), runs.data())
    with pytest.raises(StateError, match="not its own"):
        runs.make_trainer(tmp_path, evaluating).validate(
            runs.make_net(), runs.data(), ckpt_path=old_checkpoint, verbose=False
        )


def test_averages_may_begin_in_the_middle(
    runs: Any, ema_callback: Any, tmp_path: Path, old_checkpoint: Path
) -> None:
    callback = ema_callback(start="here", snapshots=tmp_path / "ema", every=4)
    net = runs.make_net()
    runs.make_trainer(tmp_path, callback).fit(net, runs.data(), ckpt_path=old_checkpoint)
    assert sorted(net.history) == list(range(9, 17))
    assert_average(callback.ema.average(0.1), net.history, 0.1)
    assert {s.run.t_first for s in SnapshotStore(tmp_path / "ema").list()} == {9}


def test_another_runs_snapshots_are_not_overwritten(
    runs: Any, ema_callback: Any, tmp_path: Path, old_checkpoint: Path
) -> None:
    first = ema_callback(snapshots=tmp_path / "ema", every=4)
    runs.make_trainer(tmp_path, first, max_epochs=1).fit(runs.make_net(), runs.data())
    kept = {p.name: p.read_bytes() for p in (tmp_path / "ema").glob("*.safetensors")}
    second = ema_callback(snapshots=tmp_path / "ema", every=4, start="here")
    with pytest.raises(ValueError, match="belongs to another run"):
        runs.make_trainer(tmp_path, second).fit(
            runs.make_net(), runs.data(), ckpt_path=old_checkpoint
        )
    assert {p.name: p.read_bytes() for p in (tmp_path / "ema").glob("*.safetensors")} == kept


def test_validation_sees_averages_and_checkpoints_do_not(
    runs: Any, ema_callback: Any, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    callback = ema_callback(validate_with=0.1)
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)  # after each validation
    net = runs.make_net(save_in_validation=tmp_path / "inside.ckpt")
    trainer = runs.make_trainer(
        tmp_path, callback, saver, enable_checkpointing=True, num_sanity_val_steps=1
    )
    trainer.fit(net, runs.data(), runs.data(8))

    steps, weights = zip(*net.validated, strict=True)
    assert steps == (0, 8, 16)
    for step, seen in zip(steps[1:], weights[1:], strict=True):
        history = {t: w for t, w in net.history.items() if t <= step}
        assert_average(seen, history, 0.1)
        assert not same(seen, net.history[step])
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert same(net.history[step], saved["state_dict"])
        assert saved["callbacks"]["EMACallback"]["t"] == step
    # Saved by the module itself in the middle of validation, while it held averages.
    assert same(
        net.history[16], torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]
    )
    assert same(net.history[16], snapshot_of(net))

    net.save = None
    trainer.test(net, runs.data(8), verbose=False)
    assert_average(net.validated[-1][1], net.history, 0.1)
    assert same(net.history[16], snapshot_of(net))


@pytest.mark.parametrize("error", [ValueError("bad batch"), KeyboardInterrupt()])
def test_weights_come_back_after_an_exception_in_validation(
    runs: Any, ema_callback: Any, tmp_path: Path, error: BaseException
) -> None:
    net = runs.make_net(fail_at=(8, error))
    callback = ema_callback(validate_with=0.05)
    trainer = runs.make_trainer(tmp_path, callback)
    # Lightning turns Control-C into SystemExit.
    with pytest.raises((ValueError, SystemExit)):
        trainer.fit(net, runs.data(), runs.data(8))
    assert not same(net.validated[-1][1], net.history[8])
    assert same(snapshot_of(net), net.history[8])
    callback.ema.update(net, t=9)  # not inside applied() any more


def test_a_track_that_is_not_kept_is_noticed_at_once(ema_callback: Any) -> None:
    with pytest.raises(ValueError, match=r"validate_with=0.07 is not among the tracks \(0.05, 0"):
        ema_callback(validate_with=0.07)
    with pytest.raises(ValueError, match=r"start must be one of 'scratch', 'here'"):
        ema_callback(start="there")


def test_mixed_precision_and_compiled_parts(runs: Any, ema_callback: Any, tmp_path: Path) -> None:
    callback = ema_callback(0.1)
    net = runs.make_net()
    net.net[0] = torch.compile(net.net[0], backend="eager")
    runs.make_trainer(tmp_path, callback, precision="bf16-mixed", max_epochs=1).fit(
        net, runs.data()
    )
    history = {
        t: {name.replace("._orig_mod", ""): w for name, w in weights.items()}
        for t, weights in net.history.items()
    }
    assert_average(callback.ema.average(), history, 0.1)


def test_pytorch_lightning_by_its_older_name(runs: Any, ema_callback: Any, tmp_path: Path) -> None:
    import pytorch_lightning

    class Old(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            self.history: dict[float, Any] = {}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).square().mean()

        def on_train_batch_end(self, *batch: Any) -> None:
            self.history[self.trainer.global_step] = snapshot_of(self)

        validation_step = training_step

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    callback, net = ema_callback(validate_with=0.1), Old()
    trainer = runs.make_trainer(tmp_path, callback, package=pytorch_lightning)
    trainer.fit(net, runs.data(), runs.data(8))
    assert_average(callback.ema.average(0.05), net.history, 0.05)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    resumed = ema_callback(validate_with=0.1)
    runs.make_trainer(tmp_path, resumed, package=pytorch_lightning, max_epochs=3).fit(
        Old(), runs.data(), runs.data(8), ckpt_path=tmp_path / "old.ckpt"
    )
    assert resumed.ema.t == 24


def test_the_swap_does_not_survive_its_own_failure() -> None:
    from posthoc_ema.integrations.loop import Swap

    class Broken:
        def applied(self, model: Any, sigma_rel: Any) -> Any:
            raise StateError("no averages")

    swap = Swap()
    with pytest.raises(StateError):
        swap.enter(Broken(), SimpleNamespace(), 0.1)  # type: ignore[arg-type]
    assert not swap.active


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "home"),
    [
        ("import pytorch_lightning", "pytorch_lightning.callbacks"),
        ("import lightning, pytorch_lightning", "lightning.pytorch.callbacks"),
        ("", "lightning.pytorch.callbacks"),
    ],
)
def test_the_callback_is_one_of_the_package_in_use(first: str, home: str) -> None:
    code = f"{first}\nfrom posthoc_ema.integrations.lightning import EMACallback as E\n"
    code += "print(E.__mro__[1].__module__)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == f"{home}.callback"


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (ROOT, here, here.parent)))
    subprocess.run(
        [sys.executable, here / "lightning_ddp.py", tmp_path],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths},
    )
    ranks = [json.loads((tmp_path / f"rank-{k}.json").read_text()) for k in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["t"] == 8  # 8 batches, shared by two, in each of two epochs
    snapshots = SnapshotStore(tmp_path / "ema").verify()
    assert [s.t for s in snapshots] == [4, 4, 8, 8]
    sums = {
        n: float(v.double().sum()) for n, v in reconstruct(tmp_path / "ema", 0.1).params.items()
    }
    assert sums == ranks[0]["sums"]


@pytest.mark.parametrize("heading", ["PyTorch Lightning"])
def test_the_page(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_section(heading) == 2


@pytest.mark.parametrize("name", ["train_lightning"])
def test_the_examples(name: str, tmp_path: Path) -> None:
    assert_averaging_helped(run_example(name, tmp_path))
