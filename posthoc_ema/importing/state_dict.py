"""One checkpoint as named tensors: safetensors, ``torch.save``, or a folder of either."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posthoc_ema.errors import CorruptSnapshotError, SnapshotError
from posthoc_ema.importing.foreign import Contents, ForeignTensor
from posthoc_ema.importing.pickle_data import Record
from posthoc_ema.importing.region import Region
from posthoc_ema.importing.torch_data import StoredTensor, allowing, read_torch_file
from posthoc_ema.tensorfile import SUFFIX, read_header

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_FLOATING = frozenset({"F64", "F32", "F16", "BF16", "C64", "C128"} | {"F8_E4M3", "F8_E5M2"})
_WRAPPERS = ("module.", "_orig_mod.")
_INDEX = ".index.json"


def is_checkpoint(path: Path) -> bool:
    """Whether a file or folder looks like one."""
    if path.is_dir():
        return bool(_weight_files(path))
    return path.suffix in (SUFFIX, *TORCH_SUFFIXES) and not path.name.startswith(".")


def checkpoint_files(path: Path) -> tuple[Path, ...]:
    """The files that make up a checkpoint.

    Raises:
        SnapshotError: If there are none, or several sets of weights.
    """
    if not path.exists():
        raise SnapshotError(f"{path} does not exist; correct its name, or leave it out")
    if not path.is_dir():
        return (path,)
    found = _weight_files(path)
    if not found:
        raise SnapshotError(f"{path} holds no weights (safetensors, or files of torch.save)")
    indices = [file for file in found if file.name.endswith(_INDEX)]
    if indices:
        return tuple(_shards(indices[0]))
    if len(found) > 1:
        raise SnapshotError(
            f"{path} holds several files of weights ({', '.join(f.name for f in found[:3])}) and "
            "no index that joins them; name the one you mean"
        )
    return tuple(found)


def read_checkpoint(path: Path, key: str | None = None, allow: Sequence[str] = ()) -> Contents:
    """The tensors of a checkpoint by name; numbers are not read.

    Args:
        path: A file or folder.
        key: Where in it the weights are, as ``"state_dict"``, if there are several sets.
        allow: Further names that pickles may hold.

    Raises:
        UnsafePickleError: If a file names code; nothing was executed.
        SnapshotError: If a file is damaged, or it is not clear which weights are meant.
    """
    tensors: dict[str, ForeignTensor] = {}
    aliases: dict[str, str] = {}
    for file in checkpoint_files(path):
        contents = _safetensors(file) if file.suffix == SUFFIX else _torch(file, key, allow)
        for tensor in contents.tensors:
            if tensor.name in tensors:
                raise SnapshotError(f"{path} holds {tensor.name!r} twice; repair its index")
            tensors[tensor.name] = tensor
        aliases |= contents.aliases
    return Contents(list(tensors.values()), aliases)


def _weight_files(folder: Path) -> list[Path]:
    """An index if there is one, else files of weights; safetensors before others."""
    for suffix in (SUFFIX, *TORCH_SUFFIXES):
        if indices := sorted(folder.glob(f"*{suffix}{_INDEX}")):
            return indices[:1]
        found = sorted(p for p in folder.glob(f"*{suffix}") if not p.name.startswith("."))
        # What trainers leave beside the weights.
        others = ("optimizer", "scheduler", "training_args", "rng_state", "scaler", "random_states")
        if found := [file for file in found if not file.name.startswith(others)]:
            return found
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptSnapshotError(
            f"{index} is no index of shards ({error}); restore it from a copy"
        ) from error
    for name, shard in zip(names, shards, strict=True):
        if shard.name != name or not shard.is_file():
            raise CorruptSnapshotError(
                f"{index} names {name}, which is not beside it; copy the whole folder"
            )
    return shards


def _safetensors(path: Path) -> Contents:
    header = read_header(path)
    if isinstance(header.metadata, dict) and "format_version" in header.metadata:
        raise SnapshotError(
            f"{path} is a snapshot of this library already; there is nothing to import. To write "
            "its folder once more, use convert"
        )
    whole = Region.of_file(path)
    return Contents(
        [
            ForeignTensor(
                entry.name,
                entry.dtype,
                entry.shape,
                entry.dtype in _FLOATING,
                whole.part(entry.offset, entry.nbytes).read,
            )
            for entry in header.entries.values()
        ]
    )


def _torch(path: Path, key: str | None, allow: Sequence[str]) -> Contents:
    data = _plain(read_torch_file(path, allowing(allow)))
    state = _find(path, data, key)
    prefix = _common_prefix(state)
    tensors: list[ForeignTensor] = []
    aliases: dict[str, str] = {}
    places: dict[Any, str] = {}
    for full, tensor in state.items():
        name = full[len(prefix) :]
        # Tied weights are views of one storage; only whole, equal views are taken for tied.
        place = (id(tensor.storage), tensor.offset, tensor.shape, tensor.strides)
        first = places.setdefault(place, name) if tensor.count else name
        if first != name:
            aliases[name] = first
            continue
        tensors.append(
            ForeignTensor(name, tensor.dtype, tensor.shape, tensor.dtype in _FLOATING, tensor.read)
        )
    return Contents(tensors, aliases)


def _find(path: Path, data: Any, key: str | None) -> dict[str, StoredTensor]:
    """The mapping from names to tensors, wherever in the file it is."""
    if key is not None:
        for part in key.split("."):
            data = _plain(data.get(part)) if isinstance(data, dict) else None
        if not _is_state(data):
            raise SnapshotError(
                f"{path} holds no weights at {key!r}; its sets of weights are "
                f"{', '.join(_candidates(path, data)) or 'none'}"
            )
        return _tensors(data)
    if _is_state(data):
        return _tensors(data)
    found = _candidates(path, data)
    if len(found) != 1:
        raise SnapshotError(
            f"{path} holds {len(found) or 'no'} sets of weights"
            + (f" ({', '.join(found)}); say which with key=, --key" if found else "; leave it out")
        )
    return _tensors(next(iter(found.values())))


def _candidates(path: Path, data: Any) -> dict[str, dict[str, Any]]:
    """Sets of weights one level down."""
    if not isinstance(data, dict):
        return {}
    inner = {key: _plain(value) for key, value in data.items() if isinstance(key, str)}
    return {key: value for key, value in inner.items() if _is_state(value)}


def _is_state(data: Any) -> bool:
    """Mostly tensors, by names; optimisers keep theirs by numbers, or deeper."""
    if not isinstance(data, dict) or not data or not all(isinstance(key, str) for key in data):
        return False
    tensors = sum(isinstance(value, StoredTensor) for value in data.values())
    return 2 * tensors > len(data)


def _tensors(data: dict[str, Any]) -> dict[str, StoredTensor]:
    return {name: value for name, value in data.items() if isinstance(value, StoredTensor)}


def _plain(value: Any) -> Any:
    """A mapping, whatever class it was of."""
    return value.entries if isinstance(value, Record) and value.entries else value


def _common_prefix(state: dict[str, Any]) -> str:
    """What compiling and data parallelism put before all names."""
    prefix = ""
    while wrapper := next(
        (w for w in _WRAPPERS if all(n.startswith(prefix + w) for n in state)), None
    ):
        prefix += wrapper
    return prefix
