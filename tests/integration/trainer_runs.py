"""A tiny language model and a Trainer around it; imported inside tests (slow)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from loop_averages import snapshot_of
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

logging.set_verbosity_error()


class History(TrainerCallback):
    """The weights after each optimiser step, and what evaluation saw."""

    def __init__(self) -> None:
        self.weights: dict[float, Any] = {}
        self.evaluated: list[tuple[int, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = snapshot_of(kwargs["model"])

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append((state.global_step, snapshot_of(kwargs["model"])))


def tiny_gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            n_positions=8,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def data(rows: int = 48) -> list[dict[str, Any]]:
    tokens = torch.randint(32, (rows, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_trainer(folder: Path, *callbacks: Any, model: Any = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "learning_rate": 1e-2,
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=0,
        dataloader_pin_memory=False,
        **{**defaults, **options},
    )
    return Trainer(
        model=model if model is not None else tiny_gpt2(),
        args=arguments,
        train_dataset=data(),
        eval_dataset=data(8),
        callbacks=list(callbacks),
    )
