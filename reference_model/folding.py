"""Weights normalised once for many evaluations, instead of at each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from reference_model.mp_layers import MPConv, channels_last

_Function = TypeVar("_Function", bound=Callable[..., Any])


@contextmanager
def folded_weights(*nets: Any) -> Iterator[None]:
    """Normalise the weights of networks in evaluation mode once, while the context lasts.

    The weights must not change meanwhile. Nothing outlives the context, so whatever edits weights
    later, by whichever means, cannot meet a stale copy; and where gradients are recorded the
    copies are not used, since they would hide them.

    Args:
        *nets: Networks, and lists of them; anything else is left alone.

    Example:
        >>> with torch.no_grad(), folded_weights(net):
        ...     for sigma in sigmas:
        ...         denoised = net(x, sigma)
    """
    # A layer that an enclosing context has folded stays as it is, and so do sharded weights
    # (FSDP2), which are whole inside a forward only.
    layers = [
        layer
        for net in networks_in(nets)
        for layer in net.modules()
        if isinstance(layer, MPConv)
        and not layer.training
        and layer.folded is None
        and type(layer.weight.detach()) is torch.Tensor
    ]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.folded = channels_last(layer.kernel())
        yield
    finally:
        for layer in layers:
            layer.folded = None


def folds_weights(function: _Function) -> _Function:
    """Let a function run with the weights of all networks among its arguments folded."""

    @wraps(function)
    def with_folded_weights(*args: Any, **kwargs: Any) -> Any:
        with folded_weights(*args, *kwargs.values()):
            return function(*args, **kwargs)

    return with_folded_weights  # type: ignore[return-value]


def networks_in(values: Iterable[Any]) -> Iterator[nn.Module]:
    """Modules among values and inside lists of them."""
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, list | tuple):
            yield from networks_in(value)
