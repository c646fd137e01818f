"""Checkpoint folders of ema-pytorch and pytorch-posthoc-ema: ``{track}.{step}.pt``.

Both keep averages by β = (s / (s+1))^(γ+1) at their step s, whatever happened since the last
update. Updated at every step that is the power function of γ (of a clock ahead by one step, which
makes it shorter by 1/s; that is not told apart here). Updated at every k-th step, from the first
on, it is that of (γ+1)/k - 1, at the middle of the k steps that begin with the last update.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posthoc_ema.conversion import SIGMA_REL_MAX
from posthoc_ema.encoding import as_numpy
from posthoc_ema.errors import SnapshotError
from posthoc_ema.importing.foreign import (
    Contents,
    ForeignRun,
    ForeignSnapshot,
    ForeignTensor,
    Options,
)
from posthoc_ema.importing.state_dict import read_checkpoint
from posthoc_ema.importing.torch_data import StoredTensor, allowing, read_torch_file
from posthoc_ema.profiles import PowerFunction

if TYPE_CHECKING:
    from numpy.typing import NDArray

KIND = "ema-pytorch"
_NAME = re.compile(r"(?P<track>\d+)\.(?P<step>\d+)\.pt")
_REAL = frozenset({"F64", "F32", "F16", "BF16"})
_COUNTERS = ("initted", "step")
_PREFIX = "ema_model."
_ONLINE = "online_model."


def recognise(files: Sequence[Path]) -> bool:
    """Whether all files have names of those packages' checkpoints."""
    return bool(files) and all(_NAME.fullmatch(path.name) for path in files)


def read_run(files: Sequence[Path], options: Options) -> ForeignRun:
    """The snapshots of a folder; EMA lengths as given, or where the files hold them.

    Raises:
        SnapshotError: If a length is not known.
    """
    places = []
    for path in files:
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise SnapshotError(f"{path} is not named {{track}}.{{step}}.pt; leave it out")
        places.append((path, int(match["track"]), int(match["step"])))
    tracks = sorted({track for _, track, _ in places})
    given = options.sigma_rel
    if given and len(given) <= max(tracks):
        raise SnapshotError(
            f"{files[0].parent} holds tracks {', '.join(map(str, tracks))}, and sigma_rel gives "
            f"{len(given)} lengths; give one for each, in the order that the run had"
        )
    lengths = {
        track: given[track] if given else _stored_length(min(p for p, k, _ in places if k == track))
        for track in tracks
    }
    profiles = {track: _profile(length, options.update_every) for track, length in lengths.items()}
    remarks = [] if options.update_every > 1 else [
        "taken to be updated at every step; ema-pytorch's own default is every 100th, "
        "pytorch-posthoc-ema's every 10th: then give update_every=, --update-every"
    ]  # fmt: skip
    return ForeignRun(
        KIND,
        "steps",
        [
            ForeignSnapshot(
                path,
                (path,),
                _time(step, options.update_every),
                profiles[track],
                partial(_contents, path, step, options),
            )
            for path, track, step in places
            if step
        ],
        tuple(remarks),
    )


def _time(step: int, update_every: int) -> float:
    """The time of an average that was last updated at or before a step."""
    t = (step - 1) // update_every * update_every + 1 + (update_every - 1) / 2
    return int(t) if t.is_integer() else t


def _profile(sigma_rel: float, update_every: int) -> PowerFunction:
    """What an update at every k-th step makes of a length."""
    profile = PowerFunction(sigma_rel=sigma_rel)
    gamma = (profile.gamma + 1) / update_every - 1
    if gamma < 0:
        raise SnapshotError(
            f"sigma_rel={sigma_rel} updated at every {update_every}th step weighs the beginning of "
            f"training most (γ = {gamma:.2f}): such averages tell nothing of any power function. "
            "Average the run's raw checkpoints instead, if there are any"
        )
    return profile if update_every == 1 else PowerFunction(gamma=gamma)


def _stored_length(path: Path) -> float:
    data = read_torch_file(path, allowing())
    length = data.get("sigma_rel") if isinstance(data, dict) else None
    if isinstance(length, StoredTensor):  # in half precision: 0.05 is not 0.04998779296875
        length = float(f"{_number(length.dtype, length.read()):.3g}")
    if not isinstance(length, float) or not 0 < length <= SIGMA_REL_MAX:
        raise SnapshotError(
            f"{path} does not say its EMA length; give sigma_rel=(0.05, 0.28), "
            "--sigma-rel 0.05,0.28, as the run had them, in their order"
        )
    return length


def _contents(path: Path, step: int, options: Options) -> Contents:
    found = read_checkpoint(path, options.key, options.allow)
    wrapped = any(tensor.name.startswith(_PREFIX) for tensor in found.tensors)
    tensors = []
    for tensor in found.tensors:
        if tensor.name in (*_COUNTERS, "sigma_rel") or tensor.name.startswith(_ONLINE):
            continue
        if wrapped and not tensor.name.startswith(_PREFIX):
            continue
        name = tensor.name.removeprefix(_PREFIX)
        if name.rpartition(".")[2] == "num_batches_tracked" and tensor.averaged:
            tensors.append(_counter(replace(tensor, name=name), step))
        else:
            tensors.append(replace(tensor, name=name))
    aliases = {
        alias.removeprefix(_PREFIX): name.removeprefix(_PREFIX)
        for alias, name in found.aliases.items()
        if not alias.startswith(_ONLINE)
    }
    return Contents(tensors, aliases)


def _counter(tensor: ForeignTensor, step: int) -> ForeignTensor:
    """A count of batches that was cast to half precision with the weights: an integer again."""

    def read() -> NDArray[np.uint8]:
        # Beyond 65504 it is lost; the step is about what it was.
        value = _number(tensor.dtype, tensor.read())
        count = round(value) if 0 <= value < 1 << 62 else step
        return np.array([count], "<i8").view(np.uint8)

    shape = tensor.shape if prod(tensor.shape) == 1 else ()
    return replace(tensor, dtype="I64", shape=shape, averaged=False, read=read)


def _number(dtype: str, raw: NDArray[np.uint8]) -> float:
    """The one number of a tensor; NaN if it has none, or more than one."""
    if dtype not in _REAL:
        return float("nan")
    numbers = as_numpy(raw, dtype, (-1,))
    return float(numbers[0]) if len(numbers) == 1 else float("nan")
