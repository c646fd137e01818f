"""Small real training runs of different kinds: seconds each, the same weights every time.

Data comes with this repository (the digits) or with Python itself (the text of its language
reference), so that nothing is downloaded. Training is single-threaded: the order of sums, and with
it the last bit of the weights, then does not depend on the number of cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from reference_model import build_model
from reference_model.data import load_dataset
from reference_model.encoders import encode_pixels
from reference_model.loss import EDM2Loss

CONTEXT = 32  # bytes that the language models see


class Task(Protocol):
    """A model with data to train it on, and other data to judge it by."""

    model: nn.Module

    def loss(self, generator: torch.Generator) -> Tensor:
        """Mean loss of one random batch of training data."""

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Mean loss on held-out data, and the model's outputs there; always the same data."""


class Classification:
    """Which digit is it? Cross-entropy; outputs are logits."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.images, self.labels = _digits("train")
        self.others = _digits("held_out")

    def loss(self, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.images), (self.batch_size,), generator=generator)
        return F.cross_entropy(self.model(self.images[chosen]), self.labels[chosen])

    def held_out(self) -> tuple[Tensor, Tensor]:
        images, labels = self.others
        outputs = self.model(images)
        return F.cross_entropy(outputs, labels), outputs


class Denoising:
    """What is the digit under this noise? The loss of EDM2; outputs are denoised images.

    Args:
        model: As :class:`reference_model.loss.EDM2Loss` calls it.
        batch_size: Images of one step.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.criterion = EDM2Loss(P_mean=-1.0, P_std=1.4)
        self.images, labels = _digits("train")
        self.labels = F.one_hot(labels, 10).float()
        images, labels = _digits("held_out")
        self.others = images, F.one_hot(labels, 10).float()

    def loss(self, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.images), (self.batch_size,), generator=generator)
        return self.criterion(
            self.model, self.images[chosen], self.labels[chosen], generator
        ).mean()

    def held_out(self) -> tuple[Tensor, Tensor]:
        images, labels = self.others
        sigma = torch.logspace(-1, 1, len(images))
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        loss = self.criterion.at(self.model, images, sigma, noise, labels).mean()
        noisy = images + sigma.reshape(-1, 1, 1, 1) * noise
        return loss, self.model(noisy, sigma, labels)


class Language:
    """Which byte comes next? Cross-entropy; outputs are logits."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        text = _text()
        cut = len(text) * 9 // 10
        self.text = text[:cut]
        starts = torch.linspace(cut, len(text) - CONTEXT - 1, 128).long()
        self.others = text[starts[:, None] + torch.arange(CONTEXT + 1)]

    def loss(self, generator: torch.Generator) -> Tensor:
        last = len(self.text) - CONTEXT
        starts = torch.randint(last, (self.batch_size, 1), generator=generator)
        return self._loss(self.text[starts + torch.arange(CONTEXT + 1)])[0]

    def held_out(self) -> tuple[Tensor, Tensor]:
        return self._loss(self.others)

    def _loss(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(windows[:, :-1])  # [B, T, 128]
        return F.cross_entropy(outputs.flatten(0, 1), windows[:, 1:].flatten()), outputs


def _digits(split: str) -> tuple[Tensor, Tensor]:
    dataset = load_dataset("digits", split)  # type: ignore[arg-type]
    return encode_pixels(dataset.read()), dataset.labels


def _text() -> Tensor:
    """Python's language reference, as its ``help`` shows it: ASCII bytes, ``[700 thousand]``."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics)).encode("ascii", "replace")
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))


class SmallDenoiser(nn.Module):
    """Four convolutions between the scalings of EDM; noise level and class as channel biases."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(10 + 3, channels)
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.middle = nn.Conv2d(channels, channels, 3, padding=1)
        self.late = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor,
        return_logvar: bool = False,
        sigma_data: float = 0.5,
    ) -> Tensor | tuple[Tensor, Tensor]:
        s = sigma.reshape(-1, 1, 1, 1)
        norm = (s**2 + sigma_data**2).sqrt()
        log = sigma.log()[:, None]
        embedding = self.embed(torch.cat([class_labels, log, log.sin(), log.cos()], 1))
        h = F.silu(self.first(x / norm) + embedding[:, :, None, None])
        h = h + F.silu(self.middle(h))
        h = h + F.silu(self.late(h))
        denoised = x * (sigma_data / norm) ** 2 + self.last(h) * (s * sigma_data / norm)
        return (denoised, torch.zeros_like(s)) if return_logvar else denoised


class Attention(nn.Module):
    """A transformer over tokens ``[B, T]`` (bytes) or ``[B, T, patch]``, pre-norm.

    Args:
        tokens: Number of tokens.
        inputs: Width of a patch, or None for bytes.
        width: Of the residual stream.
        depth: Number of blocks.
        outputs: Logits; for bytes one set for each token, else one set for their mean.
    """

    def __init__(self, tokens: int, inputs: int | None, width: int, depth: int, outputs: int):
        super().__init__()
        self.causal = inputs is None
        self.embed = nn.Embedding(128, width) if inputs is None else nn.Linear(inputs, width)
        self.place = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 3 * width),
                    "down": nn.Linear(3 * width, width),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if not self.causal:  # images [B, 1, 8, 8] as sixteen patches of 2×2
            x = F.unfold(x, 2, stride=2).mT
        h = self.embed(x) + self.place
        for block in self.blocks:
            q, k, v = (
                a.unflatten(-1, (2, -1)).transpose(1, 2)
                for a in block["qkv"](block["norm1"](h)).chunk(3, -1)
            )
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            h = h + block["out"](mixed.transpose(1, 2).flatten(2))
            h = h + block["down"](F.gelu(block["up"](block["norm2"](h))))
        h = self.norm(h)
        return self.head(h if self.causal else h.mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def _config_g() -> nn.Module:
    return build_model(
        "G",
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(),
        logvar_channels=16,
    )


Rate = Callable[[float], float]
"""Learning rate relative to its peak, as a function of the fraction of training in (0, 1]."""


def constant(p: float) -> float:
    return 1.0


def inverse_sqrt(p: float) -> float:
    """Ramp-up, plateau, then 1/√t: that of EDM2 (Eq. 67)."""
    return min(p / 0.02, 1) / math.sqrt(max(p / 0.05, 1))


def cosine(p: float) -> float:
    return min(p / 0.02, 1) * 0.5 * (1 + math.cos(math.pi * p))


def warmup_stable_decay(p: float) -> float:
    return min(p / 0.05, 1) * min((1 - p) / 0.25, 1)


def one_cycle(p: float) -> float:
    """Smooth rise over 30 %, smooth fall to almost nothing."""
    if p < 0.3:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * p / 0.3))
    return 1e-3 + 0.5 * (1 + math.cos(math.pi * (p - 0.3) / 0.7))


def warm_restarts(p: float) -> float:
    """Five cosines, each from the full rate to almost nothing."""
    return 0.5 * (1 + math.cos(math.pi * ((5 * p) % 1))) if p < 1 else 0.0


@dataclass(frozen=True)
class TrainingRun:
    """One run: what is trained, and how.

    Attributes:
        name: For tables and files.
        task: Makes the task; initial weights come from torch's global generator.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        learning_rate: At its peak.
        rate: Its course.
        steps: Number of updates.
    """

    name: str
    task: Callable[[], Task]
    optimizer: str
    learning_rate: float
    rate: Rate
    steps: int

    def make(self) -> Task:
        """The task with its initial weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.task()

    def train(self) -> Iterator[tuple[int, Task]]:
        """Number of updates so far and the task, from 1 on; its model changes in place."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            task = self.make()
            generator = torch.Generator().manual_seed(1)
            optimizer = self._optimizer(task.model)
            for step in range(1, self.steps + 1):
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * self.rate(step / self.steps)
                optimizer.zero_grad()
                task.loss(generator).backward()
                optimizer.step()
                yield step, task
        finally:
            torch.set_num_threads(threads)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        decay = {"weight_decay": 0.05} if self.optimizer == "adamw" else {}
        return kind(model.parameters(), lr=0.0, betas=(0.9, 0.99), **decay)


def flat_weights(model: nn.Module) -> NDArray[np.float64]:
    """All parameters in the model's order, as one float64 vector."""
    return np.concatenate(
        [p.detach().numpy().ravel() for p in model.parameters()], dtype=np.float64
    )


RUNS = {
    run.name: run
    for run in (
        TrainingRun(
            "denoiser-adam-invsqrt",
            lambda: Denoising(SmallDenoiser(24), 32),
            "adam", 5e-3, inverse_sqrt, 3072,
        ),
        TrainingRun(
            "denoiser-adam-cosine",
            lambda: Denoising(SmallDenoiser(24), 32),
            "adam", 5e-3, cosine, 3072,
        ),
        TrainingRun(
            "configG-adam-invsqrt",
            lambda: Denoising(_config_g(), 32),
            "adam", 2e-2, inverse_sqrt, 1536,
        ),
        TrainingRun(
            "mlp-sgd-constant",
            lambda: Classification(_mlp(), 32),
            "sgd", 0.02, constant, 4096,
        ),
        TrainingRun(
            "mlp-adam-onecycle",
            lambda: Classification(_mlp(), 64),
            "adam", 3e-3, one_cycle, 4032,
        ),
        TrainingRun(
            "convnet-sgd-restarts",
            lambda: Classification(_convnet(), 32),
            "sgd", 0.03, warm_restarts, 3200,
        ),
        TrainingRun(
            "vit-adamw-wsd",
            lambda: Classification(Attention(16, 4, 32, 2, 10), 32),
            "adamw", 2e-3, warmup_stable_decay, 2560,
        ),
        TrainingRun(
            "bytes-adamw-onecycle",
            lambda: Language(Attention(CONTEXT, None, 32, 2, 128), 16),
            "adamw", 4e-3, one_cycle, 2560,
        ),
        TrainingRun(
            "bytes-adam-restarts",
            lambda: Language(Attention(CONTEXT, None, 32, 1, 128), 16),
            "adam", 4e-3, warm_restarts, 3072,
        ),
        TrainingRun(
            "bytes-adamw-constant",
            lambda: Language(Attention(CONTEXT, None, 32, 1, 128), 16),
            "adamw", 2e-3, constant, 2560,
        ),
    )
}  # fmt: skip
