"""Networks of trained runs: which weights, as data, and all of them in few passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_ema import SnapshotStore, reconstruct
from reference_model.checkpoint import SNAPSHOTS, RunDirError, load_checkpoint, load_network

if TYPE_CHECKING:
    from reference_model.precond import Denoiser


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
    """Load networks; averages of one run at one time take one pass over its snapshots.

    Args:
        wanted: Which weights.
        progress: Whether to show progress of the passes.

    Returns:
        A network for each, on the CPU, in evaluation mode.

    Raises:
        RunDirError: If there is no run, or no checkpoint to take raw weights from.
        posthoc_ema.SnapshotError: If snapshots are missing or damaged.
    """
    averages = [w for w in dict.fromkeys(wanted) if w.sigma_rel is not None]
    states: dict[Weights, Mapping[str, Any]] = {}
    for run_dir, t in dict.fromkeys((w.run_dir, w.t) for w in averages):
        group = [w for w in averages if (w.run_dir, w.t) == (run_dir, t)]
        lengths = [w.sigma_rel for w in group if w.sigma_rel is not None]
        made = reconstruct(run_dir / SNAPSHOTS, lengths, t=t, framework="torch", progress=progress)
        states |= {w: m.state_dict() for w, m in zip(group, made, strict=True)}
    # None stands for the raw weights, as `load_network` takes them.
    return [load_network(w.run_dir, states.get(w)) for w in wanted]
