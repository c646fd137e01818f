"""Processes of an ablation: one for each run, a few at a time, with one progress display."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reference_model.signals import stop_signals

LOG_FILE = "ablate.log"
STOPPED = 75
"""Exit status of a worker that was asked to stop and saved first (EX_TEMPFAIL)."""
POLL_SECONDS, SHOW_SECONDS = 0.1, 1.0


class StoppedError(RuntimeError):
    """Work was stopped on request; what was done is kept."""


@dataclass(frozen=True)
class Job:
    """What one worker does.

    Attributes:
        name: For people.
        run_dir: Directory of the run; the worker's output goes into its `ablate.log`.
        settings: What `ablate_worker` takes, as plain data.
    """

    name: str
    run_dir: Path
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """A run that did not finish.

    Attributes:
        name: Of the run.
        reason: Last line of its log.
        log: The whole log.
    """

    name: str
    reason: str
    log: Path

    def __str__(self) -> str:
        return f"{self.name} failed: {self.reason} (log: {self.log})"


def run_jobs(
    jobs: Sequence[Job],
    *,
    parallel: int,
    threads: int,
    total: int,
    done: Callable[[], int],
    progress: bool = True,
) -> list[Failure]:
    """Run workers, at most so many at a time.

    Args:
        jobs: In the order in which to start them.
        parallel: Most at a time.
        threads: CPU threads of each.
        total: Images of all runs, for the display.
        done: Counts those that are done.
        progress: Whether to show progress.

    Returns:
        Those that failed.

    Raises:
        StoppedError: After SIGTERM or Ctrl-C, once all workers have saved.
    """
    waiting, running = list(jobs), dict[str, tuple[Job, subprocess.Popen[bytes]]]()
    failures: list[Failure] = []
    shown = -SHOW_SECONDS
    bar = tqdm(total=total, desc="ablate", unit="img", unit_scale=True, disable=not progress)
    with bar, stop_signals() as stop:
        try:
            while (waiting or running) and not stop.is_set():
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    running[job.name] = job, _start(job, threads)
                time.sleep(POLL_SECONDS)
                for job, worker in list(running.values()):
                    if worker.poll() is None:
                        continue
                    del running[job.name]
                    _close(worker)
                    if worker.returncode:
                        failures.append(_failure(job, worker.returncode))
                        bar.write(str(failures[-1]), file=sys.stderr)
                if progress and time.monotonic() - shown >= SHOW_SECONDS:
                    shown = time.monotonic()
                    _show(bar, done(), running, len(waiting))
            if progress:
                _show(bar, done(), running, len(waiting))
        finally:
            # Workers live as long as their standard input is open.
            for _, worker in running.values():
                _close(worker)
            for _, worker in running.values():
                worker.wait()
    if stop.is_set():
        raise StoppedError("stopped; all runs were saved, and the same command goes on from there")
    return failures


def _start(job: Job, threads: int) -> subprocess.Popen[bytes]:
    job.run_dir.mkdir(parents=True, exist_ok=True)
    package = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        # Where this process has the package from, whatever folder it was started in.
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }
    settings = json.dumps({**job.settings, "run_dir": str(job.run_dir), "threads": threads})
    with (job.run_dir / LOG_FILE).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "reference_model.ablate_worker", settings],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is this process's to handle
        )


def _close(worker: subprocess.Popen[bytes]) -> None:
    assert worker.stdin is not None  # a pipe
    worker.stdin.close()


def _failure(job: Job, status: int) -> Failure:
    log = job.run_dir / LOG_FILE
    if status < 0:
        return Failure(job.name, f"ended by signal {-status}", log)
    if status == STOPPED:
        return Failure(job.name, "was stopped", log)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Failure(job.name, lines[-1] if lines else f"exit status {status}", log)


def _show(bar: Any, done: int, running: Mapping[str, Any], waiting: int) -> None:
    words = ", ".join(running) + (f" · {waiting} waiting" if waiting else "")
    bar.set_postfix_str(words, refresh=False)
    bar.n = done
    bar.refresh()
