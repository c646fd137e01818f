"""The run directory on disk: its config, resumable checkpoints, and networks loaded from it.

run_dir/config.json      what the run was started with
run_dir/checkpoint.pt    latest resumable state, replaced atomically
run_dir/ema/             snapshots, written by posthoc_ema
run_dir/stats.jsonl      one line of measurements at each interval
run_dir/magnitudes.jsonl magnitudes of all layers, one line at each interval
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from reference_model.configs import TrainConfig

if TYPE_CHECKING:
    from reference_model.precond import Denoiser

CONFIG_FILE = "config.json"
CHECKPOINT_FILE = "checkpoint.pt"
SNAPSHOTS = "ema"
STATS_FILE = "stats.jsonl"
CHANGEABLE = ("vae", "magnitudes_nimg")
"""Fields of a run's config that training does not depend on."""


class RunDirError(ValueError):
    """A run directory does not hold what was asked of it."""


def start_run(run_dir: str | os.PathLike[str], config: TrainConfig) -> None:
    """Record the config in a new run directory, or check that the run there has the same.

    What training does not depend on may change, and is recorded anew.

    Args:
        run_dir: Directory of the run; made if need be.
        config: What the run is to be started or continued with.

    Raises:
        RunDirError: If the run there was started with another config.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    wanted = config.to_dict()
    if (run_dir / CONFIG_FILE).exists():
        pairs = _flatten_pair(load_config(run_dir).to_dict(), wanted)
        changed = {name: (old, new) for name, (old, new) in pairs.items() if old != new}
        if not changed:
            return
        differences = [
            f"{name}={old!r} (now {new!r})"
            for name, (old, new) in changed.items()
            if name not in CHANGEABLE
        ]
        if differences:
            raise RunDirError(
                f"{run_dir} was started with {', '.join(differences)}; continue it with the same "
                "options, or choose another run directory"
            )
    text = json.dumps(wanted, indent=2) + "\n"
    write_atomically(run_dir / CONFIG_FILE, lambda file: file.write(text.encode()))


def load_config(run_dir: str | os.PathLike[str]) -> TrainConfig:
    """Read the config that a run was started with.

    Raises:
        RunDirError: If there is none, or it cannot be understood.
    """
    path = Path(run_dir) / CONFIG_FILE
    try:
        return TrainConfig.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise RunDirError(
            f"{path} does not exist; start a run with `python -m reference_model train`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{path} is not a config of this version: {error}") from error


def save_checkpoint(run_dir: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Replace the run's checkpoint: a crash leaves the old one or the new one, whole.

    Args:
        run_dir: Directory of the run.
        state: Tensors, numbers, strings and containers of them.
    """
    path = Path(run_dir) / CHECKPOINT_FILE
    write_atomically(path, lambda file: torch.save(dict(state), file))


def load_checkpoint(run_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the run's checkpoint, or return `None` where there is none yet.

    Raises:
        RunDirError: If the file cannot be read.
    """
    path = Path(run_dir) / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        # weights_only: a checkpoint holds data, and loading one never runs code.
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunDirError(
            f"{path} cannot be read ({error}); remove it to train from the start"
        ) from error


def load_network(
    run_dir: str | os.PathLike[str], weights: Mapping[str, Any] | None = None
) -> Denoiser:
    """Rebuild a run's network.

    Args:
        run_dir: Directory of the run.
        weights: State dict to load, such as `posthoc_ema.reconstruct(...).state_dict()`;
            `None` for the raw training weights of the latest checkpoint.

    Returns:
        The network, on the CPU, in evaluation mode.

    Raises:
        RunDirError: If there is no run, or no checkpoint to take raw weights from.
        RuntimeError: If names or shapes of `weights` are not this network's.
    """
    from reference_model.precond import Denoiser

    config = load_config(run_dir)
    if weights is None:
        checkpoint = load_checkpoint(run_dir)
        if checkpoint is None:
            raise RunDirError(f"{run_dir} has no checkpoint yet; train first, or pass weights")
        weights = checkpoint["net"]
    net = Denoiser(config.network)
    net.load_state_dict(weights)
    return net.eval()


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], Any], *, durable: bool = True
) -> None:
    """Write a file so that a crash at any instant leaves the old content or the new.

    Args:
        path: File to replace.
        write: Called with a binary file to write the content to.
        durable: Whether to wait until it is on disk. Without, that holds for a killed process
            but not for a power failure.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if not durable:
        return
    # The rename itself is on disk only once the directory is.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _flatten_pair(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Pair up the entries of two nested dicts under dotted names."""
    pairs: dict[str, tuple[Any, Any]] = {}
    for key in {**a, **b}:
        old, new = a.get(key), b.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            pairs |= {f"{key}.{name}": pair for name, pair in _flatten_pair(old, new).items()}
        else:
            pairs[key] = (old, new)
    return pairs
