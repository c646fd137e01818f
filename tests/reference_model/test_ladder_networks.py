"""Networks of all seven configs: sizes, an independent forward pass, beginnings, magnitudes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from reference_model import Denoiser, build_model, heun_sampler
from reference_model.configs import NetworkConfig
from reference_model.flops import count
from reference_model.folding import folded_weights
from reference_model.ladder import LADDER
from reference_model.mp_layers import MPConv
from reference_model.precond import preconditioning
from reference_model.rungs import LEAVE_OUT
from tests.reference_model import numpy_ladder
from tests.reference_model.numpy_edm2 import Shape
from tests.reference_model.test_network import SMALL, example_input

SIZE_S = dict(img_resolution=64, img_channels=4, label_dim=1000, model_channels=192)
DROPS = sorted(LEAVE_OUT)


def ladder_net(config: str, **changes: object) -> Denoiser:
    """A small network whose parameters are all away from zero, so that each matters."""
    torch.manual_seed(0)
    net = build_model(**(SMALL | {"config": config} | changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim < 2 or not p.any():
                # Gains, biases, norms, and layers that start from zero.
                fan_in = p[0].numel() if p.ndim else 1
                p.add_(0.5 * torch.randn(p.shape) / math.sqrt(fan_in))
            assert p.any(), name
    return net.double().eval()


@pytest.mark.parametrize(
    ("config", "millions", "exact"),
    [
        ("A", 295.9, 295_902_724),
        ("B", 291.8, 291_757_828),
        ("C", 277.8, 277_816_512),
        ("D", 277.8, 277_816_512),
        ("E", 277.8, 277_816_512),
        ("F", 280.2, 280_212_672),
        ("G", 280.2, 280_212_709),
    ],
)
def test_parameter_counts_match_the_paper(config: str, millions: float, exact: int) -> None:
    """Table 1, to the printed digit; no weight is allocated."""
    with torch.device("meta"):
        net = build_model(config=config, **SIZE_S)  # type: ignore[arg-type]
    assert net.num_parameters() == exact
    assert round(exact / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("config", "gflops", "macs"),
    [
        ("A", 110.4, 109.7),
        ("B", 100.4, 99.8),
        ("C", 100.3, 99.8),
        ("D", 101.2, 99.8),
        ("E", 101.2, 99.8),
        ("F", 102.1, 100.8),
        ("G", 102.2, 100.8),
    ],
)
def test_operation_counts_match_the_paper(config: str, gflops: float, macs: float) -> None:
    """Table 1; elementwise operations are counted by hand, hence not to the digit."""
    costs = count(NetworkConfig(config=config, **SIZE_S))  # type: ignore[arg-type]
    assert sum(c.total for c in costs) / 1e9 == pytest.approx(gflops, rel=0.005)
    assert round(sum(c.macs for c in costs) / 1e9, 1) == macs
    with torch.device("meta"):
        net = build_model(config=config, **SIZE_S)  # type: ignore[arg-type]
    assert sum(c.parameters for c in costs) == net.num_parameters()


@pytest.mark.parametrize(("config", "blocks"), [("A", 22), ("B", 15), ("G", 15)])
def test_number_of_attention_blocks(config: str, blocks: int) -> None:
    with torch.device("meta"):
        net = build_model(config=config, **SIZE_S)  # type: ignore[arg-type]
    assert sum(name.endswith(".qkv") for name, _ in net.named_modules()) == blocks


@pytest.mark.parametrize("config", list("ABCDEF"))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"img_resolution": 12, "channel_mult": (1, 2, 3), "attn_resolutions": (6,)},
        {"num_blocks": 2, "attn_resolutions": (8, 4), "sigma_data": 0.3},
    ],
    ids=str,
)
def test_forward_pass_agrees_with_plain_numpy(config: str, changes: dict[str, object]) -> None:
    net = ladder_net(config, **changes)
    x, sigma, labels = example_input(net)
    c = net.config
    shape = Shape(
        resolution=c.img_resolution,
        channels=[c.model_channels * m for m in c.channel_mult],
        num_blocks=c.num_blocks,
        attn_resolutions=c.attn_resolutions,
        channels_per_head=c.channels_per_head,
        sigma_data=c.sigma_data,
    )
    tensors = {name: t.numpy() for name, t in net.state_dict().items()}
    arrays = (t.numpy() for t in (x, sigma, labels))
    expected, expected_u = numpy_ladder.denoise(config, shape, tensors, *arrays)
    denoised, logvar = net(x, sigma, labels, return_logvar=True)
    # Float64 over ~20 layers of ~100-term sums, orders of magnitude above rounding.
    np.testing.assert_allclose(denoised.detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(logvar.detach().numpy().ravel(), expected_u, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", list("ABCDEF"))
def test_every_parameter_matters(config: str) -> None:
    """Twin of the test above: a gradient reaches each, so a change of any would be seen."""
    net = ladder_net(config)
    x, sigma, labels = example_input(net)
    denoised, logvar = net(x, sigma, labels, return_logvar=True)
    (denoised.square().sum() + logvar.square().sum()).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("config", list("ABG"))
def test_networks_that_start_from_the_skip_connection(config: str) -> None:
    """Last layer zero (A, B) or output gain zero (G): D = c_skip · x to the bit."""
    net = build_model(config=config, **SMALL).double()  # type: ignore[arg-type]
    x, sigma, labels = example_input(net)
    c_skip = preconditioning(sigma, 0.5).c_skip[:, None, None, None]
    torch.testing.assert_close(net(x, sigma, labels), c_skip * x, rtol=0, atol=0)


@pytest.mark.parametrize("config", list("CDEF"))
def test_networks_that_start_from_noise(config: str) -> None:
    """From C on nothing is zero at first, and F has no gain yet."""
    torch.manual_seed(0)
    net = build_model(config=config, **SMALL).double()  # type: ignore[arg-type]
    x, sigma, labels = example_input(net)
    c_skip = preconditioning(sigma, 0.5).c_skip[:, None, None, None]
    assert (net(x, sigma, labels) - c_skip * x).abs().max() > 1e-3


@pytest.mark.parametrize("config", list("AB"))
def test_idle_branches_at_first(config: str) -> None:
    net = build_model(config=config, **SMALL)  # type: ignore[arg-type]
    zero = {n for n, p in net.named_parameters() if n.endswith("weight") and not p.any()}
    last = {n for n, _ in net.named_parameters() if n.endswith(("conv1.weight", "proj.weight"))}
    assert zero == last | {"unet.out.conv.weight"}


@pytest.mark.parametrize("config", list(LADDER))
def test_labels_matter_and_no_label_is_all_zeros(config: str) -> None:
    net = ladder_net(config)
    x, sigma, labels = example_input(net)
    without = net(x, sigma, None)
    torch.testing.assert_close(without, net(x, sigma, torch.zeros_like(labels)), rtol=0, atol=0)
    assert (without - net(x, sigma, labels)).abs().max() > 1e-4


@pytest.mark.parametrize("config", list(LADDER))
def test_unconditional_networks_of_every_config(config: str) -> None:
    net = ladder_net(config, label_dim=0)
    x, sigma, _ = example_input(net)
    torch.testing.assert_close(net(x, sigma, torch.eye(5)[:3]), net(x, sigma), rtol=0, atol=0)


def test_config_a_knows_no_uncertainty() -> None:
    """u = 0 makes the loss that of EDM; all others learn u."""
    for config in LADDER:
        net = ladder_net(config)
        _, logvar = net(*example_input(net), return_logvar=True)
        assert logvar.shape == (3, 1, 1, 1)
        assert bool(logvar.any()) == (config != "A")
        assert (net.num_parameters(include_logvar=True) > net.num_parameters()) == (config != "A")


@pytest.mark.parametrize("config", list(LADDER))
def test_sampling_and_folding_change_nothing(config: str) -> None:
    """Folding is idle where weights are not normalised; elsewhere it gives the same bits."""
    net = ladder_net(config)
    x, sigma, labels = example_input(net)
    with torch.no_grad():
        expected = net(x, sigma, labels)
        with folded_weights(net):
            folded = [m for m in net.modules() if isinstance(m, MPConv) and m.folded is not None]
            torch.testing.assert_close(net(x, sigma, labels), expected, rtol=0, atol=0)
    assert bool(folded) == (config >= "D")
    images = heun_sampler(net, x, labels, num_steps=3)
    assert images.isfinite().all()


@pytest.mark.parametrize("config", list(LADDER))
def test_half_precision_activations(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but on the CPU: every layer takes them, and weights keep their gradients."""
    net = ladder_net(config).float()
    x, sigma, labels = (t.float() for t in example_input(net))
    single = net(x, sigma, labels).detach()
    monkeypatch.setattr(Denoiser, "_activation_dtype", lambda self, x: torch.bfloat16)
    half = net(x, sigma, labels)
    half.square().sum().backward()
    assert half.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in net.unet.parameters())
    # bfloat16 rounds by 2⁻⁹; ~20 layers add up to a few per cent.
    assert (half.detach() - single).norm() < 0.05 * single.norm()


@pytest.mark.parametrize(
    "config",
    [c if c in "AG" else pytest.param(c, marks=pytest.mark.slow) for c in LADDER],
)
def test_every_config_compiles_into_one_graph(config: str) -> None:
    """Traced by torch.compile without a break, which a code generator would then receive."""
    net = ladder_net(config)
    x, sigma, labels = example_input(net)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(x, sigma, labels), net(x, sigma, labels), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    ("config", "attention", "dropout", "clip_act"),
    [("A", (32, 16, 8), 0.1, None), ("C", (16, 8), 0.1, None), ("F", (16, 8), 0.1, 256.0),
     ("G", (16, 8), 0.0, 256.0)],
)  # fmt: skip
def test_defaults_follow_the_config(
    config: str, attention: tuple[int, ...], dropout: float, clip_act: float | None
) -> None:
    c = NetworkConfig(config=config, img_resolution=64, img_channels=4)
    assert (c.attn_resolutions, c.dropout, c.clip_act) == (attention, dropout, clip_act)
    own = NetworkConfig(
        config=config, img_resolution=64, img_channels=4, attn_resolutions=(), dropout=0.3,
        clip_act=7.0,
    )  # fmt: skip
    assert (own.attn_resolutions, own.dropout, own.clip_act) == ((), 0.3, 7.0)
