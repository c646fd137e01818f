"""The reference tracker: named numpy arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema import native
from posthoc_ema.encoding import numpy_dtype_name
from posthoc_ema.errors import StructureError
from posthoc_ema.snapshot_file import AverageSource, CopySource
from posthoc_ema.trackers.base import (
    CHUNK,
    FLOATING,
    Selection,
    TensorSpec,
    Tracker,
    check_specs,
    flatten_mapping,
    unflatten_like,
    unique_names,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CACHED = 1 << 16  # elements updated at a time: source, average and scratch stay in cache


class NumpyTracker(Tracker):
    """Averages of a mapping, flat or nested, from names to numpy arrays."""

    framework = "numpy"

    def __init__(self, model: Mapping[str, Any], select: Selection, tracks: int) -> None:
        self._select = select
        self._model = model
        select.check([name for name, _ in flatten_mapping(model)])
        self._arrays = self._collect(model)
        self.specs = self._describe(self._arrays)
        self.aliases = {}
        self._averages = {
            spec.name: np.zeros((tracks, *spec.kept_shape), _KEPT[spec.kept])
            for spec in self.averaged
        }

    def check(self, model: Mapping[str, Any]) -> None:
        """Every update may bring new arrays: take them, if names and shapes agree."""
        arrays = self._collect(model)
        check_specs(self.specs, self._describe(arrays))
        self._model, self._arrays = model, arrays

    def is_finite(self) -> bool:
        """Whether all weights to be averaged are finite."""
        return all(np.isfinite(self._arrays[spec.name]).all() for spec in self.averaged)

    def update(self, weights: Sequence[float] | None) -> None:
        """Move every average towards the current arrays."""
        by_type: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
        for spec in self.averaged:
            averages = self._averages[spec.name]
            averages = averages.reshape(len(averages), -1)  # a view
            flat = _real(self._arrays[spec.name]).reshape(-1)
            if weights is None:
                averages[:] = flat
            elif native.library() and spec.kept == "F32" and spec.dtype in native.TYPES:
                flat = np.ascontiguousarray(flat, flat.dtype.newbyteorder("="))
                by_type.setdefault(spec.dtype, []).append((flat, averages))
            else:
                for average, weight in zip(averages, weights, strict=True):
                    _lerp(average, flat, average.dtype.type(weight))
        for dtype, pairs in by_type.items():
            native.Tensors(
                dtype,
                [native.address(flat) for flat, _ in pairs],
                [flat.size for flat, _ in pairs],
                [native.address(averages) for _, averages in pairs],
                [flat.size for flat, _ in pairs],
            ).lerp(np.array(weights, np.float32))

    def average(self, track: int, name: str) -> NDArray[Any]:
        """A copy of one average."""
        values = self._averages[name][track, ...].copy()
        spec = next(spec for spec in self.specs if spec.name == name)
        return _as_complex(values) if spec.dtype.startswith("C") else values

    def load(self, track: int, name: str, value: Any) -> None:
        """Set one average."""
        self._averages[name][track, ...] = _real(np.asarray(value))

    def average_sources(self, track: int) -> list[AverageSource]:
        """The averages of one track on their way to a file."""
        return [
            AverageSource(
                spec.name,
                spec.kept_shape,
                spec.kept,
                spec.dtype,
                partial(array_chunks, self._averages[spec.name][track, ...]),
            )
            for spec in self.averaged
        ]

    def copy_sources(self) -> list[CopySource]:
        """Integer arrays as they are now."""
        return [
            copy_of_array(spec, self._arrays[spec.name]) for spec in self.specs if not spec.averaged
        ]

    def assemble(self, averages: Mapping[str, Any]) -> dict[str, Any]:
        """Mappings of the same form; what is not averaged is copied."""
        copies = {name: np.array(leaf) for name, leaf in flatten_mapping(self._model)}
        return dict(unflatten_like(self._model, {**copies, **averages}))

    @contextmanager
    def applied(self, model: Mapping[str, Any], track: int) -> Iterator[Mapping[str, Any]]:
        """Overwrite the arrays in place, and restore them."""
        arrays = self._collect(model)
        check_specs(self.specs, self._describe(arrays))
        given = dict(flatten_mapping(model))
        for name, array in arrays.items():
            if array is not given[name] or not array.flags.writeable:
                raise StructureError(
                    f"{name} cannot be changed in place (a scalar, or a read-only array); use "
                    "average() and take the result in its place"
                )
        saved = {spec.name: arrays[spec.name].copy() for spec in self.specs}
        try:
            for spec in self.averaged:
                arrays[spec.name][...] = self.average(track, spec.name)
            yield model
        finally:
            for name, values in saved.items():
                arrays[name][...] = values

    def _collect(self, model: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        arrays = unique_names([p for p in flatten_mapping(model) if self._select(p[0])])
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray | np.generic):
                raise StructureError(
                    f"{name} is a {type(array).__name__}, expected a numpy array like the others"
                )
        return {name: np.asarray(array) for name, array in arrays.items()}

    def _describe(self, arrays: Mapping[str, NDArray[Any]]) -> list[TensorSpec]:
        specs = []
        for name, array in arrays.items():
            dtype = describe_dtype(name, array.dtype)
            specs.append(TensorSpec(name, array.shape, dtype, dtype in FLOATING))
        return specs


_KEPT = {"F32": np.float32, "F64": np.float64}


def describe_dtype(name: str, dtype: np.dtype[Any]) -> str:
    """Safetensors name of the type of one tensor; an error names the tensor."""
    try:
        return numpy_dtype_name(dtype)
    except TypeError as error:
        raise StructureError(f"{name}: {error} (exclude={name!r})") from None


def array_chunks(array: NDArray[Any]) -> Iterable[NDArray[Any]]:
    """Contiguous 1-D pieces of an array, in order."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return (flat[start : start + CHUNK] for start in range(0, len(flat), CHUNK))


def copy_of_array(spec: TensorSpec, array: NDArray[Any]) -> CopySource:
    """The bytes of an array."""
    little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    data = little_endian.reshape(-1).view(np.uint8)
    return CopySource(spec.name, spec.shape, spec.dtype, data)


def _lerp(average: NDArray[Any], flat: NDArray[Any], weight: Any) -> None:
    for start in range(0, len(flat), _CACHED):
        piece = average[start : start + _CACHED]
        difference = flat[start : start + _CACHED].astype(piece.dtype)
        difference -= piece
        difference *= weight
        piece += difference


def _real(array: NDArray[Any]) -> NDArray[Any]:
    """Complex numbers as pairs of reals."""
    if not np.iscomplexobj(array):
        return array
    real = np.float64 if array.dtype == np.complex128 else np.float32
    return np.ascontiguousarray(array).reshape(*array.shape, 1).view(real)


def _as_complex(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(np.complex128 if values.dtype == np.float64 else np.complex64)[..., 0]
