"""Plain PyTorch: track, resume from a checkpoint, then choose the EMA length.

python examples/train_torch.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch

from posthoc_ema import EMA, predict_error, reconstruct


def make():
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def loss_of(model, batch, noise):
    x = torch.randn(batch, 4)
    truth = torch.sin(2 * x).sum(1, keepdim=True)
    return (model(x) - truth - noise * torch.randn(batch, 1)).square().mean()


def train(model, optimizer, ema, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, 32, noise=1.0).backward()
        optimizer.step()
        ema.update(model)  # after each optimiser step


def main(folder):
    torch.manual_seed(0)
    model, optimizer = make()
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=Path(folder, "ema"), every=100)
    train(model, optimizer, ema, 1000)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**states, "ema": ema.state_dict()}, Path(folder, "checkpoint.pt"))

    # Another process: the tracker goes on where it stood.
    model, optimizer = make()
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=Path(folder, "ema"), every=100)
    checkpoint = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
    for part, name in ((model, "model"), (optimizer, "optimizer"), (ema, "ema")):
        part.load_state_dict(checkpoint[name])
    train(model, optimizer, ema, 1000)

    # Any time later: every length, from the snapshots.
    losses = {}
    for sigma_rel in (None, 0.02, 0.05, 0.10, 0.15):
        if sigma_rel is not None:
            model.load_state_dict(reconstruct(Path(folder, "ema"), sigma_rel).state_dict())
        with torch.no_grad():
            torch.manual_seed(1)
            losses[sigma_rel] = float(loss_of(model, 4096, noise=0.0))
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    print(f"predicted error at 0.07: {predict_error(Path(folder, 'ema'), 0.07):.1e}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
