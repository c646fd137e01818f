"""The tracker for JAX pytrees, and the pure functions it is made of.

Inside ``jit`` or ``scan`` use the functions: they take and return plain pytrees.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posthoc_ema.errors import StructureError
from posthoc_ema.snapshot_file import AverageSource, CopySource
from posthoc_ema.trackers.base import (
    FLOATING,
    Selection,
    TensorSpec,
    Tracker,
    check_specs,
    unique_names,
)
from posthoc_ema.trackers.numpy import array_chunks, copy_of_array, describe_dtype


def init(params: Any) -> Any:
    """Averages after the first update: copies in float32 (float64 for 64-bit weights).

    Args:
        params: Pytree of floating or complex arrays.
    """
    return jax.tree.map(_kept_copy, params)


def update(averages: Any, params: Any, weight: Any) -> Any:
    """Move averages towards params: average + weight·(params - average), leaf by leaf.

    Args:
        averages: What :func:`init` or the last update gave.
        params: Pytree of the same structure.
        weight: 1-β of this update, a number or traced scalar
            (:func:`posthoc_ema.schedule.update_weight`).
    """

    def leaf(average: Any, current: Any) -> Any:
        step = jnp.asarray(weight, average.real.dtype)
        return average + step * (current.astype(average.dtype) - average)

    return jax.tree.map(leaf, averages, params)


@partial(jax.jit, donate_argnums=0)
def _update_tracks(tracks: list[Any], params: Any, weights: list[Any]) -> list[Any]:
    return [update(track, params, w) for track, w in zip(tracks, weights, strict=True)]


class JaxTracker(Tracker):
    """Averages of a pytree; leaves that are not arrays stay as they are.

    Batch statistics and other variables of Flax NNX that are no weights are copied.
    """

    framework = "jax"

    def __init__(self, model: Any, select: Selection, tracks: int) -> None:
        self._select = select
        pairs, self._treedef = named_leaves(model)
        select.check([name for name, leaf in pairs if _is_array(leaf)])
        self._pairs = pairs
        self._leaves = self._collect(pairs)
        self.specs = _describe(self._leaves, _copied(model))
        self.aliases = {}
        self._tracks = tracks
        self._averages: list[dict[str, Any]] = [{} for _ in range(tracks)]

    def check(self, model: Any) -> None:
        """Every update brings new arrays: take them, if names and shapes agree."""
        pairs, treedef = named_leaves(model)
        leaves = self._collect(pairs)
        if (
            treedef != self._treedef
            or [*leaves] != [spec.name for spec in self.specs]
            or any(
                leaf.shape != spec.shape
                for leaf, spec in zip(leaves.values(), self.specs, strict=True)
            )
        ):
            check_specs(self.specs, _describe(leaves))
        self._pairs, self._treedef, self._leaves = pairs, treedef, leaves

    def is_finite(self) -> bool:
        """Whether all weights to be averaged are finite."""
        return bool(jnp.all(jnp.stack([jnp.isfinite(x).all() for x in self._current().values()])))

    def update(self, weights: Sequence[float] | None) -> None:
        """Move every average towards the current leaves, in one compiled call."""
        if weights is None:
            self._averages = [init(self._current()) for _ in range(self._tracks)]
        else:
            self._averages = _update_tracks(self._averages, self._current(), list(weights))
        # The caller may donate its parameters to the next step: keep no hold on them.
        self._leaves = {
            spec.name: jnp.array(self._leaves[spec.name], copy=True)
            for spec in self.specs
            if not spec.averaged
        }
        averaged = {spec.name for spec in self.averaged}
        self._pairs = [
            (name, None if name in averaged else self._leaves.get(name, leaf))
            for name, leaf in self._pairs
        ]

    def adopt(self, averages: Sequence[dict[str, Any]]) -> None:
        """Take averages that were made elsewhere, by name, without copying them."""
        self._averages = list(averages)

    def average(self, track: int, name: str) -> Any:
        """A copy of one average: the next update donates its own."""
        return jnp.array(self._averages[track][name], copy=True)

    def load(self, track: int, name: str, value: Any) -> None:
        """Set one average."""
        spec = next(spec for spec in self.specs if spec.name == name)
        self._averages[track][name] = _kept_copy(jnp.asarray(np.asarray(value)), spec.kept)

    def average_sources(self, track: int) -> list[AverageSource]:
        """The averages of one track on their way to a file, leaving the device one by one."""

        def chunks(name: str) -> Any:
            values = np.asarray(self._averages[track][name])
            if np.iscomplexobj(values):
                values = values.view(values.real.dtype)
            return array_chunks(values)

        return [
            AverageSource(s.name, s.kept_shape, s.kept, s.dtype, partial(chunks, s.name))
            for s in self.averaged
        ]

    def copy_sources(self) -> list[CopySource]:
        """Integer leaves as they are now."""
        return [
            copy_of_array(spec, np.asarray(self._leaves[spec.name]))
            for spec in self.specs
            if not spec.averaged
        ]

    def assemble(self, averages: Mapping[str, Any]) -> Any:
        """A pytree of the same structure."""
        leaves = [averages.get(name, leaf) for name, leaf in self._pairs]
        # What is left out of the averages may have been donated to a later step since.
        leaves = [None if isinstance(x, jax.Array) and x.is_deleted() else x for x in leaves]
        return jax.tree.unflatten(self._treedef, leaves)

    @contextmanager
    def applied(self, model: Any, track: int) -> Iterator[Any]:
        """Arrays are immutable: yield a tree with averages, in the types of the given one."""
        pairs, treedef = named_leaves(model)
        check_specs(self.specs, _describe(self._collect(pairs)))
        averaged = {spec.name for spec in self.averaged}
        leaves = [
            self.average(track, name).astype(leaf.dtype) if name in averaged else leaf
            for name, leaf in pairs
        ]
        yield jax.tree.unflatten(treedef, leaves)

    def _current(self) -> dict[str, Any]:
        return {spec.name: self._leaves[spec.name] for spec in self.averaged}

    def _collect(self, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        leaves = unique_names([(n, x) for n, x in pairs if _is_array(x) and self._select(n)])
        for name, leaf in leaves.items():
            if isinstance(leaf, jax.core.Tracer):
                raise StructureError(
                    f"{name} is being traced: EMA.update runs outside jit. Inside, use PureEMA of "
                    "posthoc_ema.integrations.jax, or averaged of posthoc_ema.integrations.optax"
                )
        # JAX may read numpy arrays later, when the caller has changed them: copy.
        return {n: np.array(x) if isinstance(x, np.ndarray) else x for n, x in leaves.items()}


def named_leaves(model: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves of a pytree by dotted names, in order, and its structure.

    A variable of Flax NNX is one leaf to its users: its name is that of the variable.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(model)
    variables = dict(_variables(model))
    named = []
    for path, leaf in pairs:
        inner = path[:-1] if path[:-1] in variables else path
        named.append((".".join(_key(k) for k in inner), leaf))
    return named, treedef


def averaged_leaves(model: Any) -> tuple[list[Any], Any, list[bool]]:
    """Leaves of a pytree in order, its structure, and which leaves are averaged."""
    pairs, treedef = named_leaves(model)
    copied = _copied(model)
    averaged = [
        hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact) and name not in copied
        for name, leaf in pairs
    ]
    return [leaf for _, leaf in pairs], treedef, averaged


def _variables(model: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Flax NNX variables of a pytree with their paths, if that library is in use."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return []
    found = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return [(path, x) for path, x in found[0] if isinstance(x, nnx.Variable)]


def _copied(model: Any) -> frozenset[str]:
    """Names of what a Flax NNX model keeps beside its weights: statistics, caches, counters."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return frozenset()
    kinds = (nnx.BatchStat, nnx.Cache, nnx.Intermediate, nnx.RngState)
    return frozenset(
        ".".join(_key(k) for k in path) for path, x in _variables(model) if isinstance(x, kinds)
    )


def _key(key: Any) -> str:
    """The bare text of a dictionary key, attribute name or index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) and not (
        # Random keys have a type of their own that files cannot hold.
        isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    )


def _describe(leaves: Mapping[str, Any], copied: frozenset[str] = frozenset()) -> list[TensorSpec]:
    specs = []
    for name, leaf in leaves.items():
        dtype = describe_dtype(name, _own_dtype(leaf))
        averaged = dtype in FLOATING and name not in copied
        specs.append(TensorSpec(name, tuple(leaf.shape), dtype, averaged))
    return specs


def _kept_copy(leaf: Any, kept: str | None = None) -> Any:
    """A copy in float32, float64 or the complex type of that precision."""
    double = kept == "F64" or (kept is None and _own_dtype(leaf) in (np.float64, np.complex128))
    if jnp.iscomplexobj(leaf):
        dtype = jnp.complex128 if double else jnp.complex64
    else:
        dtype = jnp.float64 if double else jnp.float32
    return jnp.array(leaf, dtype=dtype, copy=True)


def _own_dtype(leaf: Any) -> np.dtype[Any]:
    """The type that JAX gives the leaf: a 64-bit numpy array has 32 bits where x64 is off."""
    return np.dtype(jax.dtypes.canonicalize_dtype(leaf.dtype))
