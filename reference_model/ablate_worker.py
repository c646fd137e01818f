"""One run of an ablation in a process of its own: train, then measure.

Started by `ablate_pool` as ``python -m reference_model.ablate_worker SETTINGS``. It stops, and
saves before, when its standard input ends: also when the process that started it was killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from reference_model.ablate_pool import STOPPED
from reference_model.configs import TrainConfig
from reference_model.protocol import Protocol
from reference_model.sweep import sweep
from reference_model.train import train

try:
    import fcntl
except ImportError:  # elsewhere than on POSIX nothing guards against two workers of one run
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "ablate.lock"


def work(settings: Mapping[str, Any]) -> int:
    """Train and measure one run.

    Args:
        settings: As `AblationRun.job` makes them.

    Returns:
        Exit status: 0, or `STOPPED`.
    """
    torch.set_num_threads(settings["threads"])
    run_dir = Path(settings["run_dir"])
    with alone(run_dir):
        config = TrainConfig.from_dict(settings["config"])
        if train(config, run_dir, progress=False) < config.total_nimg:
            return STOPPED
        # Beside the run, so that a later `sweep` of it goes on with the same record.
        for path in Path(settings["judge_dir"]).iterdir():
            if not (run_dir / path.name).exists():
                shutil.copyfile(path, run_dir / path.name)
        sweep(run_dir, settings["sigma_rels"], Protocol(**settings["protocol"]), progress=False)
    return 0


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Wait until no other worker has this run: that of a killed ablation may still be saving."""
    with (run_dir / LOCK_FILE).open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stop_with_input() -> None:
    """Ask this process to stop once its standard input ends."""

    def watch() -> None:
        # Not `sys.stdin.read`, whose lock could not be had when the process ends.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Do what the command line says; errors go to the log, the last line says what is wrong."""
    stop_with_input()
    print(time.strftime("%Y-%m-%d %H:%M:%S started"), flush=True)
    try:
        return work(json.loads(sys.argv[1]))
    except (ValueError, OSError, NotImplementedError) as error:
        print(error, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
