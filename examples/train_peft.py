"""PEFT: train a LoRA; only the adapter is tracked, and adapters of any EMA length result.

python examples/train_peft.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from posthoc_ema import EMA
from posthoc_ema.integrations.pretrained import save_pretrained


def base_model():
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 8}
    tokens = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**size, **tokens))


def loss_of(model, rows):
    """Counting upwards from a random number, with every fifth token replaced by noise."""
    tokens = (torch.randint(16, (rows, 1)) + torch.arange(8)) % 16
    noise = torch.randint(16, tokens.shape)
    tokens = torch.where(torch.rand(tokens.shape) < 0.2, noise, tokens)
    return model(input_ids=tokens, labels=tokens).loss


def main(folder):
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc", "lm_head"], fan_in_fan_out=True)
    model = get_peft_model(base_model(), lora)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=Path(folder, "ema"), every=25)
    for _ in range(300):
        optimizer.zero_grad()
        loss_of(model, 8).backward()
        optimizer.step()
        ema.update(model)  # adapters alone, by default

    losses = {}
    for sigma_rel in (None, 0.05, 0.10, 0.20):
        loaded = model
        if sigma_rel is not None:
            out = Path(folder, f"lora-{sigma_rel}")
            save_pretrained(Path(folder, "ema"), sigma_rel, model, out)
            loaded = PeftModel.from_pretrained(base_model(), out)
        torch.manual_seed(1)
        with torch.no_grad():
            losses[sigma_rel] = float(loss_of(loaded.eval(), 512))
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
