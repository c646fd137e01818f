"""U-Net wiring shared by all rungs of the ladder; `rungs` says what each is made of.

Encoder levels run from fine to coarse; the decoder returns and takes the encoder's outputs
last in, first out. Source: Karras et al. 2024, arXiv:2312.02696, Table 1 and App. B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from reference_model.configs import NetworkConfig
    from reference_model.rungs import Rung


class UNet(nn.Module):
    """The raw network F of Eq. 4: image in, image of the same shape out.

    Args:
        config: Resolution, widths and everything else.
        rung: What the network is made of.
    """

    def __init__(self, config: NetworkConfig, rung: Rung) -> None:
        super().__init__()
        # The fastest layout for convolutions, pixel norms and attention, which all keep it.
        self.memory_format = torch.channels_last
        self.cat = rung.cat
        self.descend = rung.descend
        self.concat_balance = config.concat_balance
        self.ones_channel = rung.ones_channel
        self.embedding = rung.embedding(config, rung)

        levels = [
            (config.img_resolution >> level, config.model_channels * mult)
            for level, mult in enumerate(config.channel_mult)
        ]

        self.enc = nn.ModuleDict()
        resolution, channels = levels[0]
        # One channel more than the image: a constant one stands in for biases.
        self.enc[f"{resolution}x{resolution}_conv"] = rung.conv(
            config.img_channels + rung.ones_channel, channels, kernel=(3, 3)
        )
        skips = [channels]
        for level, (resolution, level_channels) in enumerate(levels):
            name, attention = f"{resolution}x{resolution}", resolution in config.attn_resolutions
            if level > 0:
                self.enc[f"{name}_down"] = rung.encoder_block(
                    channels, channels, config, rung, attention=False, down=True
                )
                skips.append(channels)
            for i in range(config.num_blocks):
                self.enc[f"{name}_block{i}"] = rung.encoder_block(
                    channels, level_channels, config, rung, attention=attention
                )
                channels = level_channels
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, (resolution, level_channels) in reversed(list(enumerate(levels))):
            name, attention = f"{resolution}x{resolution}", resolution in config.attn_resolutions
            if level == len(levels) - 1:
                # The bottleneck attends at any resolution.
                for bottleneck, attends in (("in0", True), ("in1", False)):
                    self.dec[f"{name}_{bottleneck}"] = rung.decoder_block(
                        channels, channels, config, rung, attention=attends
                    )
            else:
                self.dec[f"{name}_up"] = rung.decoder_block(
                    channels, channels, config, rung, attention=False, up=True
                )
            for i in range(config.num_blocks + 1):
                self.dec[f"{name}_block{i}"] = rung.decoder_block(
                    channels,
                    level_channels,
                    config,
                    rung,
                    attention=attention,
                    skip_channels=skips.pop(),
                )
                channels = level_channels
        self.out = rung.output(channels, config.img_channels, rung)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        """Evaluate F.

        Args:
            x: Scaled noisy images, `[B, C, H, W]`.
            c_noise: Noise level as the network sees it, `[B]`.
            class_labels: One-hot, `[B, label_dim]`, or `None`.

        Returns:
            `[B, C, H, W]`.
        """
        emb = self.embedding(c_noise, class_labels)
        if self.ones_channel:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = x.contiguous(memory_format=self.memory_format)
        stem, *blocks = self.enc.values()
        x = stem(x)
        skips = [(x, emb)]
        for block in blocks:
            x, emb = self.descend(x, emb)
            x = block(x, emb)
            skips.append((x, emb))
        x, emb = self.descend(x, emb)
        for block in self.dec.values():
            if block.skip_channels:
                skip, emb = skips.pop()
                x = self.cat(x, skip, t=self.concat_balance)
            x = block(x, emb)
        return self.out(x)
