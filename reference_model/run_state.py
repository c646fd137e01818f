"""The state of a training run, taken for a checkpoint and put back from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from posthoc_ema import EMA
from reference_model.checkpoint_shards import like
from reference_model.parallel import Alone
from reference_model.stats import Window


@dataclass
class RunState:
    """All that changes while a run trains.

    Attributes:
        model: The network, and how processes share it.
        optimizer: Its optimiser.
        ema: Averages that snapshots are written of.
        direct: Averages that are kept in checkpoints only, if any.
        window: Sums for the next line of statistics.
        nimg: Images seen.
        seconds: Time spent on them.
    """

    model: Alone
    optimizer: torch.optim.Optimizer
    ema: EMA
    direct: EMA | None
    window: Window
    nimg: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return numbers, strings and tensors, those of sharded models as they are sharded.

        All processes must take part.
        """
        loss, bad = float(self.window.loss), float(self.window.bad_gradients)
        [loss] = self.model.processes.total([loss])
        [bad] = self.model.total([bad])
        names = {p: name for name, p in self.model.net.named_parameters()}
        return {
            "nimg": self.nimg,
            "seconds": self.seconds,
            "net": self.model.net.state_dict(),
            "optimizer": {"state": {names[p]: dict(s) for p, s in self.optimizer.state.items()}},
            "ema": self.ema.state_dict(),
            "direct": None if self.direct is None else self.direct.state_dict(),
            "window": {"steps": self.window.steps, "loss": loss, "bad_gradients": int(bad)},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_dict` returned, in as many processes as there may be now."""
        net = self.model.net
        tensors = net.state_dict()
        net.load_state_dict({k: like(v, tensors.get(k)) for k, v in state["net"].items()})
        _load_optimizer(self.optimizer, net, state["optimizer"]["state"])
        parameters = dict(net.named_parameters())
        for ema, held in ((self.ema, state["ema"]), (self.direct, state["direct"])):
            if ema is not None:
                averages = [
                    {name: like(value, parameters.get(name)) for name, value in track.items()}
                    for track in held["averages"]
                ]
                ema.load_state_dict({**held, "averages": averages})
        self.nimg, self.seconds = state["nimg"], state["seconds"]
        # Earlier versions began a new window with each start.
        window = state.get("window", {"steps": 0, "loss": 0.0, "bad_gradients": 0})
        nothing = {**window, "loss": 0.0, "bad_gradients": 0}
        self.window.load(window if self.model.processes.is_first else nothing)


def make_optimizer(net: nn.Module, betas: tuple[float, float]) -> torch.optim.Adam:
    """Make the optimiser of a run.

    Single numbers have a group of their own: of a sharded model they alone are not sharded, and
    a group is updated as one.

    Args:
        net: The network, divided among processes if it is to be.
        betas: Decay rates of Adam's moments.
    """
    groups = [
        [p for p in net.parameters() if p.ndim > 0],
        [p for p in net.parameters() if p.ndim == 0],
    ]
    return torch.optim.Adam(
        [{"params": group} for group in groups if group], lr=0.0, betas=betas, fused=True
    )


def _load_optimizer(
    optimizer: torch.optim.Optimizer, net: nn.Module, state: Mapping[Any, Any]
) -> None:
    parameters = dict(net.named_parameters())
    names = list(parameters)
    # Earlier versions kept parameters by number.
    by_name = {names[key] if isinstance(key, int) else key: of for key, of in state.items()}
    own = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {p: i for i, p in enumerate(order)}
    own["state"] = {
        numbers[parameters[name]]: {
            key: value if key == "step" else like(value, parameters[name])
            for key, value in of.items()
        }
        for name, of in by_name.items()
    }
    optimizer.load_state_dict(own)
