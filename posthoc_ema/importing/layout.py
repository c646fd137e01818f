"""Where in a checkpoint its weights are: beside optimisers, in sub-folders, in shards.

Trainers leave much beside weights. A folder of ``transformers`` or PEFT has them in one file or
in shards, ``accelerate`` one file for each model, the scripts of ``diffusers`` a folder for each
(``unet``, ``unet_ema``). Where there are several sets, the user says which by its path.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from posthoc_ema.errors import CorruptSnapshotError, SnapshotError
from posthoc_ema.tensorfile import SUFFIX

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
_SUFFIXES = (SUFFIX, *TORCH_SUFFIXES)
_INDEX = ".index.json"
_OTHERS = re.compile(
    r"optim(izer)?([-_.\d]|$)|opt[-_]?\d*\.|(lr_)?scheduler|(grad_)?scaler|rng_state|random_states"
    r"|sampler(_\d+)?\.|dl_state_dict|custom_checkpoint|train(ing|er)[-_](args|state)"
    r"|ema_state\.safetensors"
)
_OTHER_FOLDERS = re.compile(r"\.|global_step\d|(runs|logs|wandb|samples|abandoned)$")
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}$")
_DEEPEST = 3


def is_checkpoint(path: Path) -> bool:
    """Whether a file or folder looks like one."""
    if path.is_dir():
        return bool(sets_of_weights(path))
    return is_weight_file(path) and not _SHARD.search(stem(path))


def is_weight_file(path: Path) -> bool:
    """Whether a file may hold weights, by its name: no optimiser, no state of a trainer."""
    named = path.name.endswith(_SUFFIXES) and not path.name.startswith(".")
    return named and not _OTHERS.match(path.name) and path.is_file()


def stem(path: Path) -> str:
    """Name of a file without what says its format; of a folder, its name."""
    suffix = max((s for s in _SUFFIXES if path.name.endswith(s)), key=len, default="")
    return path.name.removesuffix(suffix)


def sets_of_weights(folder: Path, deepest: int = _DEEPEST) -> dict[str, Path]:
    """The sets of weights in a folder, by their paths in it.

    Args:
        folder: A checkpoint.
        deepest: How many levels of sub-folders to look into.

    Returns:
        Files, or indices of shards. A sub-folder that has one set goes by its own name.
    """
    found = {path.name: path for path in _direct(folder)}
    if not deepest:
        return found
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if inner.is_symlink() and folder.resolve().is_relative_to(inner.resolve()):
            continue  # to itself, or above
        if not _OTHER_FOLDERS.match(inner.name) and not _OTHERS.match(inner.name):
            held = sets_of_weights(inner, deepest - 1)
            for name, path in held.items():
                found[inner.name if len(held) == 1 else f"{inner.name}/{name}"] = path
    return found


def checkpoint_files(path: Path, subfolder: str | None = None) -> tuple[Path, ...]:
    """The files that make up a checkpoint.

    Args:
        path: A file or folder.
        subfolder: Which folder or file in it, if there are several sets of weights.

    Raises:
        SnapshotError: If there are none, or several sets of weights.
    """
    if not path.exists():
        raise SnapshotError(f"{path} does not exist; correct its name, or leave it out")
    if not path.is_dir():
        return (path,)
    place = path / (subfolder or "")
    if place.is_file():
        return _files_of(place)
    found = sets_of_weights(place) if place.is_dir() else {}
    if len(found) == 1:
        return _files_of(next(iter(found.values())))
    if found:
        shards = sum(bool(_SHARD.search(stem(file))) for file in found.values())
        why = " and no index that joins them" if shards == len(found) else ""
        prefix = f"{subfolder}/" if subfolder else ""
        raise SnapshotError(
            f"{place} holds several sets of weights ({_listed(found)}){why}; say which with "
            f"subfolder=, --subfolder {prefix}{next(iter(found))}"
        )
    there = sets_of_weights(path) if subfolder else {}
    if there:
        raise SnapshotError(
            f"{path} holds no weights at {subfolder!r}; its sets of weights are {_listed(there)}"
        )
    raise SnapshotError(
        f"{path} holds no weights (safetensors, or files of torch.save){why_no_weights(path)}"
    )


def _listed(names: dict[str, Path]) -> str:
    return ", ".join([*names][:8]) + (", ..." if len(names) > 8 else "")


def _direct(folder: Path) -> list[Path]:
    """Files of weights, an index for its shards; safetensors instead of the same as pickles."""
    files = sorted(path for path in folder.iterdir() if is_weight_file(path))
    indices = sorted(
        path
        for path in folder.glob(f"*{_INDEX}")
        if path.name.removesuffix(_INDEX).endswith(_SUFFIXES) and not _OTHERS.match(path.name)
    )
    shards = {_SHARD.sub("", stem(Path(path.name.removesuffix(_INDEX)))) for path in indices}
    single = [
        f for f in files if not _SHARD.search(stem(f)) or _SHARD.sub("", stem(f)) not in shards
    ]
    found = indices + single
    safe = {_model(path) for path in found if path.name.removesuffix(_INDEX).endswith(SUFFIX)}
    return [
        path
        for path in found
        if path.name.removesuffix(_INDEX).endswith(SUFFIX) or _model(path) not in safe
    ]


def _model(path: Path) -> str:
    """What a file is called whatever its format: ``pytorch_model.bin`` is ``model.safetensors``."""
    return stem(Path(path.name.removesuffix(_INDEX))).replace("pytorch_model", "model")


def _files_of(found: Path) -> tuple[Path, ...]:
    return tuple(_shards(found)) if found.name.endswith(_INDEX) else (found,)


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptSnapshotError(
            f"{index} is no index of shards ({error}); restore it from a copy"
        ) from error
    for name, shard in zip(names, shards, strict=True):
        if shard.name != name or not shard.is_file():
            raise CorruptSnapshotError(
                f"{index} names {name}, which is not beside it; copy the whole folder"
            )
    return shards


def why_no_weights(folder: Path) -> str:
    """What to do about a folder whose weights are in pieces of another kind, or nothing."""
    if next(folder.glob("**/*.distcp"), None):
        return (
            "; it is of torch.distributed.checkpoint: join it first, with python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    if next(folder.glob("**/zero_to_fp32.py"), None):
        return "; it is of DeepSpeed: join it first, with the zero_to_fp32.py that it holds"
    return ""
