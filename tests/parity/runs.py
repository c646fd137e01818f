"""Invented training runs, each framework's form of a model, and the explicit average.

The reference is a plain sum over the full history in float64: it knows no update rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray

from posthoc_ema import EMA, Profile, Snapshot

Weights = dict[str, NDArray[Any]]

TIMES: dict[str, list[float]] = {
    "every step": list(range(1, 61)),
    "every 7th step": list(range(7, 421, 7)),
    "irregular": np.cumsum(np.random.default_rng(1).lognormal(size=60)).tolist(),
    "images": list(range(2048, 61 * 2048, 2048)),
    "begun in mid-run": list(range(5000, 5060)),
}


def random_walk(
    steps: int, shapes: Mapping[str, tuple[int, ...]], seed: int = 0, scale: float = 1.0
) -> list[Weights]:
    """Weights of each step, float64: they move by a tenth of their size at each."""
    rng = np.random.default_rng(seed)
    now = {name: rng.normal(size=shape) * scale for name, shape in shapes.items()}
    history = []
    for _ in range(steps):
        now = {
            n: np.asarray(w + 0.1 * scale * rng.normal(size=np.shape(w))) for n, w in now.items()
        }
        history.append(now)
    return history


def explicit_average(
    profile: Profile, times: Sequence[float], history: Sequence[Weights]
) -> dict[str, NDArray[Any]]:
    """Σ weight·value over all updates, in float64 (or complex128)."""
    shares = profile.weights(times)
    return {
        name: sum(
            share * _wide(weights[name]) for share, weights in zip(shares, history, strict=True)
        )
        for name in history[0]
    }


def rounding_bound(steps: int, largest: float, dtype: Any = np.float32) -> float:
    """How far an average may be off: each update rounds a difference, a product and a sum.

    Each of the three is wrong by at most half a unit in the last place of a number of at most
    twice the largest weight, and later updates only shrink what earlier ones did.
    """
    return 3 * steps * float(np.finfo(dtype).eps) * largest


def assert_average(
    found: Mapping[str, Any],
    expected: Mapping[str, NDArray[Any]],
    steps: int,
    dtype: Any = np.float32,
) -> None:
    """Compare averages by name with the explicit sum, to the rounding that updates add."""
    if set(found) != set(expected):
        raise AssertionError(f"names differ: {sorted(set(found) ^ set(expected))}")
    for name, reference in expected.items():
        value = as_float64(found[name])
        if value.shape != reference.shape:
            raise AssertionError(f"{name} has shape {value.shape}, expected {reference.shape}")
        if not value.size:
            continue
        error = float(np.abs(value - reference).max())
        allowed = rounding_bound(steps, float(np.abs(reference).max()) + 1, dtype)
        if not error <= allowed:
            raise AssertionError(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")


def as_float64(value: Any) -> NDArray[Any]:
    """Any framework's array as float64 (complex128) numpy."""
    if isinstance(value, torch.Tensor):
        wide = torch.complex128 if value.is_complex() else torch.float64
        return np.asarray(value.detach().to(wide).numpy())
    return _wide(np.asarray(value))


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists by dotted names."""
    if isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from flat(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), tree


def nested(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested dictionaries."""
    tree: dict[str, Any] = {}
    for name, value in weights.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


class Holder(torch.nn.Module):
    """A module with the parameters of a nested dictionary."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in tree.items():
            if isinstance(value, Mapping):
                self.add_module(name, Holder(value))
            else:
                self.register_parameter(
                    name, torch.nn.Parameter(torch.as_tensor(value, dtype=torch.float32).clone())
                )


@dataclass(frozen=True)
class Kind:
    """One form in which a model is given to ``EMA.update``.

    Attributes:
        make: The model, from weights by dotted name.
        move: The same model after a step; in place or new, as its users do.
    """

    make: Callable[[Weights], Any]
    move: Callable[[Any, Weights], Any]


def _move_module(module: torch.nn.Module, weights: Weights) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.as_tensor(weights[name]))
    return module


def _move_arrays(arrays: dict[str, NDArray[Any]], weights: Weights) -> dict[str, NDArray[Any]]:
    for name, array in arrays.items():
        array[...] = weights[name]
    return arrays


def _replace_entries(tensors: dict[str, Any], weights: Weights) -> dict[str, Any]:
    tensors.update(_torch(weights))
    return tensors


def _numpy(weights: Weights) -> Weights:
    return {name: w.astype(np.float32) for name, w in weights.items()}


def _torch(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(w, dtype=torch.float32) for name, w in weights.items()}


def _jax(weights: Weights) -> dict[str, Any]:
    return {name: jnp.asarray(w, dtype=jnp.float32) for name, w in weights.items()}


def _jax_lists(weights: Weights) -> Any:
    """What most JAX code holds: dictionaries with lists in them."""
    return {"layers": list(_jax(weights).values())}


def _anew(make: Callable[[Weights], Any]) -> Kind:
    return Kind(make, lambda _, weights: make(weights))


KINDS: dict[str, Kind] = {
    "torch module": Kind(lambda w: Holder(nested(w)), _move_module),
    "torch mapping": _anew(_torch),
    "torch mapping, entries replaced": Kind(_torch, _replace_entries),
    "torch mapping, nested": _anew(lambda w: nested(_torch(w))),
    "numpy": _anew(_numpy),
    "numpy, in place": Kind(_numpy, _move_arrays),
    "numpy, nested": _anew(lambda w: nested(_numpy(w))),
    "jax mapping": _anew(_jax),
    "jax, nested": _anew(lambda w: nested(_jax(w))),
    "jax, lists": _anew(_jax_lists),
    "jax, tuple": _anew(lambda w: tuple(_jax(w).values())),
}


def by_name(kind: str, average: Any, names: Sequence[str]) -> dict[str, Any]:
    """Leaves of an average by the names of the run, whatever the form gave them."""
    leaves = dict(flat(average))
    if kind in ("jax, lists", "jax, tuple"):
        return dict(zip(names, leaves.values(), strict=True))
    return leaves


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


# Runs on disk --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A recorded run: every weight of every step beside its snapshots."""

    folder: Path
    times: list[float]
    history: list[Weights]

    def true_average(self, profile: Profile, t: float | None = None) -> dict[str, NDArray[Any]]:
        """The average that direct tracking would have given at time ``t``."""
        n = sum(1 for time in self.times if t is None or time <= t)
        return explicit_average(profile, self.times[:n], self.history[:n])


SHAPES = {"enc.w": (40, 7), "enc.b": (40,), "dec.w": (30, 11), "scale": ()}


def record(
    folder: Path,
    steps: int = 96,
    every: float = 12,
    sigma_rel: Sequence[float] = (0.05, 0.10),
    encoding: str = "float32",
    convert: Callable[[Weights], Any] = _numpy,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    seed: int = 0,
    scale: float = 1.0,
    unit: float = 1,
) -> Run:
    """Train nothing for some steps, with snapshots; ``unit`` is the time of one step."""
    history = random_walk(steps, shapes, seed, scale)
    times = [step * unit for step in range(1, steps + 1)]
    ema = EMA(sigma_rel=sigma_rel, snapshots=folder, every=every * unit, encoding=encoding)
    for t, weights in zip(times, history, strict=True):
        ema.update(convert(weights), t=t)
    return Run(folder, times, history)


def combine(snapshots: Sequence[Snapshot], coefficients: Any, name: str) -> NDArray[Any]:
    """Σ coefficient·tensor in float64, from the files themselves."""
    return np.asarray(
        sum(
            x * _wide(snapshot.read(name))
            for x, snapshot in zip(coefficients, snapshots, strict=True)
        )
    )


def relative_rms(found: Any, expected: NDArray[Any]) -> float:
    """RMS difference over the RMS of what was expected."""
    difference = as_float64(found) - expected
    return float(np.sqrt(np.mean(np.abs(difference) ** 2) / np.mean(np.abs(expected) ** 2)))
