"""Weights folded for the time of sampling: the same numbers, once, and never stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reference_model import Denoiser, heun_sampler
from reference_model.folding import folded_weights
from reference_model.mp_layers import MPConv
from reference_model.parallel_generation import generate_in_parallel
from reference_model.protocol import Protocol
from tests.reference_model.test_network import small_net


def make_net() -> Denoiser:
    return small_net(
        img_resolution=4,
        img_channels=1,
        label_dim=0,
        model_channels=4,
        attn_resolutions=(),
        channels_per_head=4,
    ).eval()


def layers(net: nn.Module) -> list[MPConv]:
    return [m for m in net.modules() if isinstance(m, MPConv)]


@pytest.fixture
def normalised(monkeypatch: pytest.MonkeyPatch) -> list[MPConv]:
    """Layers in the order in which they normalised their weights."""
    found: list[MPConv] = []
    kernel = MPConv.kernel

    def counted(self: MPConv) -> Tensor:
        found.append(self)
        return kernel(self)

    monkeypatch.setattr(MPConv, "kernel", counted)
    return found


def test_sampler_normalises_each_weight_once(normalised: list[MPConv]) -> None:
    net, noise = make_net(), torch.randn(2, 1, 4, 4)
    heun_sampler(net, noise, num_steps=4)
    assert sorted(map(id, normalised)) == sorted(map(id, layers(net)))


def test_forward_alone_normalises_each_time(normalised: list[MPConv]) -> None:
    """Twin: the count above can be larger."""
    net, x = make_net(), torch.randn(2, 1, 4, 4)
    for _ in range(3):
        net(x, torch.ones(2))
    used = layers(net.unet)  # the uncertainty head was not asked for
    assert len(normalised) == 3 * len(used)


def test_guiding_networks_are_folded_too(normalised: list[MPConv]) -> None:
    net, guide = make_net(), make_net()
    heun_sampler(net, torch.randn(2, 1, 4, 4), gnet=guide, guidance=2.0, num_steps=4)
    assert len(normalised) == 2 * len(layers(net))
    normalised.clear()
    with folded_weights(net, [guide], None, "neither"):
        assert len(normalised) == 2 * len(layers(net))


def test_threads_that_share_networks_share_what_is_folded(normalised: list[MPConv]) -> None:
    net, guide = make_net(), make_net()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        protocol = Protocol(images=6, num_steps=2, batch_size=1)
        generate_in_parallel(net, protocol, 0, gnet=guide, guidance=2.0)
    finally:
        torch.set_num_threads(threads)
    assert sorted(map(id, normalised)) == sorted(map(id, [*layers(net), *layers(guide)]))
    assert all(layer.folded is None for layer in [*layers(net), *layers(guide)])


def test_folded_network_gives_the_same_bits() -> None:
    net, x = make_net(), torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        expected = net(x, torch.ones(3))
        saved = net.state_dict().keys()
        with folded_weights(net):
            assert net.state_dict().keys() == saved
            torch.testing.assert_close(net(x, torch.ones(3)), expected, rtol=0, atol=0)


def edit_data(net: nn.Module) -> None:
    """An edit that no version counter shows."""
    for p in net.parameters():
        p.data.copy_(torch.randn_like(p))


def load(net: nn.Module) -> None:
    net.load_state_dict({name: torch.randn_like(v) for name, v in net.state_dict().items()})


def step(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    net.train()(torch.randn(2, 1, 4, 4), torch.ones(2)).sum().backward()
    optimizer.step()
    net.eval()


@pytest.mark.parametrize("edit", [edit_data, load, step])
def test_edited_weights_are_used(edit: Callable[[nn.Module], None]) -> None:
    net, fresh, noise = make_net(), make_net(), torch.randn(2, 1, 4, 4)
    before = heun_sampler(net, noise, num_steps=3)
    edit(net)
    fresh.load_state_dict(net.state_dict())
    after = heun_sampler(net, noise, num_steps=3)
    torch.testing.assert_close(after, heun_sampler(fresh, noise, num_steps=3), rtol=0, atol=0)
    assert (after - before).abs().max() > 1e-3


def test_nothing_outlives_the_context() -> None:
    """Not even an error; an inner context leaves what an outer one folded."""
    net = make_net()

    def broken_sampler() -> None:
        with folded_weights(net):
            with folded_weights(net):
                pass
            assert all(layer.folded is not None for layer in layers(net))
            raise KeyError

    with pytest.raises(KeyError):
        broken_sampler()
    assert all(layer.folded is None for layer in layers(net))


def test_training_and_gradients_pass_folded_weights_by() -> None:
    """A constant would hide the gradient, and training must normalise the stored weights."""
    net, x = make_net(), torch.randn(2, 1, 4, 4)
    with folded_weights(net):
        net(x, torch.ones(2)).sum().backward()
    assert all(p.grad is not None for p in net.unet.parameters())
    with folded_weights(net.train()):
        assert all(layer.folded is None for layer in layers(net))
