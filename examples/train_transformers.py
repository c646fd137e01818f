"""transformers.Trainer: a callback tracks, checkpoints hold the averages; a model folder results.

python examples/train_transformers.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from posthoc_ema.integrations.pretrained import save_pretrained
from posthoc_ema.integrations.transformers import EMACallback


def sentences(rows, seed):
    """Counting upwards from a random number, with every fifth token replaced by noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.randint(16, (rows, 1), generator=generator) + torch.arange(8)) % 16
    noise = torch.randint(16, tokens.shape, generator=generator)
    tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, noise, tokens)
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(folder):
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    tokens = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**size, **tokens, attn_pdrop=0.0, resid_pdrop=0.0))
    options = TrainingArguments(
        output_dir=str(Path(folder, "run")), max_steps=300, per_device_train_batch_size=8,
        learning_rate=2e-2, lr_scheduler_type="constant", save_steps=100, use_cpu=True, seed=0,
        report_to=[], disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    ema = EMACallback(sigma_rel=(0.05, 0.10), snapshots=Path(folder, "ema"), every=25)
    trainer = Trainer(model, options, train_dataset=sentences(2400, 0), callbacks=[ema])
    trainer.train()  # or train(resume_from_checkpoint=True): checkpoint-*/ema_state.safetensors

    held_out, losses = sentences(512, 1), {}
    for sigma_rel in (None, 0.05, 0.10, 0.20):
        if sigma_rel is not None:
            out = Path(folder, f"gpt2-{sigma_rel}")
            save_pretrained(Path(folder, "ema"), sigma_rel, model, out)
            trainer.model = GPT2LMHeadModel.from_pretrained(out)  # as anybody would load it
        losses[sigma_rel] = Trainer(trainer.model, options).evaluate(held_out)["eval_loss"]
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
