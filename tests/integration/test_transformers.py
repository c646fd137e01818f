"""A real ``transformers.Trainer``: steps, checkpoints, resuming, evaluation with averages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from loop_averages import assert_average, same, snapshot_of
from page_sections import assert_averaging_helped, run_example, run_section
from safetensors.torch import load_file

from posthoc_ema import EMA, CorruptSnapshotError, SnapshotStore, StateError, reconstruct

pytestmark = [
    # Deprecations inside the framework and of its saved generators' state.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    import trainer_runs

    return trainer_runs


@pytest.fixture(scope="module")
def ema_callback(runs: ModuleType) -> Any:
    from posthoc_ema.integrations.transformers import EMACallback

    return EMACallback


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_optimizer_step_is_averaged(
    runs: Any, ema_callback: Any, tmp_path: Path, accumulate: int
) -> None:
    callback, history = ema_callback(snapshots=tmp_path / "ema", every=5), runs.History()
    trainer = runs.make_trainer(tmp_path, callback, history, gradient_accumulation_steps=accumulate)
    trainer.train()
    assert callback.ema.t == trainer.state.global_step == 24 // accumulate
    for sigma_rel in (0.05, 0.10):
        assert_average(callback.ema.average(sigma_rel), history.weights, sigma_rel)
    # One more at the end, though none was due.
    written = {s.t for s in SnapshotStore(tmp_path / "ema").list()}
    assert written == {*range(5, 24 // accumulate, 5), 24 // accumulate}
    # Tied weights included.
    trainer.model.load_state_dict(reconstruct(tmp_path / "ema", 0.07).state_dict())


@pytest.mark.parametrize("load_best", [False, True])
def test_a_run_that_stops_early(
    runs: Any, ema_callback: Any, tmp_path: Path, load_best: bool
) -> None:
    class Stop(runs.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    callback, history = ema_callback(snapshots=tmp_path / "ema", every=100), runs.History()
    strategies = {"eval_strategy": "epoch", "save_strategy": "epoch"} if load_best else {}
    runs.make_trainer(
        tmp_path, callback, history, Stop(), load_best_model_at_end=load_best, **strategies
    ).train()
    assert [s.t for s in SnapshotStore(tmp_path / "ema").list()] == [12, 12]
    assert_average(reconstruct(tmp_path / "ema", 0.1).params, history.weights, 0.1)


def test_time_in_tokens(runs: Any, ema_callback: Any, tmp_path: Path) -> None:
    callback = ema_callback(
        0.1, t=lambda args, state: state.num_input_tokens_seen, unit="tokens", snapshots=tmp_path,
        every=1,
    )  # fmt: skip
    runs.make_trainer(
        tmp_path / "run", callback, max_steps=3, include_num_input_tokens_seen="all"
    ).train()
    assert [s.t for s in SnapshotStore(tmp_path).list()] == [32, 64, 96]
    callback = ema_callback(0.1, t=lambda args, state: state.num_input_tokens_seen)
    with pytest.raises(ValueError, match=r"include_num_input_tokens_seen=True"):
        runs.make_trainer(tmp_path / "uncounted", callback, max_steps=3).train()


def test_a_resumed_run_equals_an_uninterrupted_one(
    runs: Any, ema_callback: Any, tmp_path: Path
) -> None:
    whole = ema_callback(snapshots=tmp_path / "ema-whole", every=6)
    runs.make_trainer(tmp_path / "whole", whole).train()

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 10}
    first = ema_callback(snapshots=tmp_path / "ema-cut", every=6)
    runs.make_trainer(tmp_path / "cut", first, **options).train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-24")  # killed before, say
    shutil.rmtree(tmp_path / "cut" / "checkpoint-20")
    assert (tmp_path / "cut" / "checkpoint-10" / "ema_state.safetensors").is_file()
    second = ema_callback(snapshots=tmp_path / "ema-cut", every=6)
    runs.make_trainer(tmp_path / "cut", second, **options, model=runs.tiny_gpt2(seed=5)).train(
        resume_from_checkpoint=True
    )
    for sigma_rel in (0.05, 0.10):
        assert same(whole.ema.average(sigma_rel), second.ema.average(sigma_rel))
    digests = [
        [s.digests["averages"] for s in SnapshotStore(tmp_path / name).list()]
        for name in ("ema-whole", "ema-cut")
    ]
    assert digests[0] == digests[1]
    assert len(list((tmp_path / "ema-cut" / "abandoned").rglob("*.safetensors"))) == 6

    # The folder elsewhere: callbacks are not told where from, and guess nothing.
    (tmp_path / "cut" / "checkpoint-10").rename(tmp_path / "moved")
    for resume_from in (None, tmp_path / "moved"):
        third = ema_callback(resume_from=resume_from)
        trainer = runs.make_trainer(tmp_path / "elsewhere", third, max_steps=12)
        if resume_from is None:
            with pytest.raises(StateError, match=r"of step 10 .*EMACallback\(resume_from=folder"):
                trainer.train(resume_from_checkpoint=str(tmp_path / "moved"))
        else:
            trainer.train(resume_from_checkpoint=str(tmp_path / "moved"))
            assert third.ema.t == 12


def test_another_runs_averages_are_not_taken(runs: Any, ema_callback: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    for name in ("one", "two"):
        runs.make_trainer(tmp_path / name, ema_callback(), **options).train()
    state = Path("checkpoint-4", "ema_state.safetensors")
    shutil.copy(tmp_path / "one" / state, tmp_path / "two" / state)
    with pytest.raises(StateError, match=r"but no ema_state\.safetensors in .* holds them"):
        runs.make_trainer(tmp_path / "two", ema_callback(), max_steps=8).train(
            resume_from_checkpoint=True
        )
    (tmp_path / "two" / state).unlink()  # saving was killed before it came to the averages
    callback = ema_callback(start="here")  # which does not mean to forget what there was
    with pytest.raises(StateError, match="if saving it was cut short, resume from an earlier one"):
        runs.make_trainer(tmp_path / "two", callback, max_steps=8).train(
            resume_from_checkpoint=True
        )


@pytest.fixture
def old_run(runs: Any, tmp_path: Path) -> Path:
    """From before the EMA was added."""
    runs.make_trainer(tmp_path / "old", save_strategy="steps", save_steps=4, max_steps=4).train()
    return tmp_path / "old"


def test_a_checkpoint_without_averages_is_refused(
    runs: Any, ema_callback: Any, old_run: Path
) -> None:
    with pytest.raises(StateError, match=r'at step 4 .*holds no averages.*start="here"'):
        runs.make_trainer(old_run, ema_callback(), max_steps=8).train(resume_from_checkpoint=True)
    stale = ema_callback(start="here")
    runs.make_trainer(old_run / "other", stale, max_steps=4).train()
    with pytest.raises(StateError, match="from a checkpoint that holds no averages"):
        runs.make_trainer(old_run, stale, max_steps=8).train(resume_from_checkpoint=True)
    with pytest.raises(StateError, match=r"stand at t=4, but training goes on at t=0"):
        runs.make_trainer(old_run / "third", stale, max_steps=4).train()


def test_averages_may_begin_in_the_middle(runs: Any, ema_callback: Any, old_run: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    callback, history = ema_callback(start="here"), runs.History()
    runs.make_trainer(old_run, callback, history, max_steps=8, **options).train(
        resume_from_checkpoint=True
    )
    assert sorted(history.weights) == [5, 6, 7, 8]
    assert_average(callback.ema.average(0.1), history.weights, 0.1)

    # Steps without it, then with it again: what it noted at step 8 is not of step 12.
    runs.make_trainer(old_run, max_steps=12, **options).train(resume_from_checkpoint=True)
    with pytest.raises(StateError, match=r"at step 12 .*holds no averages"):
        runs.make_trainer(old_run, ema_callback(), max_steps=16).train(resume_from_checkpoint=True)
    again = ema_callback(start="here")
    runs.make_trainer(old_run, again, max_steps=16).train(resume_from_checkpoint=True)
    assert again.ema.t == 16


def test_evaluation_sees_averages_and_checkpoints_do_not(
    runs: Any, ema_callback: Any, tmp_path: Path
) -> None:
    callback, history = ema_callback(), runs.History()
    trainer = runs.make_trainer(
        tmp_path, callback, history, max_steps=8, save_strategy="steps", save_steps=4,
        eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, eval_on_start=True,
    )  # fmt: skip
    callback.evaluate_with(trainer, 0.05)  # the last call holds
    callback.evaluate_with(trainer, 0.1)
    trainer.train()
    assert [step for step, _ in history.evaluated] == [0, 4, 8]
    for step, seen in history.evaluated[1:]:
        past = {t: w for t, w in history.weights.items() if t <= step}
        assert_average(seen, past, 0.1)
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert same({k: v.numpy() for k, v in saved.items()}, history.weights[step])
    # The best by the averages' loss; its raw weights.
    best = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert same(snapshot_of(trainer.model), history.weights[best["best_global_step"]])

    before = snapshot_of(trainer.model)
    trainer.predict(runs.data(4))
    assert same(before, snapshot_of(trainer.model))

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    trainer.prediction_step = broken
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    assert same(before, snapshot_of(trainer.model))
    with pytest.raises(ValueError, match=r"sigma_rel=0\.07 is not among the tracks"):
        callback.evaluate_with(trainer, 0.07)


def test_adapters_alone_in_a_trainer(runs: Any, ema_callback: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def model() -> Any:
        lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        return get_peft_model(runs.tiny_gpt2(), lora)

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole = ema_callback()
    runs.make_trainer(tmp_path / "whole", whole, model=model(), max_steps=6).train()
    first, second = ema_callback(), ema_callback()
    runs.make_trainer(tmp_path / "cut", first, model=model(), max_steps=6, **options).train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    state = load_file(tmp_path / "cut" / "checkpoint-3" / "ema_state.safetensors")
    assert all("lora_" in name for name in state)
    runs.make_trainer(tmp_path / "cut", second, model=model(), max_steps=6, **options).train(
        resume_from_checkpoint=True
    )
    assert whole.ema.average(0.1)
    assert same(whole.ema.average(0.1), second.ema.average(0.1))


def test_state_files(runs: Any, tmp_path: Path) -> None:
    from posthoc_ema.integrations.state_file import load_state, read_identity, save_state

    ema = EMA((0.05, 0.1), unit="images")
    for k in range(3):
        ema.update(
            {
                "a.b": torch.randn(3, 2).t(),
                "z": torch.randn(2, dtype=torch.complex64),
                "d": torch.randn((), dtype=torch.float64),
                "empty": torch.zeros(0, 2),
                "n": torch.tensor(k),
            },
            t=2**40 + k,  # a number of images that float32 cannot hold
        )
    state, path = ema.state_dict(), tmp_path / "ema_state.safetensors"
    save_state(state, path)
    loaded = load_state(path)
    assert {k: v for k, v in state.items() if k != "averages"} == {
        k: v for k, v in loaded.items() if k != "averages"
    }
    for before, after in zip(state["averages"], loaded["averages"], strict=True):
        assert set(before) == set(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(before[name].dtype == after[name].dtype for name in before)
    assert read_identity(path) == (state["run_id"], 2**40 + 2)

    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptSnapshotError, match="ema_state"):
        load_state(path)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(StateError, match="is no state of an EMA"):
        load_state(path)


@pytest.mark.parametrize("heading", ["transformers.Trainer"])
def test_the_page(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_section(heading) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_transformers"])
def test_the_examples(name: str, tmp_path: Path) -> None:
    assert_averaging_helped(run_example(name, tmp_path))
