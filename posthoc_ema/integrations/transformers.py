"""Hugging Face ``transformers.Trainer``: a callback that averages and survives resuming."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from posthoc_ema.ema import EMA
from posthoc_ema.errors import StateError
from posthoc_ema.integrations.loop import check_start, check_start_argument, check_track
from posthoc_ema.integrations.state_file import load_state, read_identity, save_state

if TYPE_CHECKING:
    from posthoc_ema.profiles import Profile

    Clock = Callable[[Any, Any], float]

STATE_FILE = "ema_state.safetensors"
_KEY = "posthoc_ema"  # in trainer_state.json, beside the states of other callbacks


class EMACallback(TrainerCallback):
    """Averages the weights that a ``Trainer`` trains, after every optimiser step.

    The averages are saved into each checkpoint folder as ``ema_state.safetensors`` and loaded
    from there on resuming. Which averages belong to a checkpoint is in its ``trainer_state.json``
    too, so that no others are taken for them. A last snapshot is written when training ends,
    whether or not one is due.

    Args:
        sigma_rel: EMA lengths to track, as of :class:`posthoc_ema.EMA`.
        t: Training time after a step, from (arguments, trainer state); by default
            ``state.global_step``, which counts optimiser steps. For tokens:
            ``t=lambda args, state: state.num_input_tokens_seen``.
        start: ``"here"`` lets averages begin in the middle of a run, at a checkpoint that holds
            none. By default that is an error.
        resume_from: The checkpoint folder given to ``train(resume_from_checkpoint=...)``, which
            callbacks are not told. Needed only if it is not in ``output_dir``.
        **options: Of :class:`posthoc_ema.EMA`: ``snapshots``, ``every``, ``schedule``,
            ``encoding``, ``include``, ``exclude``, ``device``, ``unit``, ``nonfinite``.

    Attributes:
        ema: The :class:`posthoc_ema.EMA`, for ``average``, ``applied`` and the like.

    Raises:
        ValueError: If an argument is outside its domain.

    Example:
        >>> ema = EMACallback(snapshots="run/ema", every=1000)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, callbacks=[ema]).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        sigma_rel: float | Profile | Sequence[float | Profile] = (0.05, 0.10),
        *,
        t: Clock | None = None,
        start: str = "scratch",
        resume_from: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self.ema = EMA(sigma_rel, **options)
        self._time: Clock = t or _global_step
        self._start, self._resume_from = check_start_argument(start), resume_from
        self._run_id = self.ema.state_dict()["run_id"]

    def evaluate_with(self, trainer: Any, sigma_rel: float) -> None:
        """From now on let this trainer's ``evaluate`` and ``predict`` see averaged weights.

        Its own weights come back whatever happens; checkpoints hold those. Before the first
        update there are no averages, and the weights are used.

        Args:
            trainer: The trainer that has this callback.
            sigma_rel: Which track.

        Raises:
            ValueError: If no such track is kept.
        """
        check_track(self.ema, sigma_rel, "sigma_rel")
        loop = getattr(trainer.evaluation_loop, "plain", trainer.evaluation_loop)

        @wraps(loop)
        def averaged(*args: Any, **kwargs: Any) -> Any:
            if self.ema.t == 0:
                return loop(*args, **kwargs)
            with self.ema.applied(trainer.model, sigma_rel):
                return loop(*args, **kwargs)

        averaged.plain = loop  # type: ignore[attr-defined]  # a second call replaces the first
        trainer.evaluation_loop = averaged

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the averages of the checkpoint; make sure that they belong to this training."""
        resumed = state.global_step > 0
        noted = state.stateful_callbacks.get(_KEY, {}).get("attributes", {})
        # Steps taken without this callback carry along what it noted before.
        loaded = noted.get("step") == state.global_step if resumed else None
        if loaded:
            self.ema.load_state_dict(load_state(self._find(args, state, noted)))
            self._run_id = noted["run_id"]
        check_start(self.ema, state.global_step, self._time(args, state), loaded, self._start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update, and note which averages belong to a checkpoint of this step."""
        t = self._time(args, state)
        if t == 0:
            raise ValueError(
                f"t= gives 0 after step {state.global_step}; num_input_tokens_seen counts only "
                "with TrainingArguments(include_num_input_tokens_seen=True)"
            )
        self.ema.update(kwargs["model"], t=t)
        attributes = {
            "step": state.global_step,
            "clock": self.ema.clock,
            "run_id": self._run_id,
        }
        state.stateful_callbacks[_KEY] = {"args": {}, "attributes": attributes}
        if state.global_step >= state.max_steps:
            self._write_last()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a last snapshot of a run that stopped early."""
        # The best model, if it was loaded, has buffers of another time; it was saved before.
        if not args.load_best_model_at_end:
            self._write_last()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the averages into the checkpoint that was just saved."""
        if control.should_training_stop:
            self._write_last()
        averages = self.ema.state_dict()  # by every process
        if not args.should_save:
            return
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            raise StateError(
                f"the averages belong into {folder}, which is not there; a hyperparameter search "
                "needs a callback for each trial, and cannot be resumed with averages"
            )
        save_state(averages, folder / STATE_FILE)

    def _write_last(self) -> None:
        if self.ema.store is not None and self.ema.t:
            self.ema.snapshot()

    def _find(self, args: Any, state: Any, noted: Any) -> Path:
        """The file with the averages that the checkpoint says it has."""
        folders = [_checkpoint(args, state)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        if self._resume_from is not None:
            folders = [Path(self._resume_from)]
        for folder in folders:
            path = folder / STATE_FILE
            if path.is_file() and read_identity(path) == (noted["run_id"], noted["clock"]):
                return path
        raise StateError(
            f"the checkpoint of step {state.global_step} has averages at t={noted['clock']} (run "
            f"{noted['run_id']}), but no {STATE_FILE} in {', '.join(map(str, folders))} holds "
            "them. If the checkpoint lies elsewhere, say so with EMACallback(resume_from=folder); "
            "if saving it was cut short, resume from an earlier one"
        )


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")


def _global_step(args: Any, state: Any) -> float:
    return int(state.global_step)
