"""Optax: an optimiser whose state holds averages of the parameters it produces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import optax

from posthoc_ema.errors import StructureError
from posthoc_ema.integrations.jax import EMAState, PureEMA

if TYPE_CHECKING:
    from posthoc_ema.profiles import Profile


class AveragedState(NamedTuple):
    """State of :func:`averaged`.

    Attributes:
        inner: State of the wrapped optimiser.
        ema: The averages.
    """

    inner: Any
    ema: EMAState


def averaged(
    optimizer: optax.GradientTransformation,
    sigma_rel: float | Profile | Sequence[float | Profile] = (0.05, 0.10),
    *,
    t_delta: int = 1,
    t: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimiser, so that its state averages the parameters after each of its updates.

    The averages follow ``optax.apply_updates(params, updates)``. Put this outermost but for what
    decides whether to step at all: ``optax.MultiSteps(averaged(optax.adam(1e-3)), 4)``. If
    parameters change otherwise, call :class:`posthoc_ema.integrations.jax.PureEMA` after that.

    Args:
        optimizer: What computes the updates.
        sigma_rel: EMA lengths to track, as of :class:`posthoc_ema.EMA`.
        t_delta: Training time of one update: 1 counts steps, the batch size counts images.
        t: Training time until now, where averages begin in the middle of a run.

    Returns:
        A transformation with :class:`AveragedState`; its updates are those of ``optimizer``.

    Raises:
        ValueError: If an argument is outside its domain; at each update if it is not given
            ``params``.

    Example:
        >>> optimizer = averaged(optax.adam(1e-3), t_delta=256)
        >>> state = optimizer.init({"w": jax.numpy.zeros(3)})
        >>> len(ema_state(state).averages)
        2
    """
    tracker = PureEMA(sigma_rel)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> AveragedState:
        return AveragedState(inner.init(params), tracker.init(params, t))

    def update(
        updates: Any, state: AveragedState, params: Any = None, **extra: Any
    ) -> tuple[Any, AveragedState]:
        if params is None:
            raise ValueError("averaged needs optimizer.update(grads, state, params): give params")
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        ema = tracker.update(state.ema, optax.apply_updates(params, updates), t_delta)
        return updates, AveragedState(inner_state, ema)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_state(optimizer_state: Any) -> EMAState:
    """The averages' state, wherever in the state of an optimiser it is.

    Args:
        optimizer_state: State of an optimiser made of :func:`averaged`, alone or wrapped.

    Returns:
        The one state there is.

    Raises:
        StructureError: If there is none, or there are several.
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, EMAState)

    found = [x for x in jax.tree.leaves(optimizer_state, is_leaf=is_state) if is_state(x)]
    if len(found) != 1:
        raise StructureError(
            f"expected the state of one averaged(...) optimiser (got {len(found)})"
        )
    return found[0]
