"""The run directory on disk: its config, resumable checkpoints, and networks loaded from it.

run_dir/config.json        what the run was started with
run_dir/data.json          what the data set was then (`run_record`)
run_dir/starts.jsonl       when, where and with what it was started and continued (`run_record`)
run_dir/checkpoint.pt      latest resumable state, replaced atomically
run_dir/checkpoint-<nimg>/ shards that belong to it, if the model was sharded
run_dir/ema/               snapshots, written by posthoc_ema
run_dir/stats.jsonl        one line of measurements at each interval (`stats`)
run_dir/magnitudes.jsonl   magnitudes of all layers, one line at each interval
run_dir/tensorboard/       the same for TensorBoard, if asked for
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from reference_model.checkpoint_shards import join, split, whole
from reference_model.configs import TrainConfig
from reference_model.run_record import DATA_FILE, differences

if TYPE_CHECKING:
    from reference_model.distributed import Processes
    from reference_model.precond import Denoiser

CONFIG_FILE = "config.json"
CHECKPOINT_FILE = "checkpoint.pt"
SHARDS = "checkpoint-"
SNAPSHOTS = "ema"
STATS_FILE = "stats.jsonl"
CHANGEABLE = ("vae", "magnitudes_nimg")
"""Fields of a run's config that training does not depend on; and `data`, if it is the same."""


class RunDirError(ValueError):
    """A run directory does not hold what was asked of it."""


def start_run(
    run_dir: str | os.PathLike[str], config: TrainConfig, data: Mapping[str, Any] | None = None
) -> None:
    """Record the config in a new run directory, or check that the run there has the same.

    What training does not depend on may change, and is recorded anew. So may the path of the
    data, if what lies there is the same.

    Args:
        run_dir: Directory of the run; made if need be.
        config: What the run is to be started or continued with.
        data: What `run_record.describe_data` says of the data set; `None`: not looked at.

    Raises:
        RunDirError: If the run there was started with another config, or on other data.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    wanted, changed = config.to_dict(), True
    if (run_dir / CONFIG_FILE).exists():
        pairs = _flatten_pair(load_config(run_dir).to_dict(), wanted)
        changed = any(old != new for old, new in pairs.values())
        changeable: tuple[str, ...] = CHANGEABLE
        if data is not None and _is_same_data(run_dir, config, data):
            changeable = (*CHANGEABLE, "data")
        differing = [
            f"{name}={old!r} (now {new!r})"
            for name, (old, new) in pairs.items()
            if old != new and name not in changeable
        ]
        if differing:
            raise RunDirError(
                f"{run_dir} was started with {', '.join(differing)}; continue it with the same "
                "options, or choose another run directory"
            )
    if changed:
        _write_json(run_dir / CONFIG_FILE, wanted)
    # A run of a version that kept no record: what its path holds now is taken for its data.
    if data is not None and not (run_dir / DATA_FILE).exists():
        _write_json(run_dir / DATA_FILE, data)


def _is_same_data(run_dir: Path, config: TrainConfig, data: Mapping[str, Any]) -> bool:
    """Whether the data set is known to be what the run was started on; raises if it is not."""
    path = run_dir / DATA_FILE
    if not path.exists():
        return False
    try:
        changed = differences(json.loads(path.read_text()), data)
    except (ValueError, AttributeError) as error:
        raise RunDirError(f"{path} cannot be read: {error}") from error
    if changed:
        raise RunDirError(
            f"the data set {config.data!r} is not the one that {run_dir} was started on: "
            f"{changed}; bring that back, give the path where it is now as data, or choose "
            "another run directory"
        )
    return True


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


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


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    state: Mapping[str, Any],
    processes: Processes | None = None,
) -> None:
    """Replace the run's checkpoint: a crash leaves the old one or the new one, whole.

    Each process writes the rows that it holds of sharded tensors to a file of its own. They
    count once the first process has put `checkpoint.pt` in place, which names them.

    Args:
        run_dir: Directory of the run.
        state: Tensors, numbers, strings and containers of them; with its images seen as `nimg`.
        processes: All that call this together, as they must where tensors are sharded; `None`:
            this one alone.
    """
    run_dir = Path(run_dir)
    main, held = split(state)
    folder = f"{SHARDS}{state.get('nimg')}"
    if held and processes is not None:
        names = [f"{rank + 1}-of-{processes.count}.pt" for rank in range(processes.count)]
        with processes.together():
            (run_dir / folder).mkdir(exist_ok=True)
            own = run_dir / folder / names[processes.rank]
            write_atomically(own, lambda file: torch.save(held, file))
        main["shards"] = [f"{folder}/{name}" for name in names]
    if processes is None or processes.is_first:
        write_atomically(run_dir / CHECKPOINT_FILE, lambda file: torch.save(main, file))
        for old in run_dir.glob(f"{SHARDS}*"):
            if not (held and old.name == folder):
                shutil.rmtree(old)


def load_checkpoint(
    run_dir: str | os.PathLike[str], *, sharded: bool = False
) -> dict[str, Any] | None:
    """Read the run's checkpoint, or return `None` where there is none yet.

    Args:
        run_dir: Directory of the run.
        sharded: Leave sharded tensors in pieces (`checkpoint_shards.Rows`), which are read when
            they are asked for; otherwise they come whole.

    Raises:
        RunDirError: If a file cannot be read.
    """
    path = Path(run_dir) / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        # weights_only: a checkpoint holds data, and loading one never runs code.
        state = torch.load(path, map_location="cpu", weights_only=True)
        shards = []
        for name in state.pop("shards", ()):
            path = Path(run_dir) / name
            shards.append(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:
        raise RunDirError(
            f"{path} cannot be read ({error}); remove {CHECKPOINT_FILE} to train from the start"
        ) from error
    if shards:
        state = join(state, shards)
    return state if sharded else whole(state)


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
