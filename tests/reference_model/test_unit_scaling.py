"""The unit-scaled network: what its factors do at first, that gradients stay true, what training does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference_model import Denoiser, build_model, heun_sampler
from reference_model import unit_blocks, unit_scaling
from reference_model.configs import NetworkConfig
from reference_model.flops import count
from reference_model.folding import folded_weights
from reference_model.ladder import LADDER, UNIT_SCALING, leave_out
from reference_model.presets import preset
from reference_model.train import train
from reference_model.unit_scaling import UnitConv, scaled
from tests.reference_model.numpy_unit import denoise
from tests.reference_model.numpy_edm2 import Shape
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
        assert grad is not None and weight_grad is not None
        found[name] = rms(outputs[name]), rms(grad), rms(weight_grad)
    return found


def deviation(values: Iterator[float]) -> float:
    """The largest factor by which values differ from one."""
    return max(math.exp(abs(math.log(value))) for value in values)


def test_activations_weights_and_gradients_start_at_one() -> None:
    """Layer by layer.

    Tolerances: factors assume that inputs are independent and normal. Padding, the products of a
    modulation and what pixels have in common make activations deviate by up to 1.8; gradients of
    weights, sums over pixels that are alike, by up to 4, most in queries, keys and values.
    """
    net = small_net()
    for name, p in net.named_parameters():
        if p.numel() > 100:
            assert rms(p) == pytest.approx(1, abs=5 / math.sqrt(2 * p.numel())), name  # 5 σ
    found = first_pass(net)
    assert deviation(a for a, _, _ in found.values()) < 1.8
    # What leads into a modulation gathers the gradients of all pixels.
    gradients = (g for n, (_, g, _) in found.items() if not n.endswith("emb_linear"))
    assert deviation(gradients) < 2.2
    assert deviation(w for _, _, w in found.values()) < 4
    # Means over the layers, of which errors in either direction are part.
    for values in zip(*(v for n, v in found.items() if "emb_linear" not in n), strict=True):
        assert math.exp(np.mean(np.log(values))) == pytest.approx(1, abs=0.3)
