"""What a training checkpoint holds of the averages, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from posthoc_ema.profiles import Profile, profile_from_dict

VERSION = 1

_KEYS = frozenset(
    {"version", "run_id", "unit", "t", "t_first", "clock", "counts_steps", "skipped"}
    | {"profiles", "averages"}
)


@dataclass(frozen=True, eq=False)
class TrackerState:
    """Everything needed to continue.

    Attributes:
        run_id: Identity of the run.
        unit: What t counts.
        t: Time of the averages, 0 before the first update.
        t_first: Time of the first update.
        clock: Time up to which updates were seen.
        counts_steps: Whether t is counted by calls; None before the first.
        skipped: Updates left out because a weight was not finite.
        profiles: The tracks.
        averages: Of each track, by name; none before the first update.
    """

    run_id: str
    unit: str
    t: float
    t_first: float
    clock: float
    counts_steps: bool | None
    skipped: int
    profiles: Sequence[Profile]
    averages: Sequence[Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which ``torch.load(weights_only=True)`` reads."""
        return {
            "version": VERSION,
            "run_id": self.run_id,
            "unit": self.unit,
            "t": self.t,
            "t_first": self.t_first,
            "clock": self.clock,
            "counts_steps": self.counts_steps,
            "skipped": self.skipped,
            "profiles": [profile.to_dict() for profile in self.profiles],
            "averages": list(self.averages),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> TrackerState:
        """From what :meth:`to_dict` gave.

        Raises:
            ValueError: If it is something else, or incomplete.
        """
        missing = _KEYS - set(state if isinstance(state, Mapping) else ())
        if missing:
            raise ValueError(
                f"this is no state of EMA.state_dict: it lacks {', '.join(sorted(missing))}. A "
                "checkpoint from before the EMA was added has none: do not call load_state_dict "
                "then, and averages begin with the next update"
            )
        if state["version"] != VERSION:
            raise ValueError(
                f"state has version {state['version']}, this library reads {VERSION}; "
                "upgrade posthoc-ema"
            )
        # Numbers may come back as arrays of no dimension from numpy files.
        t, counts_steps = plain_number(state["t"]), state["counts_steps"]
        profiles = [profile_from_dict(data) for data in state["profiles"]]
        number = len(state["averages"])
        if number not in ({len(profiles)} if t else {0, len(profiles)}):
            raise ValueError(
                f"the state at t={t} has averages of {number} tracks, expected "
                f"{len(profiles) if t else 0}; it is incomplete"
            )
        return cls(
            run_id=str(state["run_id"]),
            unit=str(state["unit"]),
            t=t,
            t_first=plain_number(state["t_first"]),
            clock=plain_number(state["clock"]),
            counts_steps=None if counts_steps is None else bool(counts_steps),
            skipped=int(state["skipped"]),
            profiles=profiles,
            averages=state["averages"] if t else [],  # before the first update they mean nothing
        )

    def check(self, profiles: Sequence[Profile], unit: str) -> None:
        """Make sure that it is of these tracks, and counts in this unit.

        Raises:
            ValueError: If not.
        """
        if list(self.profiles) != list(profiles):
            raise ValueError(
                f"the state has the tracks {list(self.profiles)}, this EMA {list(profiles)}; make "
                "the EMA with the same sigma_rel"
            )
        if self.unit != unit:
            raise ValueError(
                f"the state counts {self.unit}, this EMA {unit}; make the EMA with "
                f"unit={self.unit!r}"
            )


def plain_number(value: Any) -> float:
    """A plain int where it is one, so that no image count is rounded, else a float."""
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, Integral) else float(value)
