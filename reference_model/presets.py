"""Named training configs: the embedded digits, Fashion-MNIST, and the paper's models as data."""

from __future__ import annotations

from reference_model.configs import DIGITS, FASHION_MNIST, NetworkConfig, TrainConfig
from reference_model.ladder import with_config

MI = 1 << 20
"""Images are counted in units of 2²⁰ where the paper's training lengths are given."""

# Size: model_channels, ref_lr, dropout, training length in Mi images (Table 6).
EDM2_IMG512 = {
    "xxs": (64, 0.0170, 0.0, 2048),
    "xs": (128, 0.0120, 0.0, 2048),
    "s": (192, 0.0100, 0.0, 2048),
    "m": (256, 0.0090, 0.1, 2048),
    "l": (320, 0.0080, 0.1, 1792),
    "xl": (384, 0.0070, 0.1, 1280),
    "xxl": (448, 0.0065, 0.1, 896),
}
# Not in the paper: xxs and xxl here, with what 512×512 has and half its length, as xl has.
EDM2_IMG64 = {
    "xxs": (64, 0.0170, 0.0, 1024),
    "xs": (128, 0.0120, 0.0, 1024),
    "s": (192, 0.0100, 0.0, 1024),
    "m": (256, 0.0090, 0.1, 2048),
    "l": (320, 0.0080, 0.1, 1024),
    "xl": (384, 0.0070, 0.1, 640),
    "xxl": (448, 0.0065, 0.1, 448),
}


def preset(name: str, config: str = "G") -> TrainConfig:
    """Return a training config by name.

    Args:
        name: One of `PRESETS`, which are of config G.
        config: Rung of the ladder to train instead, with its own habits (`ladder.with_config`).

    Returns:
        The config; change fields with `dataclasses.replace`.

    Raises:
        ValueError: If there is no preset or no rung of this name.

    Source:
        Karras et al. 2024, arXiv:2312.02696, Table 6, for the `edm2-` presets; Table 1 for the
        other rungs of `edm2-img512-s`.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return with_config(PRESETS[name], config)


def _edm2_img512(channels: int, ref_lr: float, dropout: float, length: int) -> TrainConfig:
    """ImageNet at 512×512 in the latent space of a VAE: 64×64×4."""
    return TrainConfig(
        network=NetworkConfig(
            img_resolution=64,
            img_channels=4,
            label_dim=1000,
            model_channels=channels,
            dropout=dropout,
            precision="float16",
        ),
        data="",
        encoder="latents",
        held_out=0,
        total_nimg=length * MI,
        ref_lr=ref_lr,
        ref_batches=70_000,
        P_mean=-0.4,
        P_std=1.0,
    )


def _edm2_img64(channels: int, ref_lr: float, dropout: float, length: int) -> TrainConfig:
    """ImageNet at 64×64 in pixels."""
    return TrainConfig(
        network=NetworkConfig(
            img_resolution=64,
            img_channels=3,
            label_dim=1000,
            model_channels=channels,
            dropout=dropout,
            precision="float16",
        ),
        data="",
        held_out=0,
        total_nimg=length * MI,
        ref_lr=ref_lr,
        ref_batches=35_000,
        P_mean=-0.8,
        P_std=1.6,
    )


def _digits(steps: int, batch_size: int, channels: int) -> TrainConfig:
    """The embedded 8×8 digits.

    The learning rate is high for a run this short: the last weights are noisy and gain much
    from averaging, as those of long runs do, so that the best EMA length lies well inside the
    range of lengths worth trying. Noise levels are spread wider than for latents, since eight
    pixels across leave little redundancy.
    """
    return TrainConfig(
        network=NetworkConfig(
            img_resolution=8,
            img_channels=1,
            label_dim=10,
            model_channels=channels,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(4,),
            channels_per_head=16,
        ),
        data=DIGITS,
        batch_size=batch_size,
        total_nimg=steps * batch_size,
        ref_lr=0.03,
        ref_batches=steps / 10,
        rampup_nimg=steps // 20 * batch_size,
        P_mean=-1.0,
        P_std=1.4,
        snapshot_nimg=max(steps // 50, 1) * batch_size,
        checkpoint_nimg=steps // 5 * batch_size,
        stats_nimg=10 * batch_size,
        magnitudes_nimg=max(steps // 50, 1) * batch_size,
    )


def _fashion(total_nimg: int, channels: int) -> TrainConfig:
    """Fashion-MNIST, 28×28 grey, as 14×14×4, for two CPU cores: 0.72 M parameters of 32 channels.

    Space-to-depth makes a step several times as fast as one of a network at 28×28. As with the
    digits, the learning rate is high and noise levels are spread wide.
    """
    return TrainConfig(
        network=NetworkConfig(
            img_resolution=14,
            img_channels=4,
            label_dim=10,
            model_channels=channels,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(7,),
            channels_per_head=32,
        ),
        data=FASHION_MNIST,
        encoder="space-to-depth",
        batch_size=128,
        total_nimg=total_nimg,
        ref_lr=0.02,
        ref_batches=total_nimg / 128 / 8,
        rampup_nimg=total_nimg // 32,
        P_mean=-1.0,
        P_std=1.4,
        snapshot_nimg=total_nimg // 32,
        checkpoint_nimg=total_nimg // 32,
        stats_nimg=total_nimg // 256,
        magnitudes_nimg=total_nimg // 64,
    )


PRESETS = {
    "digits": _digits(steps=1000, batch_size=128, channels=16),
    "digits-tiny": _digits(steps=25, batch_size=32, channels=8),
    "fashion": _fashion(total_nimg=512 * 1024, channels=32),
    "fashion-small": _fashion(total_nimg=48 * 1024, channels=16),
    **{f"edm2-img512-{size}": _edm2_img512(*row) for size, row in EDM2_IMG512.items()},
    **{f"edm2-img64-{size}": _edm2_img64(*row) for size, row in EDM2_IMG64.items()},
}
