"""Memory of a pass: bounded, whatever the number of snapshots and the size of the model.

Measured in a process of its own, as the peak of anonymous memory (``RssAnon``): pages of files
that the system keeps in memory do not count.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posthoc_ema import EMA, SnapshotStore

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc"
)


@pytest.fixture(autouse=True)
def _remove_large_files(tmp_path: Path) -> Iterator[None]:
    # pytest keeps the folders of its last three runs: these are gigabytes.
    yield
    shutil.rmtree(tmp_path)


MB = 1 << 20
LIMIT = 256 * MB  # beyond the outputs, as documented

MEASURE = """
    import json, resource, sys, threading, time
    import numpy as np
    import scipy.linalg, tqdm, safetensors, concurrent.futures  # their own memory is not ours
    from posthoc_ema import predict_error, reconstruct

    def anonymous():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024

    folder, arguments, files = json.loads(sys.argv[1])
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    before, peak, done = anonymous(), 0, False

    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = reconstruct(folder, progress=False, **arguments)
    peak = max(peak, anonymous())
    done = True
    watcher.join()
    first = result[0] if isinstance(result, list) else result
    print(json.dumps({"peak": peak - before, "inputs": len(first.inputs)}))
"""


def peak_of(folder: Path, files: int | None = None, **arguments: Any) -> dict[str, int]:
    """Peak growth of anonymous memory during one ``reconstruct``, and its number of inputs."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(MEASURE),
            json.dumps([str(folder), arguments, files]),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def write_run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    sizes: tuple[int, ...],
    tracks: tuple[float, ...] = (0.05, 0.10),
    encoding: str = "float16",
) -> None:
    # What is measured is reading: durability would take minutes here.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    rng = np.random.default_rng(0)
    ema = EMA(sigma_rel=tracks, snapshots=folder, encoding=encoding)
    weights = {f"w{k}": rng.normal(size=size).astype(np.float32) for k, size in enumerate(sizes)}
    for _ in range(times):
        for w in weights.values():
            part = rng.integers(0, max(len(w) - 1000, 1))
            w[part : part + 1000] += rng.normal(size=len(w[part : part + 1000]))
            w *= 0.999
        ema.update(weights)
        ema.snapshot()


@pytest.mark.slow
def test_forty_snapshots_of_ten_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # float16 at 10 MB: outputs of 20 MB for each target; two in one pass.
    write_run(tmp_path, monkeypatch, times=20, sizes=(3_000_000, 2_000_000, 7))
    found = peak_of(tmp_path, sigma_rel=[0.07, 0.2])
    assert found["inputs"] == 40
    assert found["peak"] < LIMIT + 2 * 20 * MB
    # The guard can fail: the files together are larger than what is allowed.
    assert sum(s.nbytes for s in SnapshotStore(tmp_path).list()) > LIMIT + 40 * MB


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["float32", "float16"])
def test_outputs_to_files_need_not_fit_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    # A model of 400 MB in tensors of 100 MB and smaller, four snapshots.
    sizes = (25_000_000, 25_000_000, 50_000_000)
    write_run(tmp_path / "ema", monkeypatch, times=2, sizes=sizes, encoding=encoding)
    found = peak_of(tmp_path / "ema", sigma_rel=0.07, out=str(tmp_path / "out"))
    assert found["peak"] < LIMIT < 400 * MB


@pytest.mark.slow
def test_hundreds_of_times_and_three_tracks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1536 files, more than most systems let a process open at once.
    write_run(tmp_path, monkeypatch, times=512, sizes=(20_000,), tracks=(0.05, 0.10, 0.20))
    found = peak_of(tmp_path, files=256, sigma_rel=[0.03, 0.07, 0.2])
    assert found["inputs"] == 1536
    assert found["peak"] < LIMIT


@pytest.mark.slow
def test_many_targets_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "ema", monkeypatch, times=2, sizes=(4_000_000,))
    targets = np.linspace(0.02, 0.28, 100).tolist()
    found = peak_of(tmp_path / "ema", sigma_rel=targets, out=str(tmp_path / "out"))
    assert found["peak"] < LIMIT
