"""Sharded weights: several processes write one snapshot to a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import assert_equal
from torch.distributed.device_mesh import init_device_mesh

from posthoc_ema import EMA, SnapshotStore, reconstruct
from tests.distributed.ranks import perturb, run_ranks, sharded_model, small_model


def train(model: Any, snapshots: Any, steps: int = 4) -> None:
    ema = EMA(sigma_rel=(0.05, 0.1), snapshots=snapshots, every=2)
    for step in range(steps):
        perturb(model, step)
        ema.update(model)


def work(rank: int, number: int, folder: Path, url: str, options: dict[str, Any]) -> None:
    train(sharded_model(init_device_mesh("cpu", (number,))), SnapshotStore(url, options))


@pytest.mark.slow
def test_processes_write_their_shards_there(endpoint: str, bucket: str, tmp_path: Path) -> None:
    # The processes come from a server that was started before the environment was set.
    options = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": endpoint}}
    run_ranks(2, work, tmp_path / "ranks", bucket, options)
    train(small_model(), tmp_path / "ema")
    found, wanted = SnapshotStore(bucket).verify(), SnapshotStore(tmp_path / "ema").verify()
    assert [(s.t, s.profile) for s in found] == [(s.t, s.profile) for s in wanted]
    assert all(s.parts is not None and len(s.parts.paths) == 2 for s in found)
    for a, b in zip(found, wanted, strict=True):
        for name in b.entries:
            assert_equal(a.read(name), b.read(name))
    there, here = reconstruct(bucket, 0.07), reconstruct(tmp_path / "ema", 0.07)
    for name, values in here.state_dict().items():
        assert_equal(there.state_dict()[name], values)
