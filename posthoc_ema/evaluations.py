"""Calls of a user's metric on reconstructed weights, remembered across interruptions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from posthoc_ema.choice import select_snapshots
from posthoc_ema.draft import write_text_atomically
from posthoc_ema.places import Place, as_place
from posthoc_ema.reconstruct import Reconstruction, reconstruct
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.snapshots import SnapshotStore, as_store

CACHE_VERSION = 1

Evaluate = Callable[[Reconstruction], float]


@dataclass(frozen=True)
class Evaluation:
    """One call of ``evaluate``.

    Attributes:
        metric: What it returned.
        predicted_error: Of the reconstruction that it was given.
        searched: Whether ``find_best`` made it, against whose budget it counts.
    """

    metric: float
    predicted_error: float
    searched: bool


class Evaluations:
    """What is known so far, in memory and in the cache, and how to learn more.

    Arguments are those of :func:`posthoc_ema.sweep`.

    Raises:
        ValueError: If the cache is of other snapshots, or no cache at all.
    """

    def __init__(
        self,
        snapshots: str | os.PathLike[str] | SnapshotStore,
        evaluate: Evaluate,
        t: float | None,
        method: str,
        framework: str | None,
        names: str | Sequence[str] | None,
        cache: str | os.PathLike[str] | None,
        max_bytes: int,
    ) -> None:
        store = as_store(snapshots)
        usable, t = select_snapshots(store, t)
        self._store, self._evaluate = store, evaluate
        self._options: dict[str, Any] = {
            "t": t,
            "method": method,
            "framework": framework,
            "names": names,
        }
        self._batch = max(1, max_bytes // max(_result_bytes(usable[-1]), 1))
        self._cache = None if cache is None else as_place(cache)
        # Anything here being different means that cached metrics are those of other weights.
        self._identity = {
            "run_id": usable[0].run.run_id,
            "t_last": float(usable[-1].t),
            "snapshots": len(usable),
            "t": float(t),
            "method": method,
            "names": [names] if isinstance(names, str) else names and list(names),
        }
        self.known: dict[float, Evaluation] = {}
        if self._cache is not None and self._cache.exists():
            self.known = _read_cache(self._cache, self._identity)

    def make(self, lengths: Sequence[float], bar: Any, searched: bool = False) -> None:
        """Evaluate those lengths that are not known yet."""
        missing = [s for s in lengths if s not in self.known]
        bar.update(len(lengths) - len(missing))
        for start in range(0, len(missing), self._batch):
            batch = missing[start : start + self._batch]
            bar.set_postfix_str(f"reconstructing {len(batch)}")
            results = reconstruct(self._store, batch, progress=False, **self._options)
            for s in batch:
                bar.set_postfix_str(f"evaluating sigma_rel={s:.4g}")
                # Popped and deleted, so that evaluated weights are freed.
                weights = results.pop(0)
                metric = self._evaluate(weights)
                try:
                    number = float(metric)
                except (TypeError, ValueError):
                    raise TypeError(f"evaluate must return a number (got {metric!r})") from None
                self.known[s] = Evaluation(number, weights.predicted_error, searched)
                del weights
                self._save()
                bar.update()

    def _save(self) -> None:
        if self._cache is None:
            return
        data = {
            "posthoc_ema_sweep": CACHE_VERSION,
            "identity": self._identity,
            "evaluations": [
                {
                    "sigma_rel": s,
                    "metric": _to_json(e.metric),
                    "predicted_error": _to_json(e.predicted_error),
                    "searched": e.searched,
                }
                for s, e in self.known.items()
            ],
        }
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._cache, json.dumps(data, indent=1, allow_nan=False) + "\n")


def _read_cache(path: Place, identity: Mapping[str, Any]) -> dict[float, Evaluation]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, stored = data["posthoc_ema_sweep"], data["identity"]
        known = {
            float(e["sigma_rel"]): Evaluation(
                float(e["metric"]), float(e["predicted_error"]), bool(e["searched"])
            )
            for e in data["evaluations"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a cache of sweep or find_best ({error!r}); give another file"
        ) from error
    if version != CACHE_VERSION:
        raise ValueError(f"{path} has version {version}, this library reads {CACHE_VERSION}")
    different = [key for key in identity if stored.get(key) != identity[key]]
    if different:
        changes = ", ".join(f"{k} was {stored.get(k)}, is {identity[k]}" for k in different)
        raise ValueError(
            f"{path} holds metrics of other averages ({changes}); delete it, or give another cache="
        )
    return known


def _to_json(value: float) -> float | str:
    """The number, or its name where JSON has no number for it."""
    return value if isfinite(value) else str(value)


def _result_bytes(snapshot: Snapshot) -> int:
    """Memory of one reconstruction."""
    averages = sum(
        snapshot.entries[name].count * (8 if snapshot.entries[name].dtype == "F64" else 4)
        for name in snapshot.averages
    )
    return averages + sum(snapshot.entries[name].nbytes for name in snapshot.copies)
