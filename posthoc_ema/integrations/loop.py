"""What callbacks of training frameworks share: where averages may begin, and swaps in halves."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from posthoc_ema.errors import StateError
from posthoc_ema.profiles import as_profile

if TYPE_CHECKING:
    from posthoc_ema.ema import EMA

STARTS = ("scratch", "here")


def check_start_argument(start: str) -> str:
    """The argument ``start`` of a callback, if it is one of those there are.

    Raises:
        ValueError: If it is not.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(map(repr, STARTS))} (got {start!r})")
    return start


def check_track(ema: EMA, sigma_rel: float | None, argument: str) -> None:
    """Make sure at once, not after hours of training, that a track is kept.

    Raises:
        ValueError: If it is not.
    """
    if sigma_rel is not None and as_profile(sigma_rel).sigma_rel not in ema.sigma_rel:
        raise ValueError(f"{argument}={sigma_rel} is not among the tracks {ema.sigma_rel}")


def check_start(ema: EMA, step: int, t: float, loaded: bool | None, start: str) -> None:
    """Make sure that averages belong to the training that begins now: nothing is reset silently.

    Args:
        ema: The averages.
        step: Optimiser steps done before.
        t: Training time at this moment, in the averages' unit.
        loaded: Whether the checkpoint that training resumes from held averages; None if it does
            not resume from one.
        start: ``"here"`` lets averages begin in the middle of a run.

    Raises:
        StateError: If averages would begin unasked in the middle, or those of another run or
            time would go on.
    """
    if ema.clock == 0:
        if step > 0 and start != "here":
            raise StateError(
                f"training goes on at step {step} from a checkpoint that holds no averages: it is "
                "older than the EMA, or was not saved completely. Resume from one that holds them; "
                'or let averages begin at this step with start="here"'
            )
        return
    stale = loaded is False or (loaded is None and ema.clock != t) or ema.clock > t
    if stale:
        raise StateError(
            f"the averages stand at t={ema.clock}, but training goes on at t={t} (step {step})"
            f"{' from a checkpoint that holds no averages' if loaded is False else ''}: they "
            "belong to another run or time. Make a new callback for this one; to continue a run, "
            "resume from its checkpoint, which holds its averages"
        )


class Swap:
    """Averages in a model from one hook of a framework to another, which no ``with`` can span."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.active = False
        """Whether the model holds averages now."""

    def enter(self, ema: EMA, model: Any, sigma_rel: float | None) -> None:
        """Let the model hold averages; if that fails it holds its own weights."""
        self._stack.enter_context(ema.applied(model, sigma_rel))
        self.active = True

    def leave(self) -> None:
        """Bring the raw weights back, if they are away."""
        try:
            self._stack.close()
        finally:
            self.active = False
