"""Every choice of a run as data: the network, the training, and presets by name.

Nothing here imports torch, so that the command line can show all options at once. Each field
carries its own help, which `python -m reference_model train --help` prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from reference_model.ladder import (
    CONFIGS,
    INGREDIENTS,
    LR_DECAY,
    check_leave_out,
    network_default,
)

DIGITS = "digits"
"""The data set that is built in."""

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts its files."""

HELD_OUT = 0.25
"""Part of a data set that is kept apart to measure on, unless another is asked for."""

PRECISIONS = ("float32", "float16", "bfloat16")
"""Types of activations; weights, embedding, norms and loss are float32 with each."""

PARALLEL = ("ddp", "fsdp")
"""Ways for several processes to share a model: a copy in each, or a shard in each."""


LONGEST_SIGMA_REL = 12**-0.5
"""EMA length of the mean over all of training; no power function is longer."""


BY_CONFIG: Any = object()
"""Default of fields whose value follows from the rung of the ladder."""


def option(help: str, **default: Any) -> Any:
    """Declare a dataclass field with its help text for the command line."""
    return field(metadata={"help": help}, **default)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Shape and constants of the denoiser, by their EDM2 names."""

    config: str = option(
        "Rung of the paper's ladder, A to G; or U, G with unit scaling.", default="G"
    )
    img_resolution: int = option("Height and width of the images, in pixels.")
    img_channels: int = option("Channels of the images.")
    label_dim: int = option("Number of classes; 0 for an unconditional network.", default=0)
    model_channels: int = option("Channels at the finest level.", default=192)
    channel_mult: tuple[int, ...] = option(
        "Channels of each level, finest first, in multiples of model_channels.",
        default=(1, 2, 3, 4),
    )
    channel_mult_noise: int | None = option(
        "Width of the noise features, in multiples of model_channels; none: the finest level's.",
        default=None,
    )
    channel_mult_emb: int | None = option(
        "Width of the embedding, in multiples of model_channels; none: the widest level's.",
        default=None,
    )
    num_blocks: int = option("Encoder blocks of each level; the decoder has one more.", default=3)
    attn_resolutions: tuple[int, ...] = option(
        "Resolutions (of a level, in pixels) at which blocks attend; left out: 16,8, and for "
        "config A 32,16,8.",
        default=BY_CONFIG,
    )
    channels_per_head: int = option("Channels of one attention head.", default=64)
    dropout: float = option(
        "Dropout probability in residual branches; left out: 0.1, and for G and U 0.",
        default=BY_CONFIG,
    )
    label_balance: float = option("Share of the class in the embedding of G, 0 to 1.", default=0.5)
    concat_balance: float = option("Share of skip connections in G, 0 to 1.", default=0.5)
    res_balance: float = option("Share of residual branches in G, 0 to 1.", default=0.3)
    attn_balance: float = option("Share of attention in G, 0 to 1.", default=0.3)
    clip_act: float | None = option(
        "Bound on activations; none: unbounded; left out: 256, and for A to C and U none.",
        default=BY_CONFIG,
    )
    sigma_data: float = option("Standard deviation of the data.", default=0.5)
    logvar_channels: int = option("Noise features of the uncertainty head.", default=128)
    precision: str = option(
        "Type of activations on GPUs: float32, float16 or bfloat16. CPUs compute in float32.",
        default="float32",
    )
    leave_out: tuple[str, ...] = option(
        "Ingredients of the config to leave out: " + ", ".join(INGREDIENTS) + ".", default=()
    )

    def __post_init__(self) -> None:
        if self.config not in CONFIGS:
            raise ValueError(f"config must be one of {', '.join(CONFIGS)} (got {self.config!r})")
        for name in ("attn_resolutions", "dropout", "clip_act"):
            if getattr(self, name) is BY_CONFIG:
                object.__setattr__(self, name, network_default(self.config, name))
        for name in ("channel_mult", "attn_resolutions", "leave_out"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_leave_out(self.config, self.leave_out)
        if LR_DECAY in self.leave_out:
            raise ValueError(
                f"{LR_DECAY} is no part of the network: set ref_batches=0 of the training config"
            )
        _at_least(
            1,
            self,
            *("img_resolution", "img_channels", "model_channels", "num_blocks"),
            *("channels_per_head", "logvar_channels"),
        )
        _at_least(0, self, "label_dim")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(
                f"channel_mult must name levels of 1 or more (got {self.channel_mult})"
            )
        for name in ("sigma_data", "clip_act"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive (got {value})")
        halvings = len(self.channel_mult) - 1
        if self.img_resolution % 2**halvings:
            raise ValueError(
                f"img_resolution {self.img_resolution} cannot be halved {halvings} times; pad "
                f"the images to a multiple of {2**halvings} or give channel_mult fewer levels "
                f"(got {self.channel_mult})"
            )
        for mult in self.channel_mult:
            self.num_heads(self.model_channels * mult)
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1] (got {getattr(self, name)})")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)} (got {self.precision!r})"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1) (got {self.dropout})")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of an image as the network takes it: `(C, H, W)`."""
        return self.img_channels, self.img_resolution, self.img_resolution

    @property
    def noise_channels(self) -> int:
        """Width of the noise features."""
        return self.model_channels * (self.channel_mult_noise or self.channel_mult[0])

    @property
    def emb_channels(self) -> int:
        """Width of the embedding."""
        return self.model_channels * (self.channel_mult_emb or max(self.channel_mult))

    def num_heads(self, channels: int) -> int:
        """Attention heads at a level of this many channels; one where it is too narrow for more.

        Raises:
            ValueError: If the heads would have unequal widths.
        """
        heads = max(1, channels // self.channels_per_head)
        if channels % heads:
            raise ValueError(
                f"a level of {channels} channels cannot be split into {heads} equal heads of "
                f"about channels_per_head={self.channels_per_head}; choose a channels_per_head "
                f"that divides {channels}"
            )
        return heads


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a training run: equal configs give equal weights."""

    network: NetworkConfig
    data: str = option(
        "Data set: 'digits', which is built in, or the path of a folder or ZIP of images (or "
        "latents), of MNIST-like IDX files, or of NPZ or NPY arrays.",
        default=DIGITS,
    )
    held_out: float = option(
        "Fraction of each class to measure on instead of training; sets with a test set use that; "
        "0: measure on the training images.",
        default=HELD_OUT,
    )
    encoder: str = option(
        "How images become network input: rgb, space-to-depth (2×2 pixels as channels) or latents.",
        default="rgb",
    )
    vae: str = option(
        "Folder of the autoencoder that turns latents into pixels; training goes without.",
        default="",
    )
    seed: int = option("Seed of all random numbers.", default=0)
    batch_size: int = option("Images of one step.", default=2048)
    total_nimg: int = option("Length of training, in images.", default=2048 << 20)
    ref_lr: float = option("Highest learning rate.", default=0.01)
    ref_batches: float = option(
        "Steps after which the learning rate falls as 1/√step; 0: never.", default=70_000
    )
    rampup_nimg: int = option("Linear learning-rate ramp-up, in images.", default=10_000_000)
    betas: tuple[float, float] = option("Decay rates of Adam's moments.", default=(0.9, 0.99))
    loss_scaling: float = option("Factor of the loss, against fp16 underflow.", default=1.0)
    P_mean: float = option("Mean of the log noise level in training.", default=-0.4)
    P_std: float = option("Standard deviation of the log noise level.", default=1.0)
    ema_sigma_rel: tuple[float, ...] = option(
        "EMA lengths to track, as fractions of training.", default=(0.05, 0.10)
    )
    direct_sigma_rel: tuple[float, ...] = option(
        "EMA lengths to keep in the checkpoint too, to check reconstructions against.",
        default=(),
    )
    snapshot_nimg: int = option("Interval of EMA snapshots, in images.", default=8 << 20)
    checkpoint_nimg: int = option("Interval of checkpoints, in images.", default=128 << 20)
    stats_nimg: int = option("Interval of lines in stats.jsonl, in images.", default=128 << 10)
    magnitudes_nimg: int = option(
        "Interval at which magnitudes of activations, weights and updates are recorded in "
        "magnitudes.jsonl, in images; 0: never.",
        default=4 << 20,
    )

    def __post_init__(self) -> None:
        for name in ("betas", "ema_sigma_rel", "direct_sigma_rel"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        intervals = ("snapshot_nimg", "checkpoint_nimg", "stats_nimg")
        _at_least(1, self, "batch_size", "total_nimg", *intervals)
        _at_least(0, self, "magnitudes_nimg", "rampup_nimg", "ref_batches", "P_std", "seed")
        for name in ("ref_lr", "loss_scaling"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive (got {getattr(self, name)})")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1) (got {self.betas})")
        if not self.ema_sigma_rel:
            raise ValueError("ema_sigma_rel must name at least one EMA length")
        check_lengths(self.ema_sigma_rel)
        check_lengths(self.direct_sigma_rel)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, as `config.json` holds them."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Rebuild what `to_dict` wrote.

        Raises:
            ValueError: For fields that do not exist, as another version may have written.
        """
        values = dict(values)
        network = dict(values.pop("network"))
        for kind, given in ((cls, values), (NetworkConfig, network)):
            unknown = set(given) - {f.name for f in fields(kind)}
            if unknown:
                raise ValueError(
                    f"unknown {kind.__name__} fields {sorted(unknown)}; "
                    "written by another version of this package?"
                )
        return cls(network=NetworkConfig(**network), **values)


def check_lengths(sigma_rels: Iterable[float]) -> None:
    """Refuse EMA lengths that no power function has.

    Raises:
        ValueError: If one is not in (0, `LONGEST_SIGMA_REL`].
    """
    for length in sigma_rels:
        if not 0 < length <= LONGEST_SIGMA_REL:
            raise ValueError(f"EMA lengths must lie in (0, {LONGEST_SIGMA_REL:.4f}] (got {length})")


def _at_least(least: int, config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:  # NaN is refused too
            raise ValueError(f"{name} must be at least {least} (got {getattr(config, name)})")


def _plain(value: Any) -> Any:
    """Turn tuples into lists at every depth, as a round trip through JSON does."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
