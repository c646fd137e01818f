"""Training of the seven configs: habits, that they learn, and what weights and activations do."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from reference_model import Denoiser
from reference_model.checkpoint import load_config
from reference_model.cli import main
from reference_model.data import load_dataset
from reference_model.encoders import make_encoder
from reference_model.ladder import LADDER, leave_out, with_config
from reference_model.loss import EDM2Loss
from reference_model.magnitude_log import by_level, output_scales
from reference_model.magnitudes import record_magnitudes
from reference_model.mp_layers import MPConv
from reference_model.presets import preset
from reference_model.train import train


@pytest.mark.parametrize(
    ("config", "batch", "lr", "t_ref", "beta2", "scaling", "noise", "dropout"),
    [
        ("A", 4096, 1e-4, 0, 0.999, 100, (-1.2, 1.2), 0.1),
        ("B", 2048, 2e-4, 0, 0.99, 100, (-0.4, 1.0), 0.1),
        ("C", 2048, 2e-4, 0, 0.99, 100, (-0.4, 1.0), 0.1),
        ("D", 2048, 1e-2, 0, 0.99, 1, (-0.4, 1.0), 0.1),
        ("E", 2048, 1e-2, 70_000, 0.99, 1, (-0.4, 1.0), 0.1),
        ("F", 2048, 1e-2, 70_000, 0.99, 1, (-0.4, 1.0), 0.1),
        ("G", 2048, 1e-2, 70_000, 0.99, 1, (-0.4, 1.0), 0.0),
    ],
)
def test_habits_at_size_s_are_those_of_the_paper(
    config: str,
    batch: int,
    lr: float,
    t_ref: int,
    beta2: float,
    scaling: float,
    noise: tuple[float, float],
    dropout: float,
) -> None:
    """Table 1 with App. B, for ImageNet-512."""
    c = preset("edm2-img512-s", config=config)
    assert (c.batch_size, c.ref_batches, c.betas) == (batch, t_ref, (0.9, beta2))
    assert c.ref_lr == pytest.approx(lr, rel=1e-12)  # a product of two decimals
    assert (c.loss_scaling, (c.P_mean, c.P_std)) == (scaling, noise)
    assert (c.network.config, c.network.dropout) == (config, dropout)
    assert c.network.attn_resolutions == ((32, 16, 8) if config == "A" else (16, 8))
    assert c.ema_sigma_rel == ((0.05, 0.0629, 0.1) if config == "A" else (0.05, 0.1))
    assert (c.total_nimg, c.rampup_nimg) == (2**31, 10_000_000)


def test_habits_on_other_data() -> None:
    """Noise levels that suit the data stay, but for A; ratios stay; A attends a level finer."""
    g, a, b = (preset("digits", config=c) for c in "GAB")
    assert (b.P_mean, b.P_std) == (g.P_mean, g.P_std)
    assert (a.P_mean, a.P_std) == (-1.2, 1.2)
    assert (a.batch_size, b.batch_size) == (2 * g.batch_size, g.batch_size)
    assert b.ref_lr / g.ref_lr == pytest.approx(0.02)
    assert (a.network.attn_resolutions, b.network.attn_resolutions) == ((8, 4), (4,))
    everywhere = replace(g, network=replace(g.network, attn_resolutions=(8, 4)))
    assert with_config(everywhere, "A").network.attn_resolutions == (8, 4)
    nowhere = replace(g, network=replace(g.network, attn_resolutions=()))
    assert with_config(nowhere, "A").network.attn_resolutions == ()
    assert with_config(g, "G") == g


def test_classical_ema_of_config_a() -> None:
    """Half-life 5 % of the training so far: the power function of γ + 1 = ln 2 / 0.05."""
    from posthoc_ema import sigma_rel_to_gamma

    gamma = math.log(2) / 0.05 - 1
    # Four decimals of σ_rel = 0.06289.
    assert float(sigma_rel_to_gamma(0.0629)) == pytest.approx(gamma, rel=2e-3)


def test_configs_that_cannot_be_changed_are_told() -> None:
    with pytest.raises(ValueError, match=r"config must be one of A, B, .* \(got 'H'\)"):
        preset("digits", config="H")
    with pytest.raises(ValueError, match="habits of config C follow from those of config G"):
        with_config(preset("digits", config="B"), "C")


def test_command_brings_the_habits_of_a_config(tmp_path: Path) -> None:
    """`--config` and `--leave-out` replace all they concern; other options come on top."""
    options = ["--preset", "digits-tiny", "--config", "E", "--dropout", "0.3", "--quiet"]
    options += ["--leave-out", "lr_decay,ones_channel", "--total-nimg", "64"]
    for _ in range(2):  # the second time it is a finished run, with the same options
        done = CliRunner().invoke(main, ["train", *options, "--run-dir", str(tmp_path)])
        assert done.exit_code == 0, done.output
    wanted = leave_out(preset("digits-tiny", config="E"), ["lr_decay", "ones_channel"])
    network = replace(wanted.network, dropout=0.3)
    assert load_config(tmp_path) == replace(wanted, network=network, total_nimg=64)


def test_command_refuses_to_change_a_runs_config(tmp_path: Path) -> None:
    start = ["train", "--preset", "digits-tiny", "--quiet", "--run-dir", str(tmp_path)]
    assert CliRunner().invoke(main, [*start, "--total-nimg", "32"]).exit_code == 0
    done = CliRunner().invoke(main, [*start, "--total-nimg", "32", "--config", "F"])
    assert done.exit_code == 1
    assert "was started with network.config='G' (now 'F')" in done.output


@pytest.mark.parametrize("config", list(LADDER))
def test_every_config_trains_from_its_habits(tmp_path: Path, config: str) -> None:
    """A run of the command's function: checkpoints, snapshots and statistics like any other."""
    c = replace(preset("digits-tiny", config=config), total_nimg=128)
    assert train(c, tmp_path, progress=False) == 128
    assert (tmp_path / "checkpoint.pt").exists()
    assert list((tmp_path / "ema").glob("*.safetensors"))


def weighted_error(net: Denoiser, images: Tensor, labels: Tensor, loss_fn: EDM2Loss) -> float:
    """Mean of λ · ‖D − y‖², without what uncertainty makes of it, at the same noise each time."""

    def certain(x: Tensor, sigma: Tensor, classes: Tensor, return_logvar: bool) -> tuple[Any, Any]:
        return net(x, sigma, classes), torch.zeros(len(x), 1, 1, 1)

    net.eval()
    with torch.no_grad():
        loss = loss_fn(certain, images, labels, generator=torch.Generator().manual_seed(0))
    net.train()
    return float(loss.mean())


def learn(config: str, steps: int, lr: float | None = None) -> tuple[float, list[Any]]:
    """Train on the digits for a while.

    Returns:
        The weighted error after relative to before; magnitudes of layers at the first step and
        at the last.
    """
    c = preset("digits-tiny", config=config)
    data, encoder = load_dataset(c.data), make_encoder(c.encoder)
    torch.manual_seed(0)
    net = Denoiser(c.network)
    loss_fn = EDM2Loss(c.P_mean, c.P_std)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr or c.ref_lr, betas=c.betas)
    images, labels = data.stream(0, 128, seed=1)
    check = encoder.encode(images), labels, loss_fn
    before, found = weighted_error(net, *check), []
    for step in range(steps):
        images, labels = data.stream(step * c.batch_size, c.batch_size, seed=0)
        optimizer.zero_grad()
        recorded = step in (0, steps - 1)
        with record_magnitudes(net, output_scales(net)) if recorded else nullcontext() as recorder:
            (loss_fn(net, encoder.encode(images), labels).sum() / c.batch_size).backward()
            optimizer.step()
        if recorder is not None:
            found.append(recorder.layers)
    return weighted_error(net, *check) / before, found


@pytest.mark.parametrize("config", list(LADDER))
def test_every_config_learns(config: str) -> None:
    """After 30 steps from its own habits; A, which takes the smallest ones, is the slowest."""
    ratio, _ = learn(config, steps=30)
    assert ratio < 0.93


def mean(layers: list[Any], field: str) -> float:
    levels = by_level(layers, field)
    return sum(levels.values()) / len(levels)


@pytest.mark.slow
def test_magnitudes_drift_in_c_and_stand_still_in_e_and_g() -> None:
    """The paper's Figure 3 in little: 100 steps at a rate at which C drifts visibly.

    Seen: activations of C times 4.0, of D and E times 1.5, of G times 2.2 (it starts with gains
    of zero); weights of C times 1.37.
    """
    activation, weight = {}, {}
    for config, lr in (("C", 0.01), ("D", 0.05), ("E", 0.05), ("G", 0.05)):
        _, (first, last) = learn(config, steps=100, lr=lr)
        activation[config] = mean(last, "activation") / mean(first, "activation")
        weight[config] = mean(last, "weight") / mean(first, "weight")
    # Half of what was seen to separate them; another machine rounds otherwise.
    assert activation["C"] > 1.4 * max(activation["D"], activation["E"], activation["G"])
    assert weight["C"] > 1.2
    # √(1 + α² t) for gradients of noise; those of training are close to it.
    assert weight["D"] == pytest.approx(math.sqrt(1 + 0.05**2 * 100), rel=0.03)
    # Epsilon (1e-4) beside one.
    assert weight["E"] == pytest.approx(1, abs=1e-3)
    assert weight["G"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("forced", [False, True])
def test_growth_of_normalised_weights(forced: bool) -> None:
    """Under Adam and gradients of noise: RMS² = 1 + α² t, and 1 where normalisation is forced."""
    torch.manual_seed(0)
    conv = MPConv(64, 64, kernel=(3, 3), forced=forced)
    alpha, steps = 0.03, 500
    optimizer = torch.optim.Adam(conv.parameters(), lr=alpha, betas=(0.9, 0.99))
    for _ in range(steps):
        optimizer.zero_grad()
        # The gradient of a random linear function of the normalised weight.
        (conv.kernel() * torch.randn_like(conv.weight)).sum().backward()
        optimizer.step()
    rms = conv.weight.detach().flatten(1).square().mean(1).sqrt().mean().item()
    if forced:
        # One step past the last normalisation: 1 + α² (0.23 of it, by momentum) / 2.
        assert rms == pytest.approx(1, abs=1e-3)
    else:
        # Asymptotic in t; momentum and bias correction of the first steps shift it by 0.4 %.
        assert rms == pytest.approx(math.sqrt(1 + alpha**2 * steps), rel=0.01)
