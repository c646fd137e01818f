"""Which snapshots an EMA writes, when, by which process, and in which thread."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Thread
from typing import TypeVar

import numpy as np

from posthoc_ema.parts_writing import Division, Holding, WrittenPart, check_parts_encoding
from posthoc_ema.profiles import Profile
from posthoc_ema.schedule import Schedule, ThinningSchedule
from posthoc_ema.snapshot_file import AverageSource, CopySource, RunIdentity, Snapshot
from posthoc_ema.snapshots import SnapshotStore
from posthoc_ema.trackers.base import Ranks, Tracker
from posthoc_ema.trackers.pick import is_writer

T = TypeVar("T")


@dataclass(frozen=True)
class Moment:
    """All that the snapshots of one time hold.

    Attributes:
        run: Their run.
        t: The time.
        tracks: Profile and averages of each track.
        copies: Buffers and integer tensors.
        names: Name and type of each averaged tensor of the model.
        aliases: Tied names.
        ranks: The processes that each hold a part of it, if there are several.
    """

    run: RunIdentity
    t: float
    tracks: Sequence[tuple[Profile, Sequence[AverageSource]]]
    copies: Sequence[CopySource]
    names: Sequence[tuple[str, str]]
    aliases: Mapping[str, str]
    ranks: Ranks | None

    @classmethod
    def of(
        cls, tracker: Tracker, profiles: Sequence[Profile], run: RunIdentity, t: float
    ) -> Moment:
        """The present one, which the next update changes."""
        tracks = [(p, tracker.average_sources(k)) for k, p in enumerate(profiles)]
        names = [(spec.name, spec.dtype) for spec in tracker.averaged]
        copies = tracker.copy_sources()
        return cls(run, t, tracks, copies, names, tracker.aliases, tracker.ranks)

    def kept(self) -> Moment:
        """A copy that nothing changes."""
        return replace(
            self,
            tracks=[(profile, list(map(_kept, sources))) for profile, sources in self.tracks],
            copies=[replace(copy, data=copy.data.copy()) for copy in self.copies],
        )


class Recorder:
    """Writes the snapshots of one EMA.

    Args:
        store: Where.
        schedule: When, if not only on demand.
        encoding: How they are stored.
        profiles: The tracks.
        background: Whether those that fall due are written by a thread.
    """

    def __init__(
        self,
        store: SnapshotStore,
        schedule: Schedule | None,
        encoding: str,
        profiles: Sequence[Profile],
        background: bool,
    ) -> None:
        self.store, self._schedule, self._encoding = store, schedule, encoding
        self._profiles, self._background = profiles, background
        self._handled: float = 0  # up to where due snapshots are on disk
        self._flying: float = 0  # or up to where they are on their way
        self._written: list[Snapshot] = []  # at the last such time
        self._claimed = False
        self._thread: Thread | None = None
        self._errors: list[Exception] = []  # of the thread; one at most
        weakref.finalize(self, _report, self._errors)

    def resume(self, t: float) -> None:
        """Go on as of a time up to which all is on disk."""
        self.wait()
        self._handled, self._flying, self._claimed = t, 0, False

    def claim(self, run: RunIdentity, t: float, ranks: Ranks | None) -> None:
        """Make the folder ready, once."""
        if self._claimed:
            return
        if ranks is not None:
            check_parts_encoding(self._encoding)
        if self.writes(ranks):
            _by_first(ranks, lambda: self.store.claim(run, t))
        self._claimed = True

    def writes(self, ranks: Ranks | None) -> bool:
        """Whether this process takes part: of several that hold all of the model, the first."""
        return ranks is not None or is_writer()

    def due(self, t: float, ranks: Ranks | None) -> bool:
        """Whether a snapshot falls due in which this process takes part."""
        reached = max(self._handled, self._flying)
        return self._schedule is not None and self._schedule.due(reached, t) and self.writes(ranks)

    def record(self, moment: Moment) -> None:
        """Write what fell due, in the background if so asked for."""
        self.close()  # one at a time; and its error comes first
        if not self._background:
            self.write(moment)
            return
        kept = moment.kept()
        self._thread = Thread(target=self._attempt, args=(kept,), name="posthoc_ema snapshot")
        self._flying = moment.t
        self._thread.start()

    def write(self, moment: Moment) -> list[Snapshot]:
        """Write what is not on disk yet; durable when this returns."""
        wanted = _by_first(moment.ranks, lambda: self._missing(moment))
        self._written = [s for s in self._written if s.t == moment.t]
        written = []
        for profile, sources in moment.tracks:
            if profile in wanted:
                written.append(self._write_one(moment, profile, sources))
                self._written.append(written[-1])
        self._handled = moment.t
        _by_first(moment.ranks, lambda: self._thin(moment))
        return written

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
            SnapshotError, SnapshotWriteError: If it could not be.
        """
        self.wait()
        if self._errors:
            self._flying = 0
            raise self._errors.pop()

    def raise_error(self, ranks: Ranks | None) -> None:
        """Raise what went wrong in the background, if that is known already."""
        # Of several processes all must raise it in the same step: where the next one falls due.
        if self._errors and ranks is None:
            self.close()

    def _attempt(self, moment: Moment) -> None:
        try:
            self.write(moment)
        except Exception as error:
            self._errors.append(error)

    def _missing(self, moment: Moment) -> set[Profile]:
        """The tracks of which there is no snapshot of this time yet."""
        self.store.check_unchanged(self._written)
        present = {s.profile for s in self.store.scan()[0] if s.t == moment.t}
        if self._handled != moment.t:
            # Neither written here nor found on resuming: let the store say that there are two
            # writers, but for tracks that got onto disk before an error.
            present &= {s.profile for s in self._written if s.t == moment.t}
        return {profile for profile, _ in moment.tracks} - present

    def _write_one(
        self, moment: Moment, profile: Profile, sources: Sequence[AverageSource]
    ) -> Snapshot:
        store, run, t, ranks = self.store, moment.run, moment.t, moment.ranks
        if ranks is None:
            return store.write(
                run, t, profile, sources, moment.copies, moment.aliases, self._encoding
            )
        ranks.first(lambda: store.check_new(run, t, profile))
        whole = [copy for copy in moment.copies if copy.part is None]
        parts = [copy for copy in moment.copies if copy.part is not None]
        division = ranks.together(
            lambda: Holding.of(store.path, sources, parts, moment.names), Division.of
        )
        dropped = {name for number, name in division.dropped if number == ranks.number}
        sources = [source for source in sources if source.name not in dropped]
        parts = [copy for copy in parts if copy.name not in dropped]

        def join(written: list[WrittenPart | None]) -> Snapshot:
            found = [part for part in written if part is not None]
            return store.join(
                run,
                t,
                profile,
                moment.names,
                whole,
                moment.aliases,
                self._encoding,
                found,
                division.sizes,
            )

        return ranks.together(
            lambda: store.write_part(
                run,
                t,
                profile,
                sources,
                parts,
                self._encoding,
                division.sizes,
                ranks.number,
                ranks.size,
            ),
            join,
        )

    def _thin(self, moment: Moment) -> None:
        """Delete what the schedule does not keep: this run's own, up to the present time."""
        if not isinstance(self._schedule, ThinningSchedule):
            return
        own = [
            s
            for s in self.store.scan()[0]
            if s.run.run_id == moment.run.run_id and s.profile in self._profiles and s.t <= moment.t
        ]
        # The newest, just written, is what makes the others dispensable.
        kept = {*self._schedule.keep(sorted({s.t for s in own}), moment.t), moment.t}
        doomed = [s for s in own if s.t not in kept]
        if doomed:
            self.store.delete(doomed)
            # Those stored as differences from deleted ones were written once more.
            mine = {(s.t, s.profile) for s in self._written}
            self._written = [s for s in self.store.scan()[0] if (s.t, s.profile) in mine]


def _by_first(ranks: Ranks | None, work: Callable[[], T]) -> T:
    return work() if ranks is None else ranks.first(work)


def _kept(source: AverageSource) -> AverageSource:
    """With a copy of the values."""
    chunks = [np.array(chunk) for chunk in source.chunks()]
    return replace(source, chunks=lambda: chunks)


def _report(errors: list[Exception]) -> None:
    """At the end of the program nobody else would say it."""
    for error in errors:
        print(f"posthoc_ema: the last snapshot was not written: {error}", file=sys.stderr)
