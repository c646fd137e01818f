"""Single ingredients left out of a config: what changes, what does not, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reference_model import Denoiser, build_model
from reference_model.ladder import INGREDIENTS, LR_DECAY, leave_out
from reference_model.mp_layers import MPConv
from reference_model.presets import preset
from reference_model.rungs import LEAVE_OUT
from tests.reference_model import numpy_edm2
from tests.reference_model.test_ladder_networks import ladder_net
from tests.reference_model.test_network import SMALL, example_input

OF_G = [name for name, (since, _) in INGREDIENTS.items() if since == "G"]
FORWARD = sorted(set(LEAVE_OUT) - {"forced_norm"})


def outputs(net: Denoiser) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return net(*example_input(net), return_logvar=True)


def test_every_ingredient_has_a_switch() -> None:
    assert {*LEAVE_OUT, LR_DECAY} == set(INGREDIENTS)


@pytest.mark.parametrize("names", [*((name,) for name in FORWARD), ("mp_sum", "mp_cat"), OF_G])
def test_what_remains_agrees_with_plain_numpy(names: tuple[str, ...]) -> None:
    """The network without them, from the equations; parameters go over in creation order."""
    net = ladder_net("G", leave_out=names)
    torch.manual_seed(1)
    x, sigma, labels = example_input(net)
    shape = numpy_edm2.Shape(
        resolution=8,
        channels=(8, 16),
        num_blocks=1,
        attn_resolutions=(4,),
        channels_per_head=8,
        without=frozenset(names),
    )
    expected, expected_u = numpy_edm2.denoise(
        shape,
        [p.detach().numpy() for p in net.parameters()],
        [b.numpy() for b in net.buffers()],
        *(t.numpy() for t in (x, sigma, labels)),
    )
    denoised, logvar = outputs(net)
    # Float64 over ~20 layers of ~100-term sums, orders of magnitude above rounding.
    np.testing.assert_allclose(denoised.detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(logvar.detach().numpy().ravel(), expected_u, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FORWARD)
def test_each_ingredient_makes_a_difference(name: str) -> None:
    """Twin: the same weights with the ingredient give something else."""
    whole, without = ladder_net("G"), ladder_net("G", leave_out=(name,))
    shared = without.state_dict()
    for key, value in whole.state_dict().items():
        if key in shared:
            shared[key] = value[tuple(slice(n) for n in shared[key].shape)]
    without.load_state_dict(shared)
    pairs = zip(outputs(whole), outputs(without), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 1e-4


def test_g_without_what_it_adds_is_f() -> None:
    """To the bit, from the same draws of weights, but for the name that remains."""
    torch.manual_seed(3)
    f = build_model(config="F", **SMALL).double().eval()  # type: ignore[arg-type]
    torch.manual_seed(3)
    g = build_model(leave_out=OF_G, **SMALL).double().eval()  # type: ignore[arg-type]
    for a, b in zip(outputs(f), outputs(g), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert f.num_parameters() == g.num_parameters()


@pytest.mark.parametrize(("config", "names"), [("D", ()), ("E", ("forced_norm",))])
def test_without_forced_norm_training_leaves_stored_weights_alone(
    config: str, names: tuple[str, ...]
) -> None:
    """E without it is D: both keep what is stored."""
    net = ladder_net(config, leave_out=names, dropout=0.0).train()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    outputs(net)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0, msg=name)


def test_with_forced_norm_training_normalises_stored_weights() -> None:
    """Twin of the test above."""
    net = ladder_net("E", dropout=0.0).train()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
    outputs(net)
    for m in net.modules():
        if isinstance(m, MPConv):
            rms = m.weight.detach().flatten(1).square().mean(1).sqrt()
            # The epsilon of 1e-4 is added to an RMS of 3.
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=0, atol=1e-4)


def test_forced_norm_alone_lets_gradients_point_along_weights() -> None:
    """Without the norm at use nothing projects them: Adam then sees what is erased later."""

    def along(**switches: bool) -> float:
        torch.manual_seed(0)
        conv = MPConv(16, 8, kernel=(), **switches).double().train()
        conv(torch.randn(4, 16).double()).square().sum().backward()
        w, g = conv.weight.detach(), conv.weight.grad
        assert g is not None
        return float(((w * g).sum(1) / (w.norm(dim=1) * g.norm(dim=1))).abs().max())

    assert along(normalized=False) > 0.1
    assert along() < 1e-3  # but for epsilon


def test_neither_norm() -> None:
    """Weights as drawn, divided by √fan_in: unit magnitude at first, and then what may come."""
    conv = MPConv(9, 4, kernel=(), normalized=False, forced=False).double()
    x = torch.randn(3, 9).double()
    torch.testing.assert_close(conv(x), x @ conv.weight.T / 3, rtol=1e-14, atol=1e-14)


def test_learning_rate_decay_is_left_out_of_training() -> None:
    config = preset("digits")
    without = leave_out(config, [LR_DECAY, "pixel_norm"])
    assert (config.ref_batches, without.ref_batches) == (100, 0)
    assert without.network.leave_out == ("pixel_norm",)


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ("G", ("dropout",), r"leave_out must name some of uncertainty, .* \(got 'dropout'\)"),
        ("F", ("mp_silu",), r"config F has no mp_silu to leave out: that comes with config G"),
        ("A", ("uncertainty",), r"comes with config B \(minor improvements\)"),
        ("G", ("mp_cat", "mp_cat"), "names mp_cat twice"),
        ("G", (LR_DECAY,), "lr_decay is no part of the network: set ref_batches=0"),
    ],
)
def test_what_cannot_be_left_out_is_told(config: str, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(config=config, leave_out=names, **SMALL)  # type: ignore[arg-type]
