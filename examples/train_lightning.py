"""PyTorch Lightning: a callback tracks, validates with averages, and resumes.

python examples/train_lightning.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch

from posthoc_ema import reconstruct
from posthoc_ema.integrations.lightning import EMACallback


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        self.net = torch.nn.Sequential(linear(4, 64), torch.nn.SiLU(), linear(64, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-2)


def data(rows, noise, batch_size):
    x = torch.randn(rows, 4)
    y = torch.sin(2 * x).sum(1, keepdim=True) + noise * torch.randn(rows, 1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size)


def main(folder):
    torch.manual_seed(0)
    module, train, valid = Regression(), data(6400, 1.0, 32), data(2048, 0.0, 2048)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"default_root_dir": folder, "accelerator": "cpu", **quiet}
    for epochs in (3, 6):  # interrupted after three, and resumed
        ema = EMACallback(snapshots=Path(folder, "ema"), every=50, validate_with=0.10)
        last = Path(folder, "last.ckpt")
        trainer = pl.Trainer(max_epochs=epochs, callbacks=[ema], **options)
        trainer.fit(module, train, valid, ckpt_path=last if last.exists() else None)
        trainer.save_checkpoint(last)
        print(f"loss of the average in memory: {trainer.callback_metrics['loss']:.4f}")

    losses = {}
    for sigma_rel in (None, 0.05, 0.10, 0.15):
        if sigma_rel is not None:
            module.load_state_dict(reconstruct(Path(folder, "ema"), sigma_rel).state_dict())
        losses[sigma_rel] = pl.Trainer(**options).validate(module, valid, verbose=False)[0]["loss"]
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
