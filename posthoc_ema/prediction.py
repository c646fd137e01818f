"""What a snapshot will be, from those before it: the part that need not be stored.

Predicted by kriging from the decoded snapshots on disk (so that rounding errors do not add up),
with coefficients that depend on times and profiles alone. After some times a snapshot is stored
whole again: one lost file costs few others, and no chain grows long to read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.encoding import ENCODINGS, check_encoding
from posthoc_ema.errors import PosthocEMAError
from posthoc_ema.movement import Movement
from posthoc_ema.places import Place
from posthoc_ema.profiles import Profile
from posthoc_ema.sinks import MemorySink
from posthoc_ema.snapshot_file import AverageSource, CopySource, RunIdentity, Snapshot
from posthoc_ema.snapshot_writing import Prediction, magnitudes, write_snapshot
from posthoc_ema.solve import solve
from posthoc_ema.streaming import Group, stream
from posthoc_ema.tensorfile import SUFFIX

if TYPE_CHECKING:
    from numpy.typing import NDArray

WHOLE_EVERY = 16
"""Times from one whole snapshot to the next."""

INPUTS = 4
"""Snapshots that a prediction takes in: those of two times; more say little more."""

MEMORY_BYTES = 2 << 30
"""Of decoded snapshots held for the next prediction."""

_RIDGE = 1e-4  # storage noise of the inputs, relative to the movement in one interval


def predict(
    earlier: Sequence[Snapshot],
    t: float,
    profile: Profile,
    averages: Sequence[AverageSource],
    decoded: Mapping[str, Mapping[str, NDArray[Any]]],
) -> Prediction | None:
    """Predict the snapshot of a run at ``t``; None where it shall be stored whole.

    Args:
        earlier: All snapshots of the run on disk.
        t: Time of the new one.
        profile: Its profile.
        averages: Its tensors.
        decoded: Arrays of some of them that are in memory, by header digest; from these alone,
            if there are any, else from all that are read from disk.
    """
    inputs = _choose(earlier, t)
    inputs = [s for s in inputs if s.digests["header"] in decoded] or inputs
    if not inputs:
        return None
    names = frozenset(
        source.name
        for source in averages
        if all(
            source.name in s.averages and s.entries[source.name].shape == source.shape
            for s in inputs
        )
    )
    coefficients = _coefficients(inputs, t, profile)
    terms: list[tuple[float, Mapping[str, NDArray[np.float64]]]]
    if inputs[0].digests["header"] in decoded:
        terms = [
            (float(x), decoded[s.digests["header"]])
            for x, s in zip(coefficients, inputs, strict=True)
        ]
    else:
        sink = MemorySink(1)
        try:
            groups = [Group(sorted(names), coefficients[None])] if names else []
            everything = all(len(names) == len(s.averages) for s in inputs)
            stream(inputs, groups, sink, check=everything, progress=lambda nbytes: None)
        except (PosthocEMAError, OSError) as error:
            warnings.warn(f"a snapshot is stored whole, for {error}", stacklevel=2)
            return None
        arrays = {n: v.reshape(-1).astype(np.float64) for n, v in sink.arrays[0].items()}
        terms = [(1.0, arrays)]
    return Prediction(
        list(zip(coefficients.tolist(), inputs, strict=True)),
        all(s.t < t for s in inputs),
        terms,
        names,
    )


class Memory:
    """The last snapshots as they decode, so that predicting the next reads nothing.

    Holds as many as a prediction takes in, within :data:`MEMORY_BYTES`, but always those of the
    last time.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, dict[str, NDArray[np.float64]]] = {}
        self._times: dict[str, float] = {}
        self._spare: list[dict[str, NDArray[np.float64]]] = []

    def room(self) -> dict[str, NDArray[np.float64]]:
        """For the next one: arrays to overwrite. New memory costs more than all work on it."""
        return self._spare.pop() if self._spare else {}

    def add(self, snapshot: Snapshot, decoded: dict[str, NDArray[np.float64]]) -> None:
        """Remember one more."""
        key = snapshot.digests["header"]
        self.arrays[key], self._times[key] = decoded, snapshot.t
        while len(self.arrays) > INPUTS or self._size() > MEMORY_BYTES:
            oldest = next(iter(self.arrays))
            if self._times[oldest] == snapshot.t:
                break
            self._spare = [self.arrays.pop(oldest)]
            del self._times[oldest]

    def clear(self) -> None:
        """Forget all: files were replaced."""
        self.arrays.clear()
        self._times.clear()

    def _size(self) -> int:
        return sum(values.nbytes for arrays in self.arrays.values() for values in arrays.values())


def write_predicted(
    path: Place,
    run: RunIdentity,
    t: float,
    profile: Profile,
    averages: Sequence[AverageSource],
    copies: Sequence[CopySource],
    aliases: Mapping[str, str] | None,
    encoding: str,
    earlier: Sequence[Snapshot],
    memory: Memory,
    newest: bool = True,
    **history: Any,
) -> None:
    """Write a snapshot, in delta encodings predicted from earlier ones, and remember it.

    Arguments and errors are those of :func:`posthoc_ema.snapshot_writing.write_snapshot`, which
    ``history`` goes to, and of :func:`predict`. Some encodings refine the ``newest`` of a track.
    """
    storage = ENCODINGS[check_encoding(encoding)]
    common: dict[str, Any] = {
        "run": run,
        "t": t,
        "profile": profile,
        "averages": averages,
        "copies": copies,
        "aliases": aliases,
        "encoding": encoding,
        **history,
    }
    if not storage.residuals:
        write_snapshot(path, **common)
        return
    common["sizes"] = magnitudes(path, averages)
    decoded = memory.room()
    chain = [s for s in earlier if not s.refines]
    prediction = predict(chain, t, profile, averages, memory.arrays)
    write_snapshot(path, prediction=prediction, decoded=decoded, **common)
    snapshot = Snapshot.open(path)
    if storage.refines and newest:
        known = Prediction([(1.0, snapshot)], True, [(1.0, decoded)], frozenset(decoded))
        write_snapshot(refinement_path(path), prediction=known, refines=True, **common)
    memory.add(snapshot, decoded)


def refinement_path(path: Place) -> Place:
    """Where the refinement of a snapshot lies."""
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}.fine{SUFFIX}")


def _choose(earlier: Sequence[Snapshot], t: float) -> list[Snapshot]:
    """The nearest snapshots, not beyond the last one that is stored whole."""
    same = [s for s in earlier if s.t == t]
    if any(not s.links for s in same):
        return same
    chain: list[list[Snapshot]] = []
    for time in sorted({s.t for s in earlier if s.t < t}, reverse=True):
        chain.append([s for s in earlier if s.t == time])
        if any(not s.links for s in chain[-1]):
            break
    if not same and len(chain) >= WHOLE_EVERY:
        return []
    return [*same, *(s for group in chain for s in group)][:INPUTS]


def _coefficients(inputs: Sequence[Snapshot], t: float, profile: Profile) -> NDArray[np.float64]:
    known = [(s.t, s.profile) for s in inputs]
    times = sorted({*(s.t for s in inputs), t})
    interval = times[-1] - times[-2] if len(times) > 1 else t
    noise = np.full(len(inputs), _RIDGE * interval)
    return solve(
        known, (t, profile), movement=Movement.constant(times[-1]), noise=noise
    ).coefficients
