"""Networks of trained runs: which weights, as data, and all of them in few passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_ema import Reconstruction, SnapshotStore, reconstruct
from reference_model.checkpoint import (
    SNAPSHOTS,
    RunDirError,
    load_checkpoint,
    load_config,
    load_network,
)

if TYPE_CHECKING:
    from reference_model.configs import TrainConfig
    from reference_model.precond import Denoiser


MAX_BYTES = 4 << 30
"""Default bound on the averages held at a time."""


@dataclass(frozen=True)
class Weights:
    """One set of weights of a run.

    Attributes:
        run_dir: Directory of the run.
        sigma_rel: EMA length to reconstruct; `None` for the raw weights of the checkpoint.
        t: Time of the average, in images; `None` for the last snapshot.
    """

    run_dir: Path
    sigma_rel: float | None
    t: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "run_dir", Path(self.run_dir))
        if self.sigma_rel is None and self.t is not None:
            raise ValueError("raw weights are those of the last checkpoint: t must be None")

    def describe(self) -> dict[str, Any]:
        """What these weights are, wherever the run lies, as plain data.

        Raises:
            RunDirError: If there is no checkpoint to take raw weights from.
            posthoc_ema.SnapshotError: If there are no snapshots.
        """
        if self.sigma_rel is None:
            checkpoint = load_checkpoint(self.run_dir)
            if checkpoint is None:
                raise RunDirError(f"{self.run_dir} has no checkpoint yet; train first")
            return {"run_id": checkpoint["ema"]["run_id"], "raw": True, "t": checkpoint["nimg"]}
        last = SnapshotStore(self.run_dir / SNAPSHOTS).list()[-1]
        t = last.t if self.t is None else self.t
        return {"run_id": last.run.run_id, "sigma_rel": self.sigma_rel, "t": t}


def load_networks(wanted: Sequence[Weights], *, progress: bool = False) -> list[Denoiser]:
    """Load networks; averages of one run and time take as few passes as `Averages` needs.

    Args:
        wanted: Which weights.
        progress: Whether to show progress of the passes.

    Returns:
        A network for each, on the CPU, in evaluation mode.

    Raises:
        RunDirError: If there is no run, or no checkpoint to take raw weights from.
        posthoc_ema.SnapshotError: If snapshots are missing or damaged.
    """
    averages = Averages([w for w in wanted if w.sigma_rel is not None], progress=progress)
    networks = []
    for w in wanted:
        made = averages.get(w) if w.sigma_rel is not None else []
        # None stands for the raw weights, as `load_network` takes them.
        networks.append(load_network(w.run_dir, made[0].state_dict() if made else None))
    return networks


def check_guide(weights: Weights, config: TrainConfig) -> None:
    """Refuse a guide that takes other images or classes than the network it is to guide.

    Args:
        weights: Of the guide.
        config: Of the run whose network it is to guide.

    Raises:
        RunDirError: If there is no run to guide with.
        ValueError: If the guide does not fit.
    """
    guide = load_config(weights.run_dir)
    for name in ("encoder", "img_channels", "img_resolution", "label_dim"):
        takes, needed = (
            getattr(c if hasattr(c, name) else c.network, name) for c in (guide, config)
        )
        if takes != needed and not (name == "label_dim" and takes == 0):
            raise ValueError(
                f"the network of {weights.run_dir} has {name}={takes} and cannot guide one with "
                f"{name}={needed}; a guide needs the same images, and the same classes or none"
            )


class Averages:
    """Averages handed out one after the other, reconstructed in as few passes as memory allows.

    One pass over the snapshots makes all averages of one run and time that will be asked for, or
    the next of them where all together would exceed ``max_bytes``.

    Args:
        upcoming: Averages that will be asked for, in that order; each as often as it will be.
        max_bytes: Bound on the averages held at a time; what is asked for together is held at
            least.
        method: As of `posthoc_ema.reconstruct`.
        progress: Whether to show progress of the passes.

    Attributes:
        last_pass: Seconds that the last pass took, and how many averages it made.
    """

    def __init__(
        self,
        upcoming: Sequence[Weights],
        max_bytes: int = MAX_BYTES,
        *,
        method: str = "kriging",
        progress: bool = False,
    ) -> None:
        self._upcoming = list(upcoming)
        self._max_bytes, self._method, self._progress = max_bytes, method, progress
        self._held: dict[Weights, Reconstruction] = {}
        self.last_pass = (0.0, 0)

    def get(self, *wanted: Weights) -> list[Reconstruction]:
        """Hand out averages that are needed together.

        Raises:
            posthoc_ema.SnapshotError: If snapshots are missing or damaged.
        """
        while missing := [w for w in wanted if w not in self._held]:
            self._fill(missing[0], wanted)
        for w in wanted:
            if w in self._upcoming:
                self._upcoming.remove(w)
        made = [self._held[w] for w in wanted]
        later = set(self._upcoming)
        self._held = {w: m for w, m in self._held.items() if w in later}
        return made

    def _fill(self, first: Weights, needed: Sequence[Weights]) -> None:
        """Reconstruct one average, and others of its run and time as far as they fit."""
        run_dir, t = first.run_dir, first.t
        here = [w for w in (*needed, *self._upcoming) if (w.run_dir, w.t) == (run_dir, t)]
        lengths = [w for w in dict.fromkeys([first, *here]) if w not in self._held]
        room = self._room(first)
        if len(lengths) > room:
            # Of what is kept, only what is needed now: everything else can be made again.
            self._held = {w: m for w, m in self._held.items() if w in needed}
        lengths = lengths[: max(room - len(self._held), 1)]
        started = time.monotonic()
        made = reconstruct(
            run_dir / SNAPSHOTS,
            [w.sigma_rel for w in lengths if w.sigma_rel is not None],
            t=t,
            method=self._method,
            framework="torch",
            progress=self._progress,
        )
        self.last_pass = (round(time.monotonic() - started, 3), len(made))
        self._held.update(zip(lengths, made, strict=True))

    def _room(self, weights: Weights) -> int:
        """How many averages of this run fit into memory."""
        snapshots = SnapshotStore(weights.run_dir / SNAPSHOTS).list()
        # In memory averages are float32, whatever the encoding of the files.
        size = sum(4 * snapshots[-1].entries[name].count for name in snapshots[-1].averages)
        return max(self._max_bytes // size, 1)
