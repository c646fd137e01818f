"""PyTorch Lightning: a callback that averages, and validates with averages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from posthoc_ema.ema import EMA
from posthoc_ema.errors import StateError
from posthoc_ema.integrations.loop import Swap, check_start, check_start_argument, check_track

# Two names of one framework, each with classes of its own: that which is in use, or installed.
_OLD = "pytorch_lightning"
_USES_OLD = "lightning" not in sys.modules and (_OLD in sys.modules or not find_spec("lightning"))
Callback: Any = import_module(f"{_OLD if _USES_OLD else 'lightning.pytorch'}.callbacks").Callback

if TYPE_CHECKING:
    from collections.abc import Sequence

    from posthoc_ema.profiles import Profile

    Clock = Callable[[Any, Any], float]


class EMACallback(Callback):
    """Averages the weights of a LightningModule after every optimiser step.

    Works with ``lightning.pytorch`` and ``pytorch_lightning``. The averages are part of every
    checkpoint and are loaded with it. Weights in checkpoints are always the raw ones. A last
    snapshot is written when training ends, whether or not one is due.

    Args:
        sigma_rel: EMA lengths to track, as of :class:`posthoc_ema.EMA`.
        validate_with: Validate and test with this track's averages in the module instead of its
            weights; they come back whatever happens. Before the first update there are none, as
            in the sanity check, and the weights are used.
        t: Training time after a batch, from (trainer, module); by default
            ``trainer.global_step``, which counts optimiser steps (of all optimisers), not
            batches. For images: ``t=lambda trainer, module: 256 * trainer.global_step``.
        start: ``"here"`` lets averages begin in the middle of a run, at a checkpoint that holds
            none. By default that is an error.
        **options: Of :class:`posthoc_ema.EMA`: ``snapshots``, ``every``, ``schedule``,
            ``encoding``, ``include``, ``exclude``, ``device``, ``unit``, ``nonfinite``.

    Attributes:
        ema: The :class:`posthoc_ema.EMA`, for ``average``, ``applied`` and the like.

    Raises:
        ValueError: If an argument is outside its domain.

    Example:
        >>> ema = EMACallback(snapshots="run/ema", every=1000)  # doctest: +SKIP
        >>> Trainer(callbacks=[ema]).fit(module, data)  # doctest: +SKIP
    """

    def __init__(
        self,
        sigma_rel: float | Profile | Sequence[float | Profile] = (0.05, 0.10),
        *,
        validate_with: float | None = None,
        t: Clock | None = None,
        start: str = "scratch",
        **options: Any,
    ) -> None:
        super().__init__()
        self.ema = EMA(sigma_rel, **options)
        check_track(self.ema, validate_with, "validate_with")
        self._validate_with, self._start = validate_with, check_start_argument(start)
        self._time: Clock = t or _global_step
        self._swap = Swap()
        self._loaded: bool | None = None  # whether the checkpoint being resumed from held averages
        self._step = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the checkpoint of an earlier call; one of this call is loaded after this."""
        self._loaded = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make sure that the averages belong to this training."""
        time = self._time(trainer, pl_module)
        check_start(self.ema, trainer.global_step, time, self._loaded, self._start)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Update, if an optimiser stepped since the last batch."""
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.ema.update(pl_module, t=self._time(trainer, pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write a last snapshot, so that averages at the end can be reconstructed."""
        if self.ema.store is not None and self.ema.t:
            self.ema.snapshot()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the averages into the module."""
        self._enter(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Bring the weights back; checkpoint callbacks come after this one."""
        self._swap.leave()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the averages into the module."""
        self._enter(pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Bring the weights back."""
        self._swap.leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Bring the weights back; ``KeyboardInterrupt`` comes here too."""
        self._swap.leave()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Bring the weights back, should no other hook have been called."""
        self._swap.leave()

    def state_dict(self) -> dict[str, Any]:
        """The averages, for the checkpoint."""
        return self.ema.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the averages of a checkpoint."""
        self.ema.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Note whether the checkpoint holds averages."""
        self._loaded = self.state_key in checkpoint.get("callbacks", {})

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint saved during validation gets the raw weights too."""
        if self._swap.active:
            self._swap.leave()
            weights = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = deepcopy(weights)  # which share memory with the module
            self._swap.enter(self.ema, pl_module, self._validate_with)

    def _enter(self, module: Any) -> None:
        if self._validate_with is None or self.ema.t == 0:
            return
        if self._loaded is False:
            raise StateError(
                "the loaded checkpoint holds no averages, and those in memory are not its own; "
                "evaluate it without validate_with"
            )
        self._swap.enter(self.ema, module, self._validate_with)


def _global_step(trainer: Any, module: Any) -> float:
    return int(trainer.global_step)
