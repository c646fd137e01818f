"""One checkpoint as named tensors: safetensors, ``torch.save``, or a folder of either."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posthoc_ema.errors import SnapshotError
from posthoc_ema.importing.foreign import Contents, ForeignTensor
from posthoc_ema.importing.layout import checkpoint_files
from posthoc_ema.importing.pickle_data import Record, describe
from posthoc_ema.importing.region import Region
from posthoc_ema.importing.torch_data import StoredTensor, allowing, read_torch_file
from posthoc_ema.tensorfile import SUFFIX, read_header

_FLOATING = frozenset({"F64", "F32", "F16", "BF16", "C64", "C128"} | {"F8_E4M3", "F8_E5M2"})
_WRAPPERS = ("module.", "_orig_mod.")
_OTHERS = re.compile(
    r"optim|opt$|callbacks$|loops$|hyper_parameters$|(lr_)?sched|scaler|amp|rng|random|metric"
)
_DEEPEST = 2


def read_checkpoint(
    path: Path,
    key: str | None = None,
    allow: Sequence[str] = (),
    subfolder: str | None = None,
) -> Contents:
    """The tensors of a checkpoint by name; numbers are not read.

    Args:
        path: A file or folder.
        key: Where in it the weights are, as ``"state_dict"``, if there are several sets; what
            names begin with, as ``"state_dict.ema"`` for ``ema.weight``, may be part of it.
        allow: Further names that pickles may hold.
        subfolder: Which folder or file in it, if there are several sets of weights.

    Raises:
        UnsafePickleError: If a file names code; nothing was executed.
        SnapshotError: If a file is damaged, or it is not clear which weights are meant.
    """
    tensors: dict[str, ForeignTensor] = {}
    aliases: dict[str, str] = {}
    for file in checkpoint_files(path, subfolder):
        contents = _safetensors(file, key) if file.suffix == SUFFIX else _torch(file, key, allow)
        for tensor in contents.tensors:
            if tensor.name in tensors:
                raise SnapshotError(f"{path} holds {tensor.name!r} twice; repair its index")
            tensors[tensor.name] = tensor
        aliases |= contents.aliases
    return Contents(list(tensors.values()), aliases)


def _safetensors(path: Path, key: str | None) -> Contents:
    header = read_header(path)
    if isinstance(header.metadata, dict) and "format_version" in header.metadata:
        raise SnapshotError(
            f"{path} is a snapshot of this library already; there is nothing to import. To write "
            "its folder once more, use convert"
        )
    whole = Region.of_file(path)
    entries = header.entries if key is None else _beginning(header.entries, key)
    if not entries:
        raise SnapshotError(
            f"{path} holds no weights at {key!r}; its names begin with "
            f"{_beginnings(header.entries)}"
        )
    return Contents(
        [
            ForeignTensor(
                name,
                entry.dtype,
                entry.shape,
                entry.dtype in _FLOATING,
                whole.part(entry.offset, entry.nbytes).read,
            )
            for name, entry in entries.items()
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
        found = _at(data, key)
        if not _is_state(found):
            sets = _candidates(data)
            listed = ", ".join(sets) or "none"
            if _is_state(data):
                listed = f"of names that begin with {_beginnings(data)}"
            raise SnapshotError(
                f"{path} holds no weights at {key!r}; its sets of weights are {listed}"
            )
        return _tensors(found)
    if _is_state(data):
        return _tensors(data)
    sets = _candidates(data)
    if len(sets) != 1:
        raise SnapshotError(
            f"{path} holds {len(sets) or 'no'} sets of weights"
            + (
                f" ({', '.join(sets)}); say which with key=, --key {next(iter(sets))}"
                if sets
                else f"; {_held(data)}. Say where they are with key=, --key, or leave it out"
            )
        )
    return _tensors(next(iter(sets.values())))


def _at(data: Any, key: str) -> Any:
    """What a mapping of mappings holds at a dotted key, of which the end may begin names."""
    parts = key.split(".")
    for number, part in enumerate(parts):
        inner = _plain(data.get(part)) if isinstance(data, dict) else None
        if not isinstance(inner, dict):
            return _beginning(data, ".".join(parts[number:])) if isinstance(data, dict) else None
        data = inner
    return data


def _beginning(state: Mapping[Any, Any], key: str) -> dict[str, Any]:
    """The entries whose names begin so, without that."""
    prefix = f"{key}."
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if isinstance(name, str) and name.startswith(prefix)
    }


def _beginnings(state: Iterable[str]) -> str:
    """The first parts of names, for a message."""
    first = [*dict.fromkeys(name.split(".")[0] for name in state)]
    return ", ".join(first[:8]) + (", ..." if len(first) > 8 else "")


def _held(data: Any) -> str:
    """What there is instead of weights, for a message."""
    if not isinstance(data, dict) or not data:
        return f"it is {describe(data)}"
    keys = [describe(key) for key in data]
    return f"it holds {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"


def _candidates(data: Any) -> dict[str, dict[str, Any]]:
    """Sets of weights inside, by their keys; what optimisers and callbacks keep is none."""
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()  # the same mapping may be there a million times

    def look(held: dict[Any, Any], prefix: str, deepest: int) -> None:
        for key, value in held.items():
            inner = _plain(value)
            if not isinstance(inner, dict) or not isinstance(key, str) or _OTHERS.match(key):
                continue
            if id(inner) in seen:
                continue
            seen.add(id(inner))
            if _is_state(inner):
                if any(tensor.dtype in _FLOATING for tensor in _tensors(inner).values()):
                    found[prefix + key] = inner
            elif deepest:
                look(inner, f"{prefix}{key}.", deepest - 1)

    if isinstance(data, dict):
        look(data, "", _DEEPEST)
    return found


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
