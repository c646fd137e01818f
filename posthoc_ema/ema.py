"""``EMA``: what a training loop calls."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy as copy
from math import isfinite
from typing import Any

from posthoc_ema.encoding import check_encoding
from posthoc_ema.errors import NonFiniteError, StateError, StructureError
from posthoc_ema.profiles import Profile, as_profile
from posthoc_ema.recording import Moment, Recorder
from posthoc_ema.schedule import Every, Schedule, update_weight
from posthoc_ema.snapshot_file import RunIdentity, Snapshot
from posthoc_ema.snapshots import SnapshotStore, as_store
from posthoc_ema.tracker_state import TrackerState, plain_number
from posthoc_ema.trackers.base import Selection, Tracker
from posthoc_ema.trackers.pick import common_run_id, make_tracker

NONFINITE = ("ignore", "skip", "raise")


class EMA:
    """Tracks power-function averages of a model's weights and keeps snapshots of them.

    Binds to the model at its first :meth:`update`, which copies the weights. Averages are kept
    in float32 (float64 for float64 weights) whatever the model's type; buffers and integer
    tensors are copied; tied tensors are averaged once.

    Args:
        sigma_rel: EMA lengths to track, as fractions of training time. Two, like the default,
            allow any other to be reconstructed afterwards.
        snapshots: Folder for snapshots, or its URL, or a store; None keeps none.
        every: Interval between snapshots, in units of t: one of each track is written by the
            first update at or past each multiple.
        schedule: Instead of ``every``, any :class:`posthoc_ema.schedule.Schedule`. One that
            thins, like that of :func:`posthoc_ema.plan` for an open end, deletes snapshots which
            this run wrote, after newer ones are on disk.
        encoding: How snapshots are stored: ``"float32"`` (averages as they are kept),
            ``"float16"`` or ``"bfloat16"``; or as what cannot be predicted from earlier
            snapshots: ``"delta16"`` (no more bytes than float16, about as exact as float32),
            ``"delta8"`` (half of them), ``"delta6"``, ``"delta4"``. Those hold the last
            snapshots in memory as float64 (both of the last time, of others up to 2 GB), and
            need the files before them to be read.
        include: Track only tensors whose names match one of these shell-style patterns. By
            default everything; of a model with PEFT adapters, only what is trained.
        exclude: Leave out tensors whose names match one of these.
        device: Where to keep averages (PyTorch only); by default with the weights. ``"cpu"``
            spares GPU memory and costs a transfer at each update.
        unit: What t counts, for people: ``"steps"``, ``"images"``, ``"tokens"``.
        nonfinite: What to do when a weight is NaN or infinite: ``"ignore"`` averages it (and
            snapshots are refused from then on), ``"skip"`` leaves that update out and counts it
            in :attr:`skipped`, ``"raise"`` stops. The last two read all weights once more at
            each update and wait for the GPU.
        background: Write snapshots that fall due in a thread, from a copy of the averages in the
            memory of the CPU: the step waits for the copy alone. One at most is on its way, the
            next one waits for it. An error is raised by the next :meth:`update` (of sharded
            weights: by that which writes the next one), :meth:`snapshot` or :meth:`close`; the
            program does not end before the last one is on disk.

    Example:
        >>> import numpy as np
        >>> ema = EMA(sigma_rel=0.1)
        >>> weights = {"w": np.zeros(3)}
        >>> for step in range(100):
        ...     weights["w"] += 0.01  # training
        ...     ema.update(weights)
        >>> ema.average()["w"].round(2)
        array([0.89, 0.89, 0.89])

    Source:
        Karras et al. 2024, arXiv:2312.02696, section 3.1 and Eq. 127.
    """

    def __init__(
        self,
        sigma_rel: float | Profile | Sequence[float | Profile] = (0.05, 0.10),
        *,
        snapshots: str | os.PathLike[str] | SnapshotStore | None = None,
        every: float | None = None,
        schedule: Schedule | None = None,
        encoding: str = "float32",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        device: Any = None,
        unit: str = "steps",
        nonfinite: str = "ignore",
        background: bool = False,
    ) -> None:
        several = isinstance(sigma_rel, Iterable) and not isinstance(sigma_rel, str)
        listed: Any = sigma_rel if several else [sigma_rel]
        self._profiles = [as_profile(value) for value in listed]
        if not self._profiles or len(set(self._profiles)) < len(self._profiles):
            raise ValueError(f"sigma_rel must name at least one track, each once (got {sigma_rel})")
        for profile in self._profiles:
            update_weight(profile, 1, 2)  # raises for a profile that cannot be tracked
        if every is not None and schedule is not None:
            raise ValueError("give either every or schedule, not both")
        if snapshots is None and (every is not None or schedule is not None):
            raise ValueError("every and schedule say when to write snapshots: give snapshots= too")
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)} (got {nonfinite!r})")
        schedule = Every(every) if every is not None else schedule
        check_encoding(encoding)
        self._recorder: Recorder | None = None
        if snapshots is not None:
            store = as_store(snapshots)
            self._recorder = Recorder(store, schedule, encoding, self._profiles, background)
        self._select = Selection.of(include, exclude)
        self._device, self._unit, self._nonfinite = device, unit, nonfinite
        self.skipped = 0
        """Updates left out because a weight was NaN or infinite."""

        self._run_id = os.urandom(8).hex()
        self._t: float = 0
        self._t_first: float = 0
        self._clock: float = 0  # like t, but skipped updates count
        self._counts_steps: bool | None = None
        self._swapped = False
        self._tracker: Tracker | None = None
        self._pending: list[dict[str, Any]] | None = None

    @property
    def t(self) -> float:
        """Time of the averages: that of the last update, 0 before the first."""
        return self._t

    @property
    def clock(self) -> float:
        """Time up to which updates were seen: like :attr:`t`, but skipped ones count."""
        return self._clock

    @property
    def sigma_rel(self) -> tuple[float, ...]:
        """Tracked EMA lengths, in the order given."""
        return tuple(profile.sigma_rel for profile in self._profiles)

    @property
    def store(self) -> SnapshotStore | None:
        """The snapshots, if any are kept."""
        return None if self._recorder is None else self._recorder.store

    def __getstate__(self) -> dict[str, Any]:
        """Only before it is bound: afterwards it belongs to a model, and to a folder."""
        if self._tracker is not None:
            raise TypeError(
                "an EMA that has averages cannot be copied or pickled, as by torch.save of a "
                "checkpoint that holds it: save its ema.state_dict() there, and give that to "
                "load_state_dict of a new one"
            )
        return self.__dict__

    def __repr__(self) -> str:
        return f"EMA({self._profiles}, t={self._t} {self._unit}, snapshots={self.store})"

    def bind(self, model: Any) -> None:
        """Bind to the model before the first update, which else does it.

        Only where a checkpoint is loaded into tensors that must be there already:
        :meth:`state_dict` then has averages (zeros) in the form of the model, into which
        ``torch.distributed.checkpoint`` loads, cut as this number of processes needs them.

        Args:
            model: As given to :meth:`update`.

        Raises:
            StructureError: If it cannot be tracked, or does not fit averages that were loaded.

        Example:
            >>> ema.bind(model)  # doctest: +SKIP
            >>> dcp.load({"model": model_state, "ema": ema}, checkpoint_id=path)  # doctest: +SKIP
        """
        if self._tracker is None:
            self._bind(model)
        else:
            self._tracker.check(model)

    def update(self, model: Any, t: float | None = None) -> None:
        """Take the weights into the averages; call after each optimiser step.

        Args:
            model: A ``torch.nn.Module`` (plain, compiled, data-parallel, or sharded: FSDP2 and
                other DTensors), a mapping from names to arrays of numpy, torch or JAX, or a JAX
                pytree.
            t: Training time, in any unit, strictly increasing; by default the number of calls.
                The decay follows from it, so any interval between updates is exact.

        Raises:
            ValueError: If ``t`` does not increase.
            StructureError: If the model changed since the averages began.
            StateError: If called while averages are applied to the model, or with ``t`` at
                some calls and without it at others.
            NonFiniteError: If a weight is not finite and ``nonfinite="raise"``.
            SnapshotError, SnapshotWriteError: If a due snapshot cannot be written; the averages
                are intact, and the next update tries again.
        """
        if self._swapped:
            raise StateError("update was called inside applied(): the model holds averages")
        t, counts_steps = self._next_time(t)
        self.bind(model)
        tracker = self._bound()
        if self._recorder is not None:
            self._recorder.claim(self._identity(), self._t, tracker.ranks)

        if self._nonfinite != "ignore" and not tracker.is_finite():
            if self._nonfinite == "raise":
                raise NonFiniteError(f"a weight is NaN or infinite at t={t}; nothing was averaged")
            self.skipped += 1
            self._clock, self._counts_steps = t, counts_steps
            return
        first = self._t == 0
        tracker.update(None if first else [update_weight(p, self._t, t) for p in self._profiles])
        self._t = self._clock = t
        self._counts_steps = counts_steps
        if first:
            self._t_first = t
        if self._recorder is not None:
            if self._recorder.due(t, tracker.ranks):
                self._recorder.record(self._moment())
            else:
                self._recorder.raise_error(tracker.ranks)

    def snapshot(self) -> list[Snapshot]:
        """Write a snapshot of every track now, durable when this returns.

        Returns:
            What was written; nothing for tracks already on disk at this time.

        Raises:
            StateError: If there is no folder, or no update yet.
            SnapshotError, SnapshotWriteError: As :meth:`update`.
        """
        if self._recorder is None:
            raise StateError("this EMA keeps no snapshots; give EMA(snapshots=folder)")
        if self._pending is not None:
            raise StateError(
                "a snapshot holds buffers too, which come with the model: call update first"
            )
        tracker = self._bound()
        self._require_update()
        self._recorder.close()
        self._recorder.claim(self._identity(), self._t, tracker.ranks)
        if not self._recorder.writes(tracker.ranks):
            return []
        return self._recorder.write(self._moment())

    def close(self) -> None:
        """Wait until what the background writes is on disk; the EMA can go on being used.

        Raises:
            SnapshotError, SnapshotWriteError: If it could not be written.
        """
        if self._recorder is not None:
            self._recorder.close()

    def average(self, sigma_rel: float | Profile | None = None) -> Any:
        """A copy of one track's averages, in the form of the model.

        Args:
            sigma_rel: Which track; may be left out if there is one only.

        Returns:
            A state dict (module), mapping, or pytree; float32 or float64, with copies of
            buffers and tied names. Before the first update, after ``load_state_dict``: the
            averaged tensors by name.

        Raises:
            ValueError: If no such track is kept.
            StateError: If there are no averages yet.
        """
        track = self._track(sigma_rel)
        if self._tracker is None and self._pending is not None:
            return {name: copy(value) for name, value in self._pending[track].items()}
        tracker = self._bound()
        self._require_update()
        return tracker.assemble({s.name: tracker.average(track, s.name) for s in tracker.averaged})

    @contextmanager
    def applied(self, model: Any, sigma_rel: float | Profile | None = None) -> Iterator[Any]:
        """Let the model hold one track's averages inside a ``with`` block.

        The raw weights, buffers and train/eval modes come back whatever happens inside. Modules
        and numpy arrays are changed in place, so not between a forward pass and its backward
        pass; for a JAX pytree use what the block is given.

        Args:
            model: The model, as given to :meth:`update`.
            sigma_rel: Which track; may be left out if there is one only.

        Yields:
            The model with averaged weights.

        Example:
            >>> with ema.applied(model, 0.05):  # doctest: +SKIP
            ...     evaluate(model)
        """
        track = self._track(sigma_rel)
        if self._tracker is None and self._pending is not None:
            self._bind(model)
        tracker = self._bound()
        self._require_update()
        if self._swapped:
            raise StateError("applied() is already active: its end would restore averages")
        self._swapped = True
        try:
            with tracker.applied(model, track) as averaged:
                yield averaged
        finally:
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, for the training checkpoint: copies, plain data.

        ``torch.load(weights_only=True)`` reads it; nothing refers to this library's classes. Of
        sharded weights (DTensor) each process gets its own shards, as DTensors, without
        communication: save them with ``torch.distributed.checkpoint``.
        """
        if self._recorder is not None:
            self._recorder.wait()  # whoever resumes from this counts on what was due
        averages: list[dict[str, Any]] = []
        if self._tracker is not None:
            tracker = self._tracker
            averages = [
                {spec.name: tracker.average(track, spec.name) for spec in tracker.averaged}
                for track in range(len(self._profiles))
            ]
        elif self._pending is not None:
            averages = [{n: copy(v) for n, v in track.items()} for track in self._pending]
        return TrackerState(
            run_id=self._run_id,
            unit=self._unit,
            t=self._t,
            t_first=self._t_first,
            clock=self._clock,
            counts_steps=self._counts_steps,
            skipped=self.skipped,
            profiles=self._profiles,
            averages=averages,
        ).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave, in this or another process.

        Snapshots later than the state's time are set aside at the next update (in the
        subfolder ``abandoned``), never deleted and never mixed in.

        Raises:
            ValueError: If the state is not one of :class:`EMA`, or has other tracks or names.
        """
        found = TrackerState.of(state)
        found.check(self._profiles, self._unit)
        # Copies: the state stays the caller's own, whatever becomes of these.
        averages = [{n: copy(v) for n, v in track.items()} for track in found.averages]
        if self._tracker is not None and averages:
            self._load_into(self._tracker, averages)
        else:
            self._tracker, self._pending = None, averages or None
        self._run_id, self._t = found.run_id, found.t
        self._t_first, self._clock = found.t_first, found.clock
        self._counts_steps, self.skipped = found.counts_steps, found.skipped
        if self._recorder is not None:
            self._recorder.resume(self._t)

    def _next_time(self, t: float | None) -> tuple[float, bool]:
        counts_steps = t is None
        if self._counts_steps not in (None, counts_steps):
            raise StateError(
                "update was called with t at some times and without it at others, which would "
                f"mix units; the clock stands at t={self._clock} {self._unit}"
            )
        if t is None:
            return self._clock + 1, True
        t = plain_number(t)
        if not (isfinite(t) and t > self._clock):
            raise ValueError(
                f"t must increase strictly from update to update: got {t} after {self._clock}"
                + (" (after resuming, go on counting from there)" if self._clock else "")
            )
        return t, False

    def _bind(self, model: Any) -> None:
        tracker = make_tracker(model, self._select, len(self._profiles), self._device)
        if not tracker.averaged:
            raise StructureError("the model has no floating-point tensors to average")
        if self._pending is not None:
            self._load_into(tracker, self._pending)
            self._pending = None
        if self._recorder is not None:
            tracker.connect()
            if tracker.ranks is not None:
                self._run_id = tracker.ranks.first(lambda: self._run_id)
            elif self._t == 0:
                self._run_id = common_run_id(self._run_id)
        self._tracker = tracker

    def _load_into(self, tracker: Tracker, averages: Sequence[Mapping[str, Any]]) -> None:
        for values in averages:  # all, before the first is touched
            tracker.check_loadable(values)
        for track, values in enumerate(averages):
            for name, value in values.items():
                tracker.load(track, name, value)

    def _identity(self) -> RunIdentity:
        return RunIdentity(self._run_id, self._unit, self._bound().framework, self._t_first)

    def _moment(self) -> Moment:
        return Moment.of(self._bound(), self._profiles, self._identity(), self._t)

    def _track(self, sigma_rel: float | Profile | None) -> int:
        if sigma_rel is None:
            if len(self._profiles) == 1:
                return 0
            raise ValueError(f"several tracks are kept, {self._profiles}: say which")
        profile = as_profile(sigma_rel)
        if profile not in self._profiles:
            raise ValueError(
                f"{profile} is not tracked, only {self._profiles}; reconstruct(...) makes any "
                "other from snapshots"
            )
        return self._profiles.index(profile)

    def _bound(self) -> Tracker:
        if self._tracker is None:
            raise StateError("there are no averages yet: call update first")
        return self._tracker

    def _require_update(self) -> None:
        if self._t == 0:
            raise StateError("there are no averages yet: call update first")
