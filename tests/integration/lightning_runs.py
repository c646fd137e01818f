"""A small LightningModule that notes what the loop did to it; imported inside tests (slow)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from loop_averages import snapshot_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its dependencies, at import
    import lightning.pytorch as pl


class Net(pl.LightningModule):
    """Linear regression; ``history`` is what the weights were after each optimiser step."""

    def __init__(self, manual: int = 0, fail_at: Any = None, save_in_validation: Any = None):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )
        self.history: dict[float, Any] = {}
        self.validated: list[tuple[int, Any]] = []
        self.manual, self.fail_at, self.save = manual, fail_at, save_in_validation
        self.automatic_optimization = not manual

    def loss(self, batch: Any) -> Any:
        (x,) = batch
        return (self.net(x)[:, 0] - x.sum(1)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.manual:
            return self.loss(batch)
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        return None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step:
            self.history[self.trainer.global_step] = snapshot_of(self)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append((self.trainer.global_step, snapshot_of(self)))
        self.log("val", self.loss(batch))
        if self.save is not None and not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(self.save)
        if self.fail_at is not None and self.trainer.global_step >= self.fail_at[0]:
            raise self.fail_at[1]

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        if self.manual > 1:
            return [
                torch.optim.SGD(layer.parameters(), 0.05) for layer in (self.net[0], self.net[2])
            ]
        return torch.optim.Adam(self.parameters(), 0.05)


def data(rows: int = 64) -> Any:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)


def make_trainer(folder: Path, *callbacks: Any, package: Any = pl, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
    }
    return package.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{**defaults, **options},
    )


def make_net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)
