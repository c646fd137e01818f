"""The instruments: any model, exact numbers, nothing changed, and what a run keeps of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from reference_model.checkpoint import load_checkpoint
from reference_model.magnitude_log import (
    MAGNITUDES_FILE,
    by_level,
    level_of,
    output_scales,
    read_magnitudes,
)
from reference_model.magnitudes import record_magnitudes
from reference_model.presets import preset
from reference_model.train import magnitudes_are_due, train
from tests.reference_model.test_ladder_networks import ladder_net
from tests.reference_model.test_network import example_input

TINY = replace(preset("digits-tiny"), total_nimg=320, magnitudes_nimg=96)


def test_numbers_of_a_model_of_ones_own() -> None:
    """A linear layer by hand: features (1, 1) and (3, 7) of two samples."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 3.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record_magnitudes(model) as recorder:
        model(torch.tensor([[1.0, -0.75], [1.0, 0.25]])).sum().backward()
        optimizer.step()
    (layer,) = recorder.layers
    assert layer.name == "0"
    # Float32 rounding.
    activations = 1, math.sqrt((3**2 + 7**2) / 2)
    assert layer.activation == pytest.approx(sum(activations) / 2, rel=1e-6)
    assert layer.activation_max == pytest.approx(activations[1], rel=1e-6)
    weights = math.sqrt(1 / 2), math.sqrt(25 / 2)
    assert layer.weight == pytest.approx(sum(weights) / 2, rel=1e-6)
    assert layer.weight_max == pytest.approx(weights[1], rel=1e-6)
    # Each row moves by 0.1 · Σ inputs = (0.2, -0.05).
    change = math.sqrt(2 * (0.2**2 + 0.05**2))
    assert layer.update == pytest.approx(change / 2, rel=1e-5)
    assert layer.relative_update == pytest.approx(change / math.sqrt(26), rel=1e-5)
    assert layer.resolution == 0


def test_features_of_convolutions_come_first() -> None:
    model = nn.Conv2d(1, 2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.0, 5.0]).reshape(2, 1, 1, 1))
    with record_magnitudes(model) as recorder:
        model(torch.full((3, 1, 4, 6), 2.0))
    (layer,) = recorder.layers
    assert (layer.activation, layer.activation_max, layer.resolution) == (6, 10, 4)
    assert (layer.update, layer.relative_update) == (0, 0)


def test_forward_passes_are_averaged_and_idle_layers_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(1, 1, bias=False), "idle": nn.Linear(1, 1)})
    with torch.no_grad():
        model["used"].weight.fill_(1)
    with record_magnitudes(model) as recorder:
        for x in (1.0, 7.0):
            model["used"](torch.full((1, 1), x))
    used, idle = recorder.layers
    assert used.activation == 5  # √((1 + 49) / 2)
    assert (idle.name, math.isnan(idle.activation)) == ("idle", True)


def test_tokens_are_samples() -> None:
    """A transformer's layers, called with (batch, tokens, channels)."""
    model = nn.Embedding(4, 3)
    with torch.no_grad():
        model.weight.copy_(torch.arange(12.0).reshape(4, 3))
    with record_magnitudes(model) as recorder:
        model(torch.tensor([[0, 1]]))
    features = [math.sqrt((a**2 + b**2) / 2) for a, b in zip((0, 1, 2), (3, 4, 5), strict=True)]
    assert recorder.layers[0].activation == pytest.approx(sum(features) / 3, rel=1e-6)


def test_gains_count_as_part_of_the_layer_before() -> None:
    """As in the paper: activations are taken behind a learned gain; config G starts at zero."""
    net = ladder_net("G")
    with torch.no_grad():
        net.unet.out.gain.weight.zero_()
    with record_magnitudes(net) as recorder:
        net(*example_input(net))
    found = {layer.name: layer for layer in recorder.layers}
    assert found["unet.out.conv"].activation == 0
    assert found["unet.enc.8x8_conv"].activation > 0.1
    assert not any("gain" in name for name in found)


@pytest.mark.parametrize("config", ["C", "G"])
def test_weights_of_sums_do_not_count(config: str) -> None:
    """G folds the weight of MP-Sum into layers; C has plain sums."""
    net = ladder_net(config)
    scales = output_scales(net)
    expected = 0.3 / math.hypot(0.7, 0.3) if config == "G" else 1.0
    ends = {name.rsplit(".", 1)[1] for name in scales}
    assert ends == ({"proj"} if config == "C" else {"conv1", "proj"})
    assert all(share == pytest.approx(expected) for share in scales.values())
    torch.manual_seed(0)
    inputs = example_input(net)
    with record_magnitudes(net) as plain:
        net(*inputs)
    with record_magnitudes(net, scales) as scaled:
        net(*inputs)
    for a, b in zip(plain.layers, scaled.layers, strict=True):
        if math.isfinite(a.activation):
            assert b.activation == pytest.approx(a.activation / scales.get(a.name, 1))


def test_forced_normalisation_is_not_an_update() -> None:
    """What the forward pass does to stored weights is not charged to the optimiser."""
    net = ladder_net("E").train()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    with record_magnitudes(net) as recorder:
        net(*example_input(net))
    ran = [layer for layer in recorder.layers if math.isfinite(layer.activation)]
    assert all(layer.update == 0 and abs(layer.weight - 1) < 1e-3 for layer in ran)


def test_nothing_remains_after_an_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), record_magnitudes(model):
        model(torch.ones(3, 5))
    assert not model._forward_hooks


def test_levels() -> None:
    assert level_of("unet.enc.16x16_block0.residual.conv0") == "enc 16"
    assert level_of("unet.dec.8x8_up.skip") == "dec 8"
    assert level_of("unet.out.conv") is None
    net = ladder_net("F")
    with record_magnitudes(net) as recorder:
        net(*example_input(net))
    levels = by_level(recorder.layers, "activation")
    assert list(levels) == ["enc 8", "enc 4", "dec 4", "dec 8"]
    largest = by_level(recorder.layers, "activation_max")
    assert all(largest[level] > levels[level] for level in levels)


@pytest.mark.parametrize(
    ("nimg", "interval", "due"),
    [
        (0, 96, True),
        (32, 96, False),
        (64, 96, True),
        (96, 96, False),
        (0, 0, False),
        (64, 0, False),
    ],
)
def test_when_a_step_is_recorded(nimg: int, interval: int, due: bool) -> None:
    assert magnitudes_are_due(nimg, 32, interval) == due


def test_a_run_keeps_its_magnitudes_and_is_not_changed_by_them(tmp_path: Path) -> None:
    recorded, plain = tmp_path / "recorded", tmp_path / "plain"
    train(TINY, recorded, progress=False)
    train(replace(TINY, magnitudes_nimg=0), plain, progress=False)
    assert not (plain / MAGNITUDES_FILE).exists()
    lines = read_magnitudes(recorded / MAGNITUDES_FILE)
    assert [nimg for nimg, _, _ in lines] == [32, 96, 192, 288]
    with_it, without = load_checkpoint(recorded), load_checkpoint(plain)
    assert with_it is not None
    assert without is not None
    for name, value in with_it["net"].items():
        torch.testing.assert_close(value, without["net"][name], rtol=0, atol=0, msg=name)
    _, lr, layers = lines[-1]
    assert lr > 0
    assert all(layer.relative_update > 0 for layer in layers)
    # Stored weights have RMS one when the layers use them, but for epsilon (1e-4).
    assert all(abs(layer.weight - 1) < 1e-3 for layer in layers)


def test_a_continued_run_repeats_no_line(tmp_path: Path) -> None:
    """Stopped after 160 images, its checkpoint is that of 160: lines after it are dropped."""
    train(TINY, tmp_path, progress=False, stop_at=160)
    path = tmp_path / MAGNITUDES_FILE
    line = json.loads(path.read_text().splitlines()[-1]) | {"nimg": 192}
    with path.open("a") as file:
        print(json.dumps(line), file=file)
    train(TINY, tmp_path, progress=False)
    assert [nimg for nimg, _, _ in read_magnitudes(path)] == [32, 96, 192, 288]


def test_a_run_may_be_continued_with_another_interval(tmp_path: Path) -> None:
    """Its weights do not depend on what is recorded."""
    train(TINY, tmp_path, progress=False, stop_at=160)
    train(replace(TINY, magnitudes_nimg=64), tmp_path, progress=False)
    found = [nimg for nimg, _, _ in read_magnitudes(tmp_path / MAGNITUDES_FILE)]
    assert found == [32, 96, 192, 256, 320]


def test_a_damaged_log_is_told(tmp_path: Path) -> None:
    path = tmp_path / MAGNITUDES_FILE
    path.write_text('{"nimg": 3}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*magnitudes\.jsonl is not one of magnitudes"):
        read_magnitudes(path)
    assert read_magnitudes(tmp_path / "none.jsonl") == []


def test_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"magnitudes_nimg must be at least 0 \(got -1\)"):
        replace(TINY, magnitudes_nimg=-1)
