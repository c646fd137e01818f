"""Magnitudes of activations, weights and updates of any PyTorch model, layer by layer.

    with record_magnitudes(model) as recorder:
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    for layer in recorder.layers:
        print(layer.name, layer.activation, layer.weight, layer.relative_update)

Works by hooks: the model is not changed, draws no random numbers, and costs nothing outside of
the context. Layers are the modules that hold a weight of two dimensions or more.

Source: Karras et al. 2024, arXiv:2312.02696, Fig. 3, Fig. 15, Eq. 68 and App. B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerMagnitudes:
    """What one layer did while it was recorded.

    The magnitude of a feature (output channel) is √(mean of squares over samples and pixels) of
    its activations, that of its weights √(mean of squares) of all weights that lead to it. Means
    and maxima are over the features of the layer. Biases and gains do not count as weights; they
    act on activations.

    Attributes:
        name: Path of the module, as in `named_modules()`.
        activation: Mean magnitude of output features; NaN if the layer did not run.
        activation_max: Largest one.
        weight: Mean magnitude of weights, as they are stored, before the update.
        weight_max: Largest one.
        update: RMS of the change of the stored weights; 0 without an update.
        relative_update: Norm of that change relative to the norm of the weights: the effective
            learning rate.
        resolution: Height of the output in pixels; 0 for layers without pixels.
    """

    name: str
    activation: float
    activation_max: float
    weight: float
    weight_max: float
    update: float
    relative_update: float
    resolution: int = 0


class Recorder:
    """Collects while a context of `record_magnitudes` lasts; `layers` holds the result after it.

    Attributes:
        layers: One entry for each layer, in the order of `named_modules()`.
    """

    def __init__(self, model: nn.Module, scales: Mapping[str, float]) -> None:
        self.layers: list[LayerMagnitudes] = []
        self._scales = scales
        self._found = {
            name: _Layer(weight)
            for name, module in model.named_modules()
            if (weight := _weight(module)) is not None
        }
        self._latest: tuple[str, Tensor] | None = None
        self._handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in model.named_modules()
            if name in self._found or _is_gain(module)
        ]

    def _hook(self, name: str) -> Any:
        def layer_ran(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            with torch.no_grad():
                layer = self._found.get(name)
                if layer is not None:
                    layer.ran(output.detach())
                    self._latest = name, output
                elif self._latest is not None and inputs and inputs[0] is self._latest[1]:
                    # A gain right behind a layer: what counts is what leaves it.
                    self._found[self._latest[0]].replace_last(output.detach())

        return layer_ran

    def _finish(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._latest = None

    def _measure(self) -> None:
        # All numbers of all layers at once: on a GPU one transfer instead of hundreds.
        with torch.no_grad():
            rows = [layer.measure() for layer in self._found.values()]
        table = torch.stack(rows).tolist() if rows else []
        for (name, layer), row in zip(self._found.items(), table, strict=True):
            scale = self._scales.get(name, 1.0)
            activation, activation_max, weight, weight_max, update, relative_update = row
            self.layers.append(
                LayerMagnitudes(
                    name=name,
                    activation=activation / scale,
                    activation_max=activation_max / scale,
                    weight=weight,
                    weight_max=weight_max,
                    update=update,
                    relative_update=relative_update,
                    resolution=layer.resolution,
                )
            )


@contextmanager
def record_magnitudes(
    model: nn.Module, scales: Mapping[str, float] | None = None
) -> Iterator[Recorder]:
    """Record every layer of a model while the context lasts.

    Put one forward pass into it, or several, whose activations are then averaged; with backward
    pass and optimiser step, updates are measured too. Weights are taken as the first forward pass
    leaves them, so that a layer that normalises its stored weights in its forward pass is charged
    for what the optimiser did alone. Recording holds a copy of all weights for that time.

    Args:
        model: Any module. Record the module itself rather than what `torch.compile` made of it,
            which may run without hooks.
        scales: Layers whose output carries a constant that belongs to what follows, by name;
            activations are divided by it.

    Yields:
        The recorder; its `layers` are filled when the context ends without an error.

    Example:
        >>> with record_magnitudes(net) as recorder:
        ...     _ = net(x)
        >>> recorder.layers[0].activation
    """
    recorder = Recorder(model, scales or {})
    try:
        yield recorder
    finally:
        recorder._finish()
    recorder._measure()


@dataclass
class _Layer:
    """What is known of a layer so far."""

    weight: Tensor
    before: Tensor | None = None
    squares: list[Tensor] = field(default_factory=list)
    resolution: int = 0

    def ran(self, output: Tensor) -> None:
        """Add the activations of one forward pass."""
        if self.before is None:
            self.before = self.weight.detach().clone()
        self.squares.append(self._mean_squares(output))
        self.resolution = output.shape[-2] if self.weight.ndim > 3 else 0

    def replace_last(self, output: Tensor) -> None:
        """Put other activations in place of those of the last forward pass."""
        self.squares[-1] = self._mean_squares(output)

    def _mean_squares(self, output: Tensor) -> Tensor:
        """Mean square of each feature, which convolutions have first and linear layers last."""
        dim = 1 if self.weight.ndim > 2 else output.ndim - 1
        others = [d for d in range(output.ndim) if d != dim]
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        return wide.square().mean(others) if others else wide.square()

    def measure(self) -> Tensor:
        """Activation mean and max, weight mean and max, update, relative update."""
        now = self.weight.detach()
        before = now if self.before is None else self.before
        weights = before.flatten(1).square().mean(1).sqrt()
        if self.squares:
            activations = torch.stack(self.squares).mean(0).sqrt().to(weights)
        else:
            activations = weights.new_full((1,), math.nan)
        change, norm = (now - before).norm(), before.norm()
        return torch.stack(
            [
                activations.mean(),
                activations.max(),
                weights.mean(),
                weights.max(),
                change / math.sqrt(now.numel()),
                # A layer that starts from zero has no relative update.
                torch.where(norm > 0, change / norm, torch.nan),
            ]
        ).float()


def _weight(module: nn.Module) -> Tensor | None:
    """The weight of a layer: its own parameter of two dimensions or more, if it has one."""
    own = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
    return max(own, key=Tensor.numel) if own else None


def _is_gain(module: nn.Module) -> bool:
    """Whether a module multiplies by one learned scalar."""
    own = list(module.parameters(recurse=False))
    return len(own) == 1 and own[0].ndim == 0
