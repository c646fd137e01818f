"""Random runs, random requests: every result is its coefficients times the files, nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from posthoc_ema import EMA, Snapshot, SnapshotStore, reconstruct

module = import_module("posthoc_ema.reconstruct")  # the package's name of it is the function

AVERAGED = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
COPIED = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.int16]


@st.composite
def models(draw: st.DrawFn) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names, shapes and types, in any order; at least one tensor to average."""
    sizes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
    kinds = draw(
        st.lists(st.tuples(sizes, st.sampled_from(AVERAGED + COPIED)), min_size=1, max_size=9)
    )
    shapes = [((2, 3), draw(st.sampled_from(AVERAGED))), *kinds]
    order = draw(st.permutations(range(len(shapes))))
    return [(f"layer{k}.{'wb'[k % 2]}", *shapes[k]) for k in order]


def tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype in COPIED:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def expected(snapshots: Sequence[Snapshot], coefficients: Any, name: str) -> tuple[Any, float]:
    """Σ coefficient·tensor in float64, and the size of what was summed."""
    parts = [
        x * s.read(name).astype(np.float64) for x, s in zip(coefficients, snapshots, strict=True)
    ]
    return np.sum(parts, axis=0), float(np.sum(np.abs(parts), axis=0).max(initial=0))


@settings(max_examples=30)
@given(
    model=models(),
    times=st.lists(st.integers(1, 40), min_size=1, max_size=9, unique=True).map(sorted),
    tracks=st.sampled_from([(0.05, 0.10), (0.10,), (0.2, 0.02, 0.07)]),
    encoding=st.sampled_from(["float32", "float16", "bfloat16"]),
    targets=st.lists(st.floats(0.01, 0.28), min_size=1, max_size=3, unique=True),
    per_tensor=st.booleans(),
    to_files=st.booleans(),
    shard=st.integers(1, 600),
    method=st.sampled_from(["kriging", "paper"]),
    earlier=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_any_run_and_any_request(
    model: Any,
    times: list[int],
    tracks: tuple[float, ...],
    encoding: str,
    targets: list[float],
    per_tensor: bool,
    to_files: bool,
    shard: int,
    method: str,
    earlier: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)  # durability is tested elsewhere
        patch.setattr(module, "MAX_SHARD_BYTES", shard)
        ema = EMA(sigma_rel=tracks, snapshots=Path(folder) / "ema", encoding=encoding)
        for t in times:
            ema.update({n: tensor(shape, dtype, generator) for n, shape, dtype in model}, t=t)
            ema.snapshot()
        last = ema.average(tracks[0])

        t = times[0] + earlier * (times[-1] - times[0])
        if method == "paper":  # has no notion of the weights after the last snapshot used
            t = max(time for time in times if time <= t)
        request: Any = targets
        if per_tensor:
            request = {"*.w": targets[0], "*": targets[-1]}
        out = Path(folder) / "out" if to_files else None
        found = reconstruct(Path(folder) / "ema", request, t=t, method=method, out=out)

        usable = [s for s in SnapshotStore(Path(folder) / "ema").list() if s.t <= t]
        for result in [found] if per_tensor else found:
            state = result.state_dict()
            assert set(state) == {name for name, _, _ in model}
            for name, shape, dtype in model:
                value = state[name]
                assert tuple(value.shape) == shape
                if dtype in COPIED:
                    assert value.dtype == dtype
                    if t == times[-1]:
                        assert torch.equal(value, last[name])
                    continue
                x = result.coefficients
                if per_tensor:
                    x = x["*.w" if name.endswith(".w") else "*"]
                reference, size = expected(usable, x, name)
                value = torch.view_as_real(value) if dtype.is_complex else value
                eps = np.finfo(value.numpy().dtype).eps
                # Rounded coefficients, products and sums of at most 27 terms.
                error = np.abs(value.numpy() - reference).max(initial=0)
                assert error <= 30 * eps * size, name
            if to_files:
                loaded: dict[str, Any] = {}
                for path in result.files:
                    loaded.update(load_file(path))
                assert set(loaded) == set(state)
