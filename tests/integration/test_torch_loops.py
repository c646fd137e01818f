"""Plain loops in PyTorch and numpy: skipped steps, enabling in mid-run, the page and examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop_averages import assert_average, snapshot_of
from page_sections import (
    EXAMPLES,
    SECTIONS,
    assert_averaging_helped,
    run_example,
    run_section,
    sections_with_code,
)

from posthoc_ema import EMA, SnapshotStore, StructureError


def make_model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


# The scaler's own warning that a step was skipped before the learning-rate schedule.
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_step_that_grad_scaler_skipped_counts_as_standing_still() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler, ema, history = torch.amp.GradScaler("cpu", init_scale=8.0), EMA(0.1), {}
    for step in range(1, 13):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
        if step % 4 == 0:
            model[0].weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        ema.update(model)
        history[step] = snapshot_of(model)
    assert np.array_equal(history[3]["0.weight"], history[4]["0.weight"])  # it was skipped
    assert not np.array_equal(history[2]["0.weight"], history[3]["0.weight"])
    assert_average(ema.average(), history, 0.1)


def test_enabling_in_the_middle_with_the_true_time(tmp_path: Path) -> None:
    model, ema, history = make_model(), EMA(0.1, snapshots=tmp_path, every=20), {}
    for step in range(101, 161):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        ema.update(model, t=step)
        history[step] = snapshot_of(model)
    assert_average(ema.average(), history, 0.1)
    assert [s.t for s in SnapshotStore(tmp_path).list()] == [101, 120, 140, 160]
    assert {s.run.t_first for s in SnapshotStore(tmp_path).list()} == {101}


def test_partitioned_weights_are_refused() -> None:
    # What DeepSpeed ZeRO-3 leaves in a module between passes: parameters of no elements.
    model = make_model()
    model[0].weight.data = torch.empty(0)
    model[0].weight.ds_tensor = torch.empty(16)
    with pytest.raises(StructureError, match=r"0\.weight is partitioned by DeepSpeed ZeRO-3"):
        EMA().update(model)


def test_long_lists_of_names_are_looked_up() -> None:
    """Adapters name thousands of tensors: patterns one by one would take a minute."""
    names = [f"layers.{k}.lora" for k in range(3000)]
    model = {name: torch.zeros(1) for name in [*names, "base"]}
    ema = EMA(0.1, include=names)
    ema.update(model)
    tracked = set(ema.state_dict()["averages"][0])
    assert tracked == set(names)
    only = EMA(0.1, include=["layers.1*", "base"], exclude=names[10:12])
    only.update(model)
    tracked = set(only.state_dict()["averages"][0])
    assert "base" in tracked
    assert "layers.12.lora" in tracked
    assert "layers.11.lora" not in tracked


@pytest.mark.parametrize("heading", ["PyTorch", "numpy"])
def test_the_page(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_section(heading) == 2


@pytest.mark.parametrize("name", ["train_torch", "train_numpy"])
def test_the_examples(name: str, tmp_path: Path) -> None:
    assert_averaging_helped(run_example(name, tmp_path))
    with pytest.raises(AssertionError, match="no average is better"):
        assert_averaging_helped({None: 1.0, 0.1: 1.1})


def test_every_section_and_example_is_run_by_a_test() -> None:
    assert sections_with_code() == list(SECTIONS)
    tests = {path.stem: path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    for heading, file in SECTIONS.items():
        assert f'"{heading}"' in tests[file], f"{file} does not run the section {heading}"
    for example in EXAMPLES.glob("*.py"):
        assert any(f'"{example.stem}"' in text for text in tests.values()), example
        assert len(example.read_text().splitlines()) <= 60, f"{example} grew beyond a page"
