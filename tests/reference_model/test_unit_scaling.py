"""Config U: what its factors do at first, that gradients stay true, what training does to it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference_model import Denoiser, build_model, heun_sampler, rungs, unit_scaling
from reference_model.configs import NetworkConfig
from reference_model.flops import count
from reference_model.folding import folded_weights
from reference_model.ladder import LADDER, UNIT_SCALING, leave_out
from reference_model.presets import preset
from reference_model.train import train
from reference_model.unit_scaling import UnitConv, scaled
from tests.reference_model.numpy_edm2 import Shape
from tests.reference_model.numpy_unit import denoise
from tests.reference_model.test_ladder_training import learn, mean

SMALL = dict(
    config=UNIT_SCALING,
    img_resolution=16,
    img_channels=3,
    label_dim=10,
    model_channels=32,
    channel_mult=(1, 2),
    num_blocks=2,
    attn_resolutions=(8,),
    channels_per_head=16,
)


def small_net(**changes: object) -> Denoiser:
    torch.manual_seed(0)
    return build_model(**(SMALL | changes))  # type: ignore[arg-type]


def rms(x: Tensor) -> float:
    return x.detach().square().mean().sqrt().item()


def first_pass(net: Denoiser, batch: int = 16) -> dict[str, tuple[float, float, float]]:
    """RMS of output, of its gradient, and of the weight's gradient of each layer, at first.

    Inputs and the gradient that comes back are of N(0, 1).
    """
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> object:
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return keep

    layers = {n: m for n, m in net.unet.named_modules() if isinstance(m, UnitConv)}
    for name, layer in layers.items():
        layer.register_forward_hook(hook(name))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *net.config.input_shape, generator=generator)
    labels = torch.eye(10)[torch.arange(batch) % 10]
    out = net.unet(x, 0.25 * torch.randn(batch, generator=generator), labels)
    out.backward(torch.randn(out.shape, generator=generator))
    found = {}
    for name, layer in layers.items():
        grad, weight_grad = outputs[name].grad, layer.weight.grad
        assert grad is not None
        assert weight_grad is not None
        found[name] = rms(outputs[name]), rms(grad), rms(weight_grad)
    return found


def deviation(values: Iterable[float]) -> float:
    """The largest factor by which values differ from one."""
    return max(math.exp(abs(math.log(value))) for value in values)


def test_activations_weights_and_gradients_start_at_one() -> None:
    """Layer by layer.

    Tolerances: factors assume that inputs are independent and normal. Padding, products with a
    modulation and what pixels have in common make activations deviate by a factor of 1.78 here
    and their gradients by 1.92; gradients of weights, which rest on both, by 3.57. Some room is
    left.
    """
    net = small_net()
    for name, p in net.named_parameters():
        if p.numel() > 100:
            assert rms(p) == pytest.approx(1, abs=5 / math.sqrt(2 * p.numel())), name  # 5 σ
    found = first_pass(net)
    assert deviation(a for a, _, _ in found.values()) < 2
    # What leads into a modulation gathers the gradients of all pixels.
    gradients = (g for n, (_, g, _) in found.items() if not n.endswith("emb_linear"))
    assert deviation(gradients) < 2.5
    assert deviation(w for _, _, w in found.values()) < 4.5


def test_without_a_factor_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of factor is what keeps its quantity near one."""
    with monkeypatch.context() as patch:
        # No factors in the backward pass: gradients are what autograd makes of the forward pass.
        patch.setattr(unit_scaling._Scaled, "apply", staticmethod(lambda x, f, b: x * f))
        found = first_pass(small_net())
        assert deviation(a for a, _, _ in found.values()) < 2
        assert deviation(w for _, _, w in found.values()) > 30
    with monkeypatch.context() as patch:
        # No factors in the forward pass.
        apply = unit_scaling._Scaled.apply
        patch.setattr(unit_scaling._Scaled, "apply", staticmethod(lambda x, f, b: apply(x, 1.0, b)))
        assert deviation(a for a, _, _ in first_pass(small_net()).values()) > 100


def test_gradients_keep_their_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight's gradient is a positive multiple of the true one: every factor of a backward
    pass is undone wherever another path could tell, as the cut-edge rule demands."""

    def gradients() -> dict[str, Tensor]:
        net = small_net(num_blocks=1)
        first_pass(net)
        return {n: p.grad.double() for n, p in net.unet.named_parameters() if p.grad is not None}

    def least_cosine(of: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        pairs = ((of[name].flatten(), other[name].flatten()) for name in of)
        return min(nn.functional.cosine_similarity(a, b, dim=0).item() for a, b in pairs)

    scaled_ = gradients()
    with monkeypatch.context() as patch:
        patch.setattr(unit_scaling._Scaled, "apply", staticmethod(lambda x, f, b: x * f))
        true = gradients()
    assert list(scaled_) == list(true)
    # Rounding in float32.
    assert least_cosine(scaled_, true) > 1 - 1e-6
    # A factor that a parallel path does not share is noticed.
    with monkeypatch.context() as patch:
        rung = replace(rungs.U, descend=rungs.go_on)
        patch.setitem(rungs.RUNGS, UNIT_SCALING, rung)
        assert least_cosine(gradients(), true) < 0.999


def test_forward_pass_is_the_one_written_down() -> None:
    net = small_net().double().eval()
    rng = np.random.default_rng(0)
    x, sigma = rng.standard_normal((3, 3, 16, 16)), np.array([0.05, 0.6, 7.0])
    labels = np.eye(10)[[1, 4, 7]]
    with torch.no_grad():
        found = net(*(torch.from_numpy(a) for a in (x, sigma, labels)), return_logvar=True)
    shape = Shape(16, (32, 64), 2, (8,), 16)
    parameters = [p.detach().numpy() for p in net.parameters()]
    wanted = denoise(shape, parameters, [b.numpy() for b in net.buffers()], x, sigma, labels)
    # Sums of up to 1,152 terms in float64, in another order.
    np.testing.assert_allclose(found[0].numpy(), wanted[0], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found[1].flatten().numpy(), wanted[1], rtol=1e-10, atol=1e-10)


def test_scaled_has_two_factors() -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    y = scaled(x, forward=3.0, backward=5.0)
    y.backward(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert y.tolist() == [3.0, -6.0]
    assert x.grad is not None
    assert x.grad.tolist() == [5.0, 10.0]


def test_it_stands_beside_the_ladder() -> None:
    """The seven configs of the paper stay seven; U is built and told like one of them."""
    assert list(LADDER) == list("ABCDEFG")
    assert UNIT_SCALING not in LADDER
    with pytest.raises(ValueError, match=r"no ingredients to leave out \(got 'mp_silu'"):
        build_model(**(SMALL | {"leave_out": ("mp_silu",)}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config U has no ingredients"):
        leave_out(preset("digits", config="U"), ["lr_decay"])


def test_habits_are_those_of_config_g() -> None:
    g, u = preset("digits"), preset("digits", config="U")
    wanted = g.to_dict()
    wanted["network"] |= {"config": "U", "clip_act": None}
    assert u.to_dict() == wanted


def test_parameters_and_operations() -> None:
    """The weights of G without its gains, and no operation on weights."""
    g, u = ({**SMALL, "config": config} for config in "GU")
    nets = [build_model(**c) for c in (g, u)]  # type: ignore[arg-type]
    gains = sum(p.ndim == 0 for p in nets[0].parameters())
    assert nets[0].num_parameters() - nets[1].num_parameters() == gains > 0
    costs = [count(NetworkConfig(**c)) for c in (g, u)]  # type: ignore[arg-type]
    assert sum(c.macs for c in costs[0]) == sum(c.macs for c in costs[1])
    assert sum(c.weight_norm for c in costs[0]) > 0
    assert sum(c.weight_norm for c in costs[1]) == 0
    assert sum(c.parameters for c in costs[1]) == nets[1].num_parameters()
    elementwise = [sum(c.elementwise for c in c_) for c_ in costs]
    # No pixel norms, no normalised queries, keys and values.
    assert 0.5 * elementwise[0] < elementwise[1] < elementwise[0]


def test_folding_changes_nothing() -> None:
    net = small_net().eval()
    noise, labels = torch.randn(2, 3, 16, 16), torch.eye(10)[:2]
    plain = heun_sampler(net, noise, labels, num_steps=3)
    with torch.no_grad(), folded_weights(net):
        folded = heun_sampler(net, noise, labels, num_steps=3)
    assert torch.equal(plain, folded)


@pytest.mark.slow
# Dynamo makes an instance of autograd functions to look into them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph_in_training() -> None:
    """Factors of the backward pass survive it."""
    net = small_net(num_blocks=1)
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 3.0]), torch.eye(10)[:2]

    def gradients(evaluate: Any) -> list[Tensor]:
        net.zero_grad()
        evaluate(x, sigma, labels).square().sum().backward()
        return [p.grad for p in net.unet.parameters() if p.grad is not None]

    torch.compiler.reset()
    compiled = gradients(torch.compile(net, backend="aot_eager", fullgraph=True))
    for found, wanted in zip(compiled, gradients(net), strict=True):
        # Rounding in float32, relative to the tensor.
        assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_it_trains_like_any_config(tmp_path: Path) -> None:
    c = replace(preset("digits-tiny", config="U"), total_nimg=128)
    assert train(c, tmp_path, progress=False) == 128
    assert (tmp_path / "magnitudes.jsonl").exists()
    ratio, _ = learn("U", steps=30)
    assert ratio < 0.93


def test_magnitudes_run_away_in_training_and_stay_in_g() -> None:
    """30 steps at a high rate: nothing holds the weights of U, and activations follow.

    Seen: weights of U times 1.38, its activations times 1,700; those of G times 2.6.
    """
    weight, activation = {}, {}
    for config in "UG":
        _, (first, last) = learn(config, steps=30, lr=0.2)
        weight[config] = mean(last, "weight") / mean(first, "weight")
        activation[config] = mean(last, "activation") / mean(first, "activation")
    # Half of the growth that was seen, on a logarithmic scale less than that.
    assert weight["U"] > 1.2
    assert activation["U"] > 10 * activation["G"]
    # Epsilon (1e-4) beside one.
    assert weight["G"] == pytest.approx(1, abs=1e-3)
