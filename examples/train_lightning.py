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
        layers = torch.nn.Linear(4, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1)
        self.net = torch.nn.Sequential(*layers)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

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
    last, options = Path(folder, "last.ckpt"), {"default_root_dir": folder, "accelerator": "cpu"}
    options |= dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    for epochs in (3, 6):  # interrupted after three, and resumed
        ema = EMACallback(snapshots=Path(folder, "ema"), every=50, validate_with=0.10)
        trainer = pl.Trainer(max_epochs=epochs, callbacks=[ema], **options)
        trainer.fit(module, train, valid, ckpt_path=last if last.exists() else None)
        trainer.save_checkpoint(last)

    losses = {}
    for sigma_rel in (None, 0.05, 0.10, 0.15):
        if sigma_rel is not None:
            module.load_state_dict(reconstruct(Path(folder, "ema"), sigma_rel).state_dict())
        losses[sigma_rel] = pl.Trainer(**options).validate(module, valid, verbose=False)[0]["loss"]
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
