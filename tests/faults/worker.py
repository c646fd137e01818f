"""A training run that can be killed at any moment and started again: ``worker.py FOLDER STEPS``.

Weights are a function of the step alone, so that a run in pieces must end exactly like a whole
one. ``CRASH=function:n`` in the environment ends the process, without any clean-up, at the n-th
call of that function (``before`` it) or after it (``after``). ``THIN=n`` keeps n times only,
``ENCODING`` is how they are stored.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_ema import EMA, Every
from posthoc_ema.thinning import Thinning

TRACKS = (0.05, 0.10)
SIZE = 40_000


def model(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {"w": rng.normal(size=SIZE).astype(np.float32), "step": np.array([step])}


def save(state: dict[str, Any], path: Path) -> None:
    """The checkpoint of a careful user: complete or not there."""
    file = io.BytesIO()
    arrays = {f"{k}.w": averages["w"] for k, averages in enumerate(state["averages"])}
    plain = {k: np.asarray(state[k]) for k in ("run_id", "t", "t_first", "clock")}
    np.savez(file, **arrays, **plain)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(file.getvalue())
    os.replace(temporary, path)


def load(ema: EMA, path: Path) -> None:
    with np.load(path) as found:
        averages = [{"w": found[f"{k}.w"]} for k in range(len(TRACKS)) if f"{k}.w" in found]
        ema.load_state_dict(
            {
                **ema.state_dict(),
                "run_id": str(found["run_id"]),
                **{k: found[k].item() for k in ("t", "t_first", "clock")},
                "counts_steps": None,
                "averages": averages,
            }
        )


def run(folder: Path, steps: int) -> None:
    thin = os.environ.get("THIN")
    schedule = Thinning(int(thin), TRACKS, TRACKS, ratio=1e-9, every=1) if thin else Every(1)
    encoding = os.environ.get("ENCODING", "float32")
    ema = EMA(sigma_rel=TRACKS, snapshots=folder / "ema", schedule=schedule, encoding=encoding)
    checkpoint = folder / "checkpoint.npz"
    if checkpoint.exists():
        load(ema, checkpoint)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save(ema.state_dict(), checkpoint)
    print(f"resumed at {ema.t}", flush=True)
    first = int(ema.t) + 1
    for step in range(first, steps + 1):
        ema.update(model(step))
        if step == first:
            print("updating", flush=True)
        if step % 5 == 0:
            save(ema.state_dict(), checkpoint)
    print("finished", flush=True)


def arm(crash: str) -> None:
    """End the process at a call of a function of ``os``: nothing is flushed, nothing undone."""
    when, name, number = crash.split(":")
    original, calls = getattr(os, name), 0

    def fatal(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(number) and when == "before":
            os._exit(137)
        result = original(*args, **kwargs)
        if calls == int(number):
            os._exit(137)
        return result

    setattr(os, name, fatal)


if __name__ == "__main__":
    if "CRASH" in os.environ:
        arm(os.environ["CRASH"])
    run(Path(sys.argv[1]), int(sys.argv[2]))
