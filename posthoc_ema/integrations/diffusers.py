"""Loops of ``accelerate`` and ``diffusers``: in place of ``diffusers.training_utils.EMAModel``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posthoc_ema.ema import EMA
from posthoc_ema.errors import StateError, StructureError
from posthoc_ema.integrations.loop import Swap, check_track
from posthoc_ema.integrations.pretrained import put
from posthoc_ema.integrations.state_file import load_state, save_state
from posthoc_ema.profiles import as_profile, profile_from_dict
from posthoc_ema.schedule import beta

if TYPE_CHECKING:
    from posthoc_ema.profiles import Profile

STATE_FILE = "ema_state.safetensors"
_THEIRS = frozenset(
    {"decay", "min_decay", "update_after_step", "use_ema_warmup", "inv_gamma", "power", "foreach"}
    | {"model_cls", "model_config"}
)


class EMAModel:
    """Takes the place of ``diffusers.training_utils.EMAModel`` in a training script.

    The line that makes it changes, and names the model instead of its parameters, which have no
    names; the copy of the model that scripts load for it is not needed. All other lines may stay:
    ``step``, ``store``, ``copy_to``, ``restore``, ``to``, ``state_dict``, ``save_pretrained``,
    ``from_pretrained``, ``accelerator.register_for_checkpointing``.

    Args:
        model: The model that is trained, as it is before ``accelerator.prepare``.
        sigma_rel: EMA lengths to track, as of :class:`posthoc_ema.EMA`.
        validate_with: The track that ``copy_to`` and ``save_pretrained`` use; by default the last.
        **options: Of :class:`posthoc_ema.EMA`: ``snapshots``, ``every``, ``schedule``,
            ``encoding``, ``include``, ``exclude``, ``device``, ``unit``, ``nonfinite``.

    Attributes:
        ema: The :class:`posthoc_ema.EMA`. At the end of training call its ``snapshot``.

    Raises:
        TypeError: If parameters were given, or arguments of diffusers' own class.
        ValueError: If an argument is outside its domain.

    Example:
        >>> ema_unet = EMAModel(unet, snapshots="run/ema", every=500)  # doctest: +SKIP
        >>> ema_unet.step(unet.parameters())  # doctest: +SKIP
    """

    def __init__(
        self,
        model: torch.nn.Module,
        sigma_rel: float | Profile | Sequence[float | Profile] = (0.05, 0.10),
        *,
        validate_with: float | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"expected the model (got {type(model).__name__}): weights pair by name, and "
                "parameters alone have none. Write EMAModel(unet, ...) for EMAModel("
                "unet.parameters(), ...)"
            )
        if theirs := sorted(_THEIRS & set(options)):
            raise TypeError(
                f"{', '.join(theirs)} of diffusers' EMAModel {'is' if len(theirs) == 1 else 'are'} "
                "not needed here: leave out what names the model or warms up, and for an average "
                "of constant decay write EMAModel(unet, sigma_rel=posthoc_ema.Exponential."
                "from_beta(0.9999))"
            )
        self.ema = EMA(sigma_rel, **options)
        check_track(self.ema, validate_with, "validate_with")
        self._model = model
        self._track = self.ema.sigma_rel[-1] if validate_with is None else validate_with
        self._swap, self._stored, self._before = Swap(), False, 0.0

    @property
    def cur_decay_value(self) -> float | None:
        """β of the last step of the track that is validated with, for logs."""
        t = self.ema.t
        return float(beta(as_profile(self._track), t, t - self._before)) if t else None

    def step(self, parameters: Any, t: float | None = None) -> None:
        """Take the weights into the averages; call where ``accelerator.sync_gradients``.

        Args:
            parameters: Of the model; or the model.
            t: Training time, as of :meth:`posthoc_ema.EMA.update`.

        Raises:
            StructureError: If they are not of the model.
            StateError: If called between ``copy_to`` and ``restore``.
        """
        self._own(parameters)
        before = self.ema.t
        self.ema.update(self._model, t)
        self._before = before

    def store(self, parameters: Any) -> None:
        """Say that ``restore`` will follow ``copy_to``.

        Args:
            parameters: Of the model; or the model.
        """
        self._own(parameters)
        self._stored = True

    def copy_to(self, parameters: Any) -> None:
        """Let the model hold averages, until ``restore`` if ``store`` was called, else for good.

        Args:
            parameters: Of the model; or the model.
        """
        self._own(parameters)
        if self._stored:
            self._swap.enter(self.ema, self._model, self._track)
        else:
            put(self._model, self.ema.average(self._track))

    def restore(self, parameters: Any) -> None:
        """Bring back the weights as they were at ``copy_to``.

        Args:
            parameters: Of the model; or the model.

        Raises:
            StateError: If ``store`` was not called.
        """
        self._own(parameters)
        if not self._stored:
            raise StateError("there are no stored weights to restore: call store before copy_to")
        self._stored = False
        self._swap.leave()

    def to(self, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> None:
        """Nothing: averages lie with the weights, or where ``EMAModel(device=...)`` says.

        Args:
            device: Ignored.
            dtype: None or float32: that is what averages are kept in.
            non_blocking: Ignored.

        Raises:
            ValueError: If another ``dtype`` is asked for.
        """
        if dtype not in (None, torch.float32):
            raise ValueError(
                f"averages are kept in float32, whatever the model's type; not {dtype}"
            )

    def pin_memory(self) -> None:
        """Nothing: ``EMAModel(device="cpu")`` keeps averages in CPU memory."""

    def state_dict(self) -> dict[str, Any]:
        """As of :meth:`posthoc_ema.EMA.state_dict`; ``accelerator.save_state`` calls it."""
        return self.ema.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As of :meth:`posthoc_ema.EMA.load_state_dict`; ``accelerator.load_state`` calls it."""
        self.ema.load_state_dict(state_dict)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Save the averages as a model folder, and the state to go on with, into it.

        Args:
            path: The folder.

        Raises:
            TypeError: If the model has no ``save_pretrained``, like one inside a wrapper.
        """
        model: Any = self._model
        if not hasattr(model, "save_pretrained"):
            raise TypeError(
                f"{type(model).__name__} has no save_pretrained; make EMAModel with the model as "
                "it is before accelerator.prepare"
            )
        if self._swap.active:
            model.save_pretrained(path)
        else:
            with self.ema.applied(self._model, self._track):
                model.save_pretrained(path)
        save_state(self.state_dict(), Path(path, STATE_FILE))

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], model_cls: Any, foreach: bool = False, **options: Any
    ) -> EMAModel:
        """What ``save_pretrained`` saved: a model of averages, and the state to go on with.

        Args:
            path: The folder.
            model_cls: Class of the model.
            foreach: Ignored.
            **options: As of :class:`EMAModel`.

        Returns:
            Around a model of its own; scripts take its ``state_dict`` alone.

        Raises:
            StateError: If the folder is from before this class was used: it holds no state.
        """
        file = Path(path, STATE_FILE)
        if not file.is_file():
            raise StateError(
                f"{path} holds no {STATE_FILE}: it is older than this EMA. Resume from a newer "
                "checkpoint; or leave loading out for once, and averages begin with the next step"
            )
        state = load_state(file)
        profiles = [profile_from_dict(data) for data in state["profiles"]]
        made = cls(model_cls.from_pretrained(path), profiles, unit=state["unit"], **options)
        made.load_state_dict(state)
        return made

    def _own(self, parameters: Any) -> None:
        """Make sure that these are parameters of the model, all or some, or the model."""
        given: Iterable[Any] = (
            parameters.parameters() if isinstance(parameters, torch.nn.Module) else parameters
        )
        known = {id(parameter) for parameter in self._model.parameters()}
        found = [id(parameter) in known for parameter in given]
        if not found or not all(found):
            raise StructureError(
                "these are not parameters of the model that EMAModel was made with; make it with "
                "the model that is trained"
            )
