"""Measurements of a training run: lines of stats.jsonl, and the same for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from reference_model.checkpoint import STATS_FILE, write_atomically

TENSORBOARD = "tensorboard"
"""Folder of a run for TensorBoard's files."""

LINE_BYTES = 4096
"""More than a line of statistics has."""


class Window:
    """What adds up between two lines of statistics, on the device where it arises.

    Args:
        device: Where losses arise.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.steps = 0
        self.loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self.bad_gradients = torch.zeros((), dtype=torch.int64, device=self._device)

    def add(self, loss: Tensor, bad_gradients: Tensor) -> None:
        """Take in a step: its mean loss, or this process's share of it, and its bad gradients."""
        self.steps += 1
        self.loss += loss
        self.bad_gradients += bad_gradients

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from sums that a checkpoint holds."""
        self.reset()
        self.steps = int(state["steps"])
        self.loss += state["loss"]
        self.bad_gradients += int(state["bad_gradients"])


class Writer(Protocol):
    """Takes lines of statistics."""

    def __call__(self, line: Mapping[str, float]) -> None:
        """Write a line, which has the images seen as `nimg`."""


@contextmanager
def stats_writer(
    run_dir: Path, nimg: int, *, tensorboard: bool = False, active: bool = True
) -> Iterator[Writer]:
    """Write statistics of a run that begins, or goes on, with `nimg` images seen.

    What an earlier process wrote about later images is dropped: it will be written again.

    Args:
        run_dir: Directory of the run.
        nimg: Images seen.
        tensorboard: Whether to write for TensorBoard too.
        active: Whether this process writes at all.

    Yields:
        A function that writes a line, durable against a killed process when it returns.

    Raises:
        ValueError: If TensorBoard is asked for and not installed.
    """
    if not active:
        yield lambda line: None
        return
    drop_stats_after(run_dir / STATS_FILE, nimg)
    board = _board(run_dir / TENSORBOARD, nimg) if tensorboard else None
    with (run_dir / STATS_FILE).open("a") as file:

        def write(line: Mapping[str, float]) -> None:
            print(json.dumps(line), file=file, flush=True)
            if board is not None:
                for name, value in line.items():
                    if name != "nimg":
                        board.add_scalar(f"train/{name}", value, int(line["nimg"]))
                board.flush()

        try:
            yield write
        finally:
            if board is not None:
                board.close()


def drop_stats_after(path: Path, nimg: int) -> None:
    """Remove lines that a run wrote after the checkpoint it now continues from."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        # A line cut short by a crash was written after any checkpoint.
        kept = [s for s in lines if s.endswith("\n") and json.loads(s)["nimg"] <= nimg]
        if kept != lines:
            write_atomically(path, lambda file: file.write("".join(kept).encode()))


def _board(folder: Path, nimg: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "statistics for TensorBoard need tensorboard, which is not installed: "
            "pip install 'posthoc-ema[tensorboard]'"
        ) from error
    # TensorBoard hides points from `purge_step` on that earlier files hold.
    return SummaryWriter(str(folder), purge_step=nimg + 1)


def last_nimg(path: Path) -> int:
    """Images seen at the last line of a run's statistics; 0 where there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - LINE_BYTES, 0))
            *_, line = [b"", *file.read().splitlines()]
        return int(json.loads(line)["nimg"])
    except (OSError, ValueError, KeyError):
        return 0  # not there, or a line that is being written
