"""Modules reconstructed: strict loading, buffers, saving, independence of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from posthoc_ema import (
    EMA,
    reconstruct,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("table", torch.arange(3).bfloat16())
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.norm(self.embed(tokens))))


def train(net: Net, ema: EMA, steps: int) -> None:
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        tokens = torch.randint(9, (16,))
        loss = nn.functional.cross_entropy(net(tokens), tokens)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        net.table.add_(1)
        ema.update(net)


@pytest.fixture(scope="module")
def net_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, EMA, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("net") / "ema"
    net, ema = Net(), EMA(sigma_rel=(0.05, 0.10), snapshots=folder, every=5)
    train(net, ema, 40)
    return net, ema, folder


def test_state_dict_restores_a_module_strictly(net_run: Any) -> None:
    net, _, folder = net_run
    weights = reconstruct(folder, 0.07)
    state = weights.state_dict()
    assert set(state) == set(net.state_dict())
    fresh = Net()
    fresh.load_state_dict(state, strict=True)
    assert fresh.head.weight is fresh.embed.weight
    assert torch.equal(fresh.head.weight, weights.params["embed.weight"])
    assert torch.equal(fresh.frozen.weight, net.frozen.weight), "what does not move, exactly"
    fresh.eval()(torch.arange(9))


def test_buffers_are_those_of_the_last_snapshot_used(net_run: Any) -> None:
    net, _, folder = net_run
    now = reconstruct(folder, 0.07)
    assert set(now.buffers) == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "table",
    }
    for name, value in now.buffers.items():
        expected = net.state_dict()[name]
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected), name
    then = reconstruct(folder, 0.07, t=22)
    assert int(then.buffers["norm.num_batches_tracked"]) == 20
    assert torch.equal(then.buffers["table"], (torch.arange(3) + 20).bfloat16())


def test_reconstruction_agrees_with_what_was_tracked(net_run: Any) -> None:
    _, ema, folder = net_run
    for sigma_rel in (0.05, 0.10):
        result = reconstruct(folder, sigma_rel)
        for name, value in result.state_dict().items():
            assert torch.equal(value, ema.average(sigma_rel)[name]), name


def test_results_do_not_share_memory(net_run: Any) -> None:
    _, _, folder = net_run
    first, second = reconstruct(folder, [0.07, 0.2])
    before = {name: value.clone() for name, value in second.state_dict().items()}
    for value in first.state_dict().values():
        value.zero_()
    for name, value in second.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_results_can_be_saved_by_the_usual_means(net_run: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = reconstruct(net_run[2], 0.07)
    save_file(weights.params, tmp_path / "params.safetensors")
    assert torch.equal(
        load_file(tmp_path / "params.safetensors")["embed.weight"], weights.params["embed.weight"]
    )
    torch.save(weights.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    Net().load_state_dict(state, strict=True)
