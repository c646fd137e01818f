"""The network compiled, in half precision, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference_model import Denoiser
from reference_model.folding import folded_weights
from tests.reference_model.test_network import small_net


def make_net(precision: str = "float32") -> Denoiser:
    # Only the bottleneck attends.
    return small_net(img_channels=1, label_dim=3, attn_resolutions=(), precision=precision).eval()


def example(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 5.0]), torch.eye(3)[:2]
    return x.to(device), sigma.to(device), labels.to(device)


def assert_half(actual: Tensor, expected: Tensor, bits: int) -> None:
    """Agreement to some roundings of `bits` bits, in the mean over the output."""
    error = (actual.float() - expected).square().mean().sqrt()
    # Some 20 layers, each rounding its output; 8 is what that was measured to stay below.
    limit = 8 * 2.0**-bits * expected.square().mean().sqrt()
    if error > limit:
        raise AssertionError(f"error {error:.2e} above {limit:.2e}")


def gradients(net: Denoiser, called: object) -> list[Tensor]:
    net.zero_grad()
    denoised, logvar = called(*example(), return_logvar=True)  # type: ignore[operator]
    (denoised.square().sum() + logvar.sum()).backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


# Dynamo makes an instance of autograd functions to look into them.
one_graph = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@one_graph
def test_compiles_into_one_graph_in_training() -> None:
    """`fullgraph` refuses anything that would break the graph."""
    net, other = make_net().train(), make_net().train()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    found, expected = gradients(net, compiled), gradients(other, other)
    assert len(found) == len(list(net.parameters()))
    for a, b in zip(found, expected, strict=True):
        # The same operations, perhaps in another order of summation.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # forced normalisation happened


@one_graph
def test_compiles_into_one_graph_for_sampling() -> None:
    net = make_net()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad(), folded_weights(compiled):
        assert net.unet.out.conv.folded is not None
        torch.testing.assert_close(compiled(*example()), net(*example()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_cpus_compute_in_float32(precision: str) -> None:
    found = make_net(precision)(*example())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, make_net()(*example()), rtol=0, atol=0)


def test_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match=r"float32, float16, bfloat16 \(got 'float8'\)"):
        make_net("float8")


def raw_network(net: Denoiser, dtype: torch.dtype) -> Tensor:
    x, sigma, labels = example()
    return net.unet(x.to(dtype), sigma.log() / 4, labels)


def test_activations_in_half_precision_stay_half() -> None:
    """What GPUs do when asked for it, on the CPU."""
    net, dtypes = make_net(), set()
    kinds = (torch.nn.Conv2d, type(net.unet.dec["8x8_block0"]), type(net.unet.enc["8x8_block0"]))
    for module in net.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda m, a, y: dtypes.add(y.dtype))
    half, single = raw_network(net, torch.bfloat16), raw_network(make_net(), torch.float32)
    assert dtypes == {torch.bfloat16}
    assert_half(half, single, bits=8)
    with pytest.raises(AssertionError):
        assert_half(half, single, bits=16)  # twin: it is coarser than float32


def test_runs_under_autocast() -> None:
    net = make_net()
    expected = gradients(net, net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(net, net)
    assert {g.dtype for g in found} == {torch.float32}
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (found, expected))
    # Half precision of 8 bits on the way there and back: a tenth tells sign and size.
    assert (a - b).norm() < 0.1 * b.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision_on_a_gpu(precision: str, bits: int) -> None:
    expected = make_net()(*example())
    found = make_net(precision).cuda()(*example("cuda"))
    assert found.dtype == torch.float32
    assert_half(found.cpu(), expected, bits)
