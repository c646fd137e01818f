"""JAX: averages as pure functions of a state, for ``jit``, ``scan`` and donated buffers.

Outside of compiled functions :class:`posthoc_ema.EMA` takes pytrees as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from posthoc_ema.encoding import check_encoding
from posthoc_ema.errors import StateError, StructureError
from posthoc_ema.profiles import Exponential, PowerFunction, Profile, as_profile
from posthoc_ema.reconstruct import Reconstruction
from posthoc_ema.schedule import Every, Schedule, ThinningSchedule, update_weight
from posthoc_ema.snapshot_file import RunIdentity, Snapshot
from posthoc_ema.snapshots import SnapshotStore, as_store
from posthoc_ema.trackers.base import Selection, unique_names
from posthoc_ema.trackers.jax import JaxTracker, averaged_leaves, named_leaves
from posthoc_ema.trackers.jax import init as kept_copy
from posthoc_ema.trackers.jax import update as moved

if TYPE_CHECKING:
    from collections.abc import Callable

_LIMB = 30  # bits: a step and a remainder add up within int32


class EMAState(NamedTuple):
    """State of averages, a pytree; put it into the training checkpoint as it is.

    Attributes:
        t: Training time, ``[2]`` int32, t = 2³⁰ t[0] + t[1]: exact up to 2⁶¹, where float32 loses
            count at 2²⁴ and int32 ends at 2³¹.
        t_first: Time of the first update, likewise; zero before it.
        run_id: ``[2]`` uint32, random: tells the snapshots of one run from those of another.
        averages: For each track a tree like the parameters, float32 (float64 for 64-bit weights);
            integers and other leaves that are not averaged are those of the last update.
    """

    t: jax.Array
    t_first: jax.Array
    run_id: jax.Array
    averages: tuple[Any, ...]


class PureEMA:
    """Averages of a pytree of parameters as pure functions.

    Args:
        sigma_rel: EMA lengths to track, as of :class:`posthoc_ema.EMA`.

    Raises:
        ValueError: If a length is outside its domain, or given twice.
        TypeError: For a profile that cannot be tracked.

    Example:
        >>> tracker = PureEMA((0.05, 0.10))
        >>> state, update = tracker.init({"w": jnp.zeros(2)}), jax.jit(tracker.update)
        >>> for step in range(1, 101):
        ...     state = update(state, {"w": jnp.full(2, 0.01 * step)})
        >>> [round(float(average["w"][0]), 2) for average in state.averages]
        [0.95, 0.89]

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 127.
    """

    def __init__(
        self, sigma_rel: float | Profile | Sequence[float | Profile] = (0.05, 0.10)
    ) -> None:
        listed: Any = sigma_rel if isinstance(sigma_rel, Sequence) else [sigma_rel]
        self.profiles = tuple(as_profile(value) for value in listed)
        if not self.profiles or len(set(self.profiles)) < len(self.profiles):
            raise ValueError(f"sigma_rel must name at least one track, each once (got {sigma_rel})")
        for profile in self.profiles:
            update_weight(profile, 1, 2)  # raises for a profile that cannot be tracked

    def init(self, params: Any, t: int = 0) -> EMAState:
        """State before the first update.

        Args:
            params: Pytree of arrays.
            t: Training time until now; not 0 where averages begin in the middle of a run.

        Returns:
            Zeros in place of averages: the first update copies.

        Raises:
            ValueError: If ``t`` is negative or no integer.
        """
        if int(t) != t or not 0 <= t < 1 << (2 * _LIMB):
            raise ValueError(f"t must be an integer >= 0 (got {t})")
        leaves, treedef, averaged = averaged_leaves(params)
        empty = jax.tree.unflatten(
            treedef,
            [
                jnp.zeros_like(kept_copy(leaf)) if is_averaged else leaf
                for leaf, is_averaged in zip(leaves, averaged, strict=True)
            ],
        )
        # Buffers of their own for each track: they may be donated.
        copies = [jax.tree.map(_own, empty) for _ in self.profiles]
        high, low = divmod(int(t), 1 << _LIMB)
        return EMAState(
            jnp.array([high, low], jnp.int32),
            jnp.zeros(2, jnp.int32),
            jnp.array(np.frombuffer(os.urandom(8), np.uint32)),
            tuple(copies),
        )

    def update(self, state: EMAState, params: Any, t_delta: Any = 1) -> EMAState:
        """Take parameters into the averages; pure, for use inside ``jit`` and ``scan``.

        Args:
            state: Of :meth:`init` or the last update.
            params: Pytree of the same structure, after the optimiser's step.
            t_delta: Time since the last update, an integer > 0 below 2³⁰, or a traced one.

        Returns:
            The new state.

        Raises:
            ValueError: If ``t_delta`` is outside its domain (where it is not traced).
        """
        if not isinstance(t_delta, jax.Array) and not (
            int(t_delta) == t_delta and 0 < t_delta < 1 << _LIMB
        ):
            raise ValueError(f"t_delta must be an integer in [1, 2^{_LIMB}) (got {t_delta})")
        low = state.t[1] + jnp.asarray(t_delta, jnp.int32)
        t = jnp.stack([state.t[0] + (low >> _LIMB), low & ((1 << _LIMB) - 1)])
        first = (state.t_first == 0).all()
        elapsed = jnp.asarray(t_delta, jnp.float32)
        now = t[0].astype(jnp.float32) * float(1 << _LIMB) + t[1].astype(jnp.float32)
        leaves, treedef, averaged = averaged_leaves(params)
        tracks = []
        for profile, track in zip(self.profiles, state.averages, strict=True):
            weight = jnp.where(first, 1.0, _weight(profile, now, elapsed))
            before = treedef.flatten_up_to(track)
            tracks.append(
                jax.tree.unflatten(
                    treedef,
                    [
                        moved(average, leaf, weight) if is_averaged else _own(leaf)
                        for average, leaf, is_averaged in zip(before, leaves, averaged, strict=True)
                    ],
                )
            )
        return EMAState(t, jnp.where(first, t, state.t_first), state.run_id, tuple(tracks))


class SnapshotWriter:
    """Writes averages of a :class:`PureEMA` as snapshots, outside of compiled functions.

    Args:
        tracker: The tracker, or its ``sigma_rel``.
        snapshots: The folder, or its URL, or a store.
        every: Interval in units of t, as of :class:`posthoc_ema.EMA`.
        schedule: Instead of ``every``.
        encoding: As of :class:`posthoc_ema.EMA`.
        unit: What t counts, for people.

    Raises:
        ValueError: If an argument is outside its domain.
    """

    def __init__(
        self,
        tracker: PureEMA | float | Profile | Sequence[float | Profile],
        snapshots: str | os.PathLike[str] | SnapshotStore,
        *,
        every: float | None = None,
        schedule: Schedule | None = None,
        encoding: str = "float32",
        unit: str = "steps",
    ) -> None:
        if every is not None and schedule is None:
            schedule = Every(every)
        elif schedule is None or every is not None:
            raise ValueError("give either every or schedule: when to write snapshots")
        if isinstance(schedule, ThinningSchedule):
            raise ValueError("this writer does not thin; use posthoc_ema.prune afterwards")
        self._profiles = (tracker if isinstance(tracker, PureEMA) else PureEMA(tracker)).profiles
        self.store = as_store(snapshots)
        self._schedule = schedule
        self._encoding, self._unit = check_encoding(encoding), unit
        self._run_id: str | None = None
        self._handled: float = 0

    def __call__(self, state: EMAState, params: Any, *, now: bool = False) -> list[Snapshot]:
        """Write a snapshot of every track if one is due since the last call.

        Reading the time waits for the device: call this after a compiled function of many steps.
        The snapshot is of the state's time, at or past the due one.

        Args:
            state: The state.
            params: Parameters of the same time, for types and for leaves that are not averaged.
            now: Write even if none is due, as at the end of training.

        Returns:
            What was written; nothing for tracks already on disk at this time.

        Raises:
            SnapshotError: If the folder holds another run's snapshots.
            SnapshotWriteError: If the snapshots cannot be written.
            StateError: If the state is of another run than at the last call.
        """
        t = current_time(state)
        run_id = np.asarray(state.run_id).tobytes().hex()
        if self._run_id not in (None, run_id) or t < self._handled:
            raise StateError(
                f"the state (run {run_id}, t={t}) does not continue the one written before (run "
                f"{self._run_id}, t={self._handled}); make a new SnapshotWriter for it"
            )
        if jax.process_index() != 0 or not np.asarray(state.t_first).any():
            return []
        tracker = JaxTracker(params, Selection(), 0)
        tracker.adopt([_named(average) for average in state.averages])
        run = RunIdentity(run_id, self._unit, tracker.framework, _integer(state.t_first))
        if self._run_id is None:
            self.store.claim(run, t)
            self._handled = max((s.t for s in self.store.scan()[0]), default=0)
            self._run_id = run_id
        if not now and not self._schedule.due(self._handled, t):
            return []
        present = {s.profile for s in self.store.scan()[0] if s.t == t}
        written = [
            self.store.write(
                run,
                t,
                profile,
                tracker.average_sources(track),
                tracker.copy_sources(),
                encoding=self._encoding,
            )
            for track, profile in enumerate(self._profiles)
            if profile not in present
        ]
        self._handled = t
        return written


def current_time(state: EMAState) -> int:
    """Time of a state as a plain integer.

    Args:
        state: The state; not inside a compiled function.

    Returns:
        t.
    """
    return _integer(state.t)


def put_into(tree: Any, weights: Reconstruction | Mapping[str, Any]) -> Any:
    """A pytree with other values in its leaves, paired by name.

    Args:
        tree: Parameters, a whole Equinox model, a Flax NNX state or model.
        weights: A reconstruction, or arrays by name.

    Returns:
        A tree of the same structure. Leaves that ``weights`` does not name stay; the others have
        the leaf's own type.

    Raises:
        StructureError: If a name is not in the tree, or has another shape there.

    Example:
        >>> model = put_into(model, reconstruct("run/ema", 0.07))  # doctest: +SKIP
    """
    values: Any = weights.state_dict() if isinstance(weights, Reconstruction) else weights
    pairs, treedef = named_leaves(tree)
    known = unique_names([(n, x) for n, x in pairs if n in values])
    missing = sorted(set(values) - set(known))
    if missing:
        names = ", ".join(name for name, _ in pairs[:6])
        raise StructureError(
            f"the tree has no leaf {missing[0]!r} ({len(missing)} such names); its names are "
            f"{names}, ... Give the tree that was tracked, or a part of it with its own names"
        )
    for name, leaf in known.items():
        if np.shape(leaf) != np.shape(values[name]):
            raise StructureError(
                f"{name} has shape {np.shape(leaf)} in the tree, {np.shape(values[name])} in the "
                "weights"
            )
    leaves = [
        jnp.asarray(values[name]).astype(leaf.dtype) if name in values else leaf
        for name, leaf in pairs
    ]
    return jax.tree.unflatten(treedef, leaves)


def _weight(profile: Profile, t: Any, t_delta: Any) -> Any:
    """1-β, like :func:`posthoc_ema.schedule.update_weight`, of traced times."""
    rules: dict[type, Callable[[Any], Any]] = {
        PowerFunction: lambda p: (p.gamma + 1) * jnp.log1p(-t_delta / t),
        Exponential: lambda p: -float(np.log(2) / p.halflife) * t_delta,
    }
    return -jnp.expm1(rules[type(profile)](profile))


def _own(leaf: Any) -> Any:
    """A copy of an array: the caller may donate its own."""
    return jnp.copy(leaf) if isinstance(leaf, jax.Array | np.ndarray) else leaf


def _named(tree: Any) -> dict[str, Any]:
    leaves, _, averaged = averaged_leaves(tree)
    names = [name for name, _ in named_leaves(tree)[0]]
    return {n: x for n, x, is_averaged in zip(names, leaves, averaged, strict=True) if is_averaged}


def _integer(limbs: Any) -> int:
    high, low = (int(limb) for limb in np.asarray(limbs))
    return (high << _LIMB) + low
