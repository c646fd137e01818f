"""The denoiser: parameter counts, an independent forward pass, magnitudes, edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import reference_model.blocks as blocks
from benchmarks.plain_edm2 import PlainDenoiser
from reference_model import Denoiser, build_model
from reference_model.mp_layers import MPConv
from reference_model.precond import preconditioning
from reference_model.presets import preset
from tests.reference_model import numpy_edm2

SMALL = dict(
    img_resolution=8,
    img_channels=2,
    label_dim=5,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    channels_per_head=8,
)


def small_net(**changes: object) -> Denoiser:
    """A network with gains away from zero, so that every parameter matters."""
    torch.manual_seed(0)
    net = build_model(**(SMALL | changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 0:
                p.copy_(torch.rand([]) + 0.5)
    return net


def example_input(net: Denoiser, batch: int = 3) -> tuple[torch.Tensor, ...]:
    c = net.config
    x = torch.randn(batch, c.img_channels, c.img_resolution, c.img_resolution).double()
    sigma = torch.tensor([0.01, 0.7, 30.0]).double()[:batch]
    labels = torch.eye(max(c.label_dim, 1)).double()[[1, 0, 4][:batch]] if c.label_dim else None
    return x, sigma, labels


@pytest.mark.parametrize("data", ["img512", "img64"])
@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("xxs", 31.3),
        ("xs", 124.7),
        ("s", 280.2),
        ("m", 497.8),
        ("l", 777.5),
        ("xl", 1119.3),
        ("xxl", 1523.2),
    ],
)
def test_parameter_counts_match_the_paper(data: str, size: str, millions: float) -> None:
    """Table 6: to the printed digit at every size."""
    with torch.device("meta"):
        net = Denoiser(preset(f"edm2-{data}-{size}").network)
    assert round(net.num_parameters() / 1e6, 1) == millions


def test_parameter_count_of_size_s_is_exact() -> None:
    with torch.device("meta"):
        net = build_model(
            config="G", img_resolution=64, img_channels=4, label_dim=1000, model_channels=192
        )
    assert net.num_parameters() == 280_212_709
    assert net.num_parameters(include_logvar=True) == 280_212_837
    assert sum(p.ndim == 0 for p in net.parameters()) == 37  # 36 blocks and the output


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_dim": 0},
        {"num_blocks": 2, "attn_resolutions": (8, 4)},
        {"img_resolution": 12, "channel_mult": (1, 2, 3), "attn_resolutions": (6,)},
        {"attn_resolutions": (), "sigma_data": 0.3},
        {"channels_per_head": 4},
    ],
    ids=str,
)
def test_forward_pass_agrees_with_plain_numpy(changes: dict[str, object]) -> None:
    """Parameters go over by creation order, so the order is part of what is checked."""
    net = small_net(**changes).double().eval()
    x, sigma, labels = example_input(net)
    c = net.config
    shape = numpy_edm2.Shape(
        resolution=c.img_resolution,
        channels=[c.model_channels * m for m in c.channel_mult],
        num_blocks=c.num_blocks,
        attn_resolutions=c.attn_resolutions,
        channels_per_head=c.channels_per_head,
        sigma_data=c.sigma_data,
    )
    expected, expected_u = numpy_edm2.denoise(
        shape,
        [p.detach().numpy() for p in net.parameters()],
        [b.numpy() for b in net.buffers()],
        x.numpy(),
        sigma.numpy(),
        None if labels is None else labels.numpy(),
        unconditional=c.label_dim == 0,
    )
    denoised, logvar = net(x, sigma, labels, return_logvar=True)
    # Float64 over ~20 layers of ~100-term sums, orders of magnitude above rounding.
    np.testing.assert_allclose(denoised.detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(logvar.detach().numpy().ravel(), expected_u, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "changes", [{}, {"label_dim": 0, "img_resolution": 12, "channel_mult": (1, 2, 3)}], ids=str
)
def test_training_agrees_with_the_plain_transcription(changes: dict[str, object]) -> None:
    """Outputs, gradients, and the weights that forced normalisation leaves behind."""
    net = small_net(**changes).double().train()
    plain = PlainDenoiser(net.config).double().copy_weights(net)
    x, sigma, labels = example_input(net)
    for one in (net, plain):
        denoised, logvar = one(x, sigma, labels, return_logvar=True)
        (denoised.square().sum() + logvar.sum()).backward()
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        # Float64 through ~20 layers and back; gradients of up to thousands.
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(
            ours.grad / scale, theirs.grad / scale, rtol=0, atol=1e-10, msg=name
        )


def test_comparison_with_numpy_can_fail() -> None:
    """Twin of the test above: a change of one parameter in a thousand is seen."""
    net = small_net(label_dim=0).double().eval()
    x, sigma, _ = example_input(net)
    before = net(x, sigma)
    with torch.no_grad():
        next(iter(net.unet.enc["8x8_block0"].residual.conv0.parameters()))[0, 0, 0, 0] += 1.0
    assert (net(x, sigma) - before).abs().max() > 1e-6


def test_float32_agrees_with_float64() -> None:
    net = small_net().eval()
    x, sigma, labels = example_input(net)
    single = net(x.float(), sigma.float(), labels.float())
    double = net.double()(x, sigma, labels)
    assert single.dtype == torch.float32
    # 2^-24 relative rounding, amplified by some tens of layers.
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_evaluation_without_gradients_gives_the_same_bits() -> None:
    """It works in place, on nothing that the caller holds."""
    net = small_net().double().eval()
    inputs = example_input(net)
    before = [t.clone() for t in inputs]
    with torch.no_grad():
        found = net(*inputs)
    torch.testing.assert_close(found, net(*inputs), rtol=0, atol=0)
    torch.testing.assert_close(list(inputs), before, rtol=0, atol=0)


def test_initial_network_is_the_skip_connection() -> None:
    """Output gain 0: D = c_skip · x."""
    net = build_model(**SMALL)  # type: ignore[arg-type]
    x, sigma, labels = example_input(net)
    c_skip = preconditioning(sigma, 0.5).c_skip[:, None, None, None]
    denoised = net.double()(x, sigma, labels)
    torch.testing.assert_close(denoised, c_skip * x, rtol=0, atol=0)


def test_no_class_means_all_zeros() -> None:
    net = small_net().double().eval()
    x, sigma, labels = example_input(net)
    without = net(x, sigma, None)
    torch.testing.assert_close(without, net(x, sigma, torch.zeros_like(labels)), rtol=0, atol=0)
    assert (without - net(x, sigma, labels)).abs().max() > 1e-3


def test_one_sigma_serves_the_batch() -> None:
    net = small_net().double().eval()
    x, _, labels = example_input(net)
    each = net(x, torch.full((3,), 0.7, dtype=torch.float64), labels)
    torch.testing.assert_close(net(x, torch.tensor(0.7).double(), labels), each)


def test_unconditional_network_ignores_classes() -> None:
    """So that it can guide a conditional network, which is called alike."""
    net = small_net(label_dim=0).double().eval()
    x, sigma, _ = example_input(net)
    labels = torch.eye(5).double()[:3]
    torch.testing.assert_close(net(x, sigma, labels), net(x, sigma), rtol=0, atol=0)


def test_evaluation_does_not_touch_the_weights() -> None:
    net = small_net().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(*(t.float() for t in example_input(net)))
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


def test_training_normalizes_every_stored_weight() -> None:
    net = small_net().train()
    net(*(t.float() for t in example_input(net)), return_logvar=True)
    for module in net.modules():
        if isinstance(module, MPConv):
            rms = module.weight.flatten(1).square().mean(1).sqrt()
            # The epsilon of 1e-4 is added to an RMS near one.
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=0, atol=3e-4)


def test_scale_of_weights_does_not_matter_and_gradient_is_tangent() -> None:
    """Normalised at every use: the gradient has no component along the weight."""
    net = small_net().double().eval()
    x, sigma, labels = example_input(net)
    net(x, sigma, labels).square().sum().backward()
    conv = net.unet.enc["4x4_block0"].residual.conv0.weight
    along = (conv.grad * conv).sum(dim=(1, 2, 3)) / (
        conv.grad.flatten(1).norm(dim=1) * conv.flatten(1).norm(dim=1)
    )
    # Exactly zero but for the epsilon of 1e-4 relative in the norm.
    assert along.abs().max() < 1e-3


def magnitudes(net: Denoiser, x: torch.Tensor) -> list[float]:
    """RMS of every block's output at a noise level where the input has unit magnitude."""
    found: list[float] = []

    def record(module: nn.Module, args: object, output: torch.Tensor) -> None:
        found.append(float(output.square().mean().sqrt()))

    kinds = (blocks.MPEncoderBlock, blocks.MPDecoderBlock)
    handles = [m.register_forward_hook(record) for m in net.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        # c_in · x has unit magnitude where x has variance σ² + σ_data².
        sigma = torch.ones(len(x))
        net(x * math.sqrt(1 + net.config.sigma_data**2), sigma)
    for handle in handles:
        handle.remove()
    return found


def mean_magnitudes(**changes: Any) -> list[float]:
    """Over three draws of weights and input, of the unconditional 32×32 network of width 64."""
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = build_model(img_resolution=32, img_channels=3, model_channels=64, **changes)
        draws.append(magnitudes(net.eval(), torch.randn(2, 3, 32, 32)))
    return [sum(values) / len(values) for values in zip(*draws, strict=True)]


def test_magnitudes_stay_near_one_at_initialisation() -> None:
    """0.83 to 1.00 in expectation; nothing grows or sinks from block to block."""
    found = mean_magnitudes()
    assert len(found) == 36
    # One draw of one block spreads by 0.06 (1 standard deviation), so their mean by 0.035.
    assert min(found) > 0.83 - 0.07
    assert max(found) < 1.00 + 0.07


def test_without_pixel_norm_magnitudes_sink() -> None:
    """Negative control: the test above measures something. Mean-pooling halves magnitudes."""
    # Single draws reach 0.42 to 0.60.
    assert 0.35 < min(mean_magnitudes(leave_out=("pixel_norm",))) < 0.65


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_resolution": 28, "channel_mult": (1, 2, 3, 4)}, "cannot be halved 3 times"),
        ({"model_channels": 11, "channels_per_head": 4}, "that divides 11"),
        ({"config": "H"}, "config must be one of A, B, C, D, E, F, G"),
        ({"res_balance": 1.5}, r"res_balance must lie in \[0, 1\]"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(**(SMALL | changes))  # type: ignore[arg-type]


def test_narrow_level_gets_one_head() -> None:
    net = build_model(**(SMALL | {"channels_per_head": 64}))  # type: ignore[arg-type]
    assert net.unet.dec["4x4_in0"].attention.heads == 1


def test_shapes_that_do_not_fit_are_named() -> None:
    net = small_net().double()
    x, sigma, labels = example_input(net)
    with pytest.raises(ValueError, match="sigma has 2 values for a batch of 3 images"):
        net(x, sigma[:2], labels)
    with pytest.raises(ValueError, match=r"class_labels has shape \(3,\), expected \(3, 5\)"):
        net(x, sigma, torch.tensor([1, 2, 3]))


def test_dropout_acts_in_training_only() -> None:
    net = small_net(dropout=0.5).double()
    x, sigma, labels = example_input(net)
    net.eval()
    torch.testing.assert_close(net(x, sigma, labels), net(x, sigma, labels), rtol=0, atol=0)
    net.train()
    assert (net(x, sigma, labels) - net(x, sigma, labels)).abs().max() > 1e-3


def test_clip_bounds_activations() -> None:
    net = small_net(clip_act=0.25).double().eval()
    seen = magnitudes_max(net)
    assert seen <= 0.25
    assert magnitudes_max(small_net(clip_act=None).double().eval()) > 0.25


def magnitudes_max(net: Denoiser) -> float:
    largest = []
    block = net.unet.enc["8x8_block0"]
    block.register_forward_hook(lambda m, a, y: largest.append(float(y.detach().abs().max())))
    net(*example_input(net))
    return max(largest)
