"""accelerate and diffusers: EMAModel in a loop like those of the official scripts.

python examples/train_diffusers.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel

from posthoc_ema.integrations.diffusers import EMAModel
from posthoc_ema.integrations.pretrained import save_pretrained


def loss_of(unet, scheduler, rows):
    images = torch.ones(rows, 1, 8, 8) * torch.sign(torch.randn(rows, 1, 1, 1))
    noise, t = torch.randn_like(images), torch.randint(1000, (rows,))
    return (unet(scheduler.add_noise(images, noise, t), t).sample - noise).square().mean()


def main(folder):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, layers_per_block=1,
    )  # fmt: skip
    ema = EMAModel(unet, sigma_rel=(0.05, 0.10), snapshots=Path(folder, "ema"), every=20)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=4e-3)
    scheduler = DDPMScheduler()
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(ema)
    for _ in range(400):
        with accelerator.accumulate(unet):
            accelerator.backward(loss_of(unet, scheduler, 8))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(unet.parameters())
    accelerator.save_state(str(Path(folder, "checkpoint")))  # the averages too

    model, losses = accelerator.unwrap_model(unet), {}
    for sigma_rel in (None, 0.05, 0.10, 0.20):
        if sigma_rel is not None:
            out = Path(folder, f"unet-{sigma_rel}")
            save_pretrained(Path(folder, "ema"), sigma_rel, accelerator.unwrap_model(unet), out)
            model = UNet2DModel.from_pretrained(out)  # as any pipeline would load it
        torch.manual_seed(1)
        with torch.no_grad():
            losses[sigma_rel] = float(loss_of(model, scheduler, 1024))
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
