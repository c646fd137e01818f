"""Plain PyTorch: track, resume from a checkpoint, then choose the EMA length.

python examples/train_torch.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch

from posthoc_ema import EMA, reconstruct


def make(folder):
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=Path(folder, "ema"), every=100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return {"model": model, "optimizer": optimizer, "ema": ema}


def loss_of(model, batch, noise):
    x = torch.randn(batch, 4)
    y = torch.sin(2 * x).sum(1, keepdim=True) + noise * torch.randn(batch, 1)
    return (model(x) - y).square().mean()


def train(model, optimizer, ema):
    for _ in range(1000):
        optimizer.zero_grad()
        loss_of(model, 32, noise=1.0).backward()
        optimizer.step()
        ema.update(model)  # after each optimiser step


def main(folder):
    torch.manual_seed(0)
    parts = make(folder)
    train(**parts)
    torch.save({n: part.state_dict() for n, part in parts.items()}, Path(folder, "checkpoint.pt"))

    # Another process: the tracker goes on where it stood.
    parts = make(folder)
    for name, state in torch.load(Path(folder, "checkpoint.pt"), weights_only=True).items():
        parts[name].load_state_dict(state)
    train(**parts)

    # Any time later: every length, from the snapshots.
    model, losses = parts["model"], {}
    for sigma_rel in (None, 0.02, 0.05, 0.10, 0.15):
        if sigma_rel is not None:
            model.load_state_dict(reconstruct(Path(folder, "ema"), sigma_rel).state_dict())
        torch.manual_seed(1)
        losses[sigma_rel] = loss_of(model, 4096, noise=0.0).item()
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
