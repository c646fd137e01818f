"""Pickles of the official EDM2 code: objects that carry their own source, which is not executed.

``network-snapshot-<kimg>-<std>.pkl`` are the averages kept while training, ``phema-…`` those that
its reconstruction made. A pickle is a mapping whose ``ema`` is the network: an object rebuilt from
``type, version, module_src, class_name, state``, of which only ``state`` is looked at, the
attributes of a ``torch.nn.Module``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from posthoc_ema.errors import CorruptSnapshotError, SnapshotError
from posthoc_ema.importing.foreign import (
    Contents,
    ForeignRun,
    ForeignSnapshot,
    ForeignTensor,
    Options,
)
from posthoc_ema.importing.pickle_data import Allowed, Global, Record, read_pickle
from posthoc_ema.importing.region import Cursor, Region
from posthoc_ema.importing.torch_data import (
    LOAD_STORAGE,
    StoredTensor,
    allowing,
    is_zip,
    read_torch_file,
    tensor_maker,
)
from posthoc_ema.profiles import PowerFunction

KIND = "edm2"
_NAME = re.compile(r"(?P<run>.+)-(?P<kimg>\d+)-(?P<std>\d*\.\d+)\.pkl")
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
_MOST_NESTED = 200
_MOST_MODULES = 100_000
_LONGEST_NAME = 4096


def recognise(files: Sequence[Path]) -> bool:
    """Whether there are names of that code's pickles; if others are among them, they are told."""
    return any(_NAME.fullmatch(path.name) for path in files)


def image_count(kimg: int) -> int:
    """Images seen, of which file names hold thousands rounded down.

    That code writes at multiples of 1,024 images: the next one is what was meant.
    """
    return -(-kimg * 1000 // 1024) * 1024


def read_run(files: Sequence[Path], options: Options) -> ForeignRun:
    """The snapshots of a folder, times and lengths from their names.

    Raises:
        SnapshotError: If a name says neither, or files belong to several runs.
    """
    found: dict[str, list[ForeignSnapshot]] = {}
    for path in files:
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise SnapshotError(
                f"{path} does not say which average it is: expected a name such as "
                "network-snapshot-0134217-0.100.pkl; rename it, or list files with their times "
                "in a CSV"
            )
        if not (t := image_count(int(match["kimg"]))):
            continue  # the weights before training
        try:
            profile = PowerFunction(sigma_rel=float(match["std"]))
        except ValueError as error:
            raise SnapshotError(f"{path} names an average that there is not: {error}") from error
        read = _Network(path, options.allow).contents
        found.setdefault(match["run"], []).append(ForeignSnapshot(path, (path,), t, profile, read))
    remarks = []
    if len(found) > 1 and (made := [run for run in found if run.startswith("phema")]):
        left_out = sum(len(found.pop(run)) for run in made)
        remarks.append(
            f"{left_out} phema files were left out: they were made from the snapshots beside them"
        )
    if len(found) != 1:
        raise SnapshotError(
            f"the files belong to {len(found)} runs ({', '.join(sorted(found)) or 'none'}); "
            "import one run at a time"
        )
    (snapshots,) = found.values()
    return ForeignRun(KIND, "images", snapshots, tuple(remarks))


@dataclass(frozen=True)
class _Network:
    path: Path
    allow: tuple[str, ...]

    def contents(self) -> Contents:
        """The network's tensors by the names of its state dict."""
        allowed = _allowing(self.allow)
        if is_zip(self.path):  # written once more, by torch.save
            data = _entries(read_torch_file(self.path, allowed))
        else:
            cursor = Cursor(Region.of_file(self.path))
            data = _entries(read_pickle(cursor, allowed, tensor_maker(self.path)))
        network = data.get("ema", data.get("net")) if isinstance(data, dict) else None
        if not isinstance(network, Record):
            raise CorruptSnapshotError(
                f"{self.path} holds no network under 'ema'; it is no snapshot of EDM2 training. "
                "Leave it out"
            )
        tensors: list[ForeignTensor] = []
        aliases: dict[str, str] = {}
        known: dict[int, str] = {}
        visits = count(1)
        for name, tensor, averaged in self._walk(network, "", (), visits):
            first = known.setdefault(id(tensor), name)
            if first != name:
                aliases[name] = first
                continue
            averaged &= tensor.dtype in _FLOATING
            tensors.append(ForeignTensor(name, tensor.dtype, tensor.shape, averaged, tensor.read))
        if not any(tensor.averaged for tensor in tensors):
            raise CorruptSnapshotError(f"{self.path} holds a network without parameters")
        return Contents(tensors, aliases)

    def _walk(
        self, module: Record, prefix: str, above: tuple[Record, ...], visits: Iterator[int]
    ) -> Iterator[tuple[str, StoredTensor, bool]]:
        """Parameters and buffers in the order of ``state_dict``."""
        if module in above or len(above) > _MOST_NESTED:
            raise CorruptSnapshotError(f"{self.path}: the module {prefix!r:.200} holds itself")
        # Modules that each hold another one twice are as many as powers of two.
        if next(visits) > _MOST_MODULES or len(prefix) > _LONGEST_NAME:
            raise CorruptSnapshotError(
                f"{self.path} holds more modules, or longer names, than any network; leave it out"
            )
        state = _state(module)
        passing = state.get("_non_persistent_buffers_set") or set()
        if not isinstance(passing, set):
            raise CorruptSnapshotError(f"{self.path}: {prefix!r} has damaged buffers")
        for section, averaged in (("_parameters", True), ("_buffers", False)):
            for key, tensor in self._named(state, section, prefix):
                if isinstance(tensor, StoredTensor) and key not in passing:
                    yield prefix + key, tensor, averaged
        for key, child in self._named(state, "_modules", prefix):
            if isinstance(child, Record):
                yield from self._walk(child, f"{prefix}{key}.", (*above, module), visits)

    def _named(self, state: dict[str, Any], section: str, prefix: str) -> list[tuple[str, Any]]:
        held = _entries(state.get(section) or {})
        if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
            raise CorruptSnapshotError(f"{self.path}: {prefix!r} has damaged {section}")
        return list(held.items())


def _allowing(names: Sequence[str]) -> Allowed:
    """Names in the pickles of that code; data, all of them."""
    tensors = allowing(
        (*names, _PERSISTENT, LOAD_STORAGE, "dnnlib.util.EasyDict", "dnnlib.EasyDict")
    )

    def allowed(found: Global) -> bool:
        layer = found.module.startswith("torch.nn.modules.") and found.name.isidentifier()
        return layer or tensors(found)

    return allowed


def _entries(value: Any) -> Any:
    """A mapping, whatever class it was of."""
    return value.entries if isinstance(value, Record) and value.entries else value


def _state(module: Record) -> dict[str, Any]:
    """The attributes of a module: in its own state, or in what a persistent object is made from."""
    state = module.state
    if str(module.maker) == _PERSISTENT and module.args:
        described = _entries(module.args[0])
        state = (described.get("state") if isinstance(described, dict) else None) or state
    if isinstance(state, tuple) and state:  # with slots
        state = state[0]
    state = _entries(state)
    return state if isinstance(state, dict) else {}
