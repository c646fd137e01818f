"""The paper's ladder of seven configs: names, habits of training, and ingredients to leave out.

What their networks are made of is in `rungs`. Nothing here imports torch.

Source: Karras et al. 2024, arXiv:2312.02696, Table 1, Sec. 2 and App. B. What the paper does
not state is marked; `docs/ladder.md` says why each such choice was made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reference_model.configs import TrainConfig

LADDER = {
    "A": "EDM baseline",
    "B": "minor improvements",
    "C": "architectural streamlining",
    "D": "magnitude-preserving learned layers",
    "E": "control effective learning rate",
    "F": "remove group normalizations",
    "G": "magnitude-preserving fixed-function layers",
}
"""The seven configs of Table 1."""

UNIT_SCALING = "U"
"""Beside the ladder: G's network with unit scaling in place of normalisation."""

CONFIGS = (*LADDER, UNIT_SCALING)
"""Every config that can be built and trained."""

CLASSICAL_SIGMA_REL = 0.0629
"""EMA length of a classical EMA whose half-life is 5 % of the training so far (γ + 1 = 20 ln 2)."""


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How a config is trained, relative to config G on the same data.

    Attributes:
        batch: Batch size, in multiples of G's.
        lr: Learning rate before decay, in multiples of G's.
        lr_decay: Whether the learning rate falls as 1/√step.
        betas: Decay rates of Adam's moments.
        loss_scaling: Factor of the loss.
        noise: Mean and standard deviation of ln σ; `None` for those that suit the data.
        dropout: Dropout probability; `None` for that of G at this size.
        clip_act: Bound on activations.
        attn_resolutions: Where blocks attend, at a resolution of 64.
        more_sigma_rel: EMA lengths to track beside G's.
    """

    batch: float = 1.0
    lr: float
    lr_decay: bool = False
    betas: tuple[float, float] = (0.9, 0.99)
    loss_scaling: float
    noise: tuple[float, float] | None = None
    dropout: float | None = 0.1
    clip_act: float | None
    attn_resolutions: tuple[int, ...] = (16, 8)
    more_sigma_rel: tuple[float, ...] = ()


A = Habits(
    batch=2.0,
    lr=0.01,
    betas=(0.9, 0.999),
    loss_scaling=100.0,
    noise=(-1.2, 1.2),
    clip_act=None,  # not stated: their activations pass 256
    attn_resolutions=(32, 16, 8),
    more_sigma_rel=(CLASSICAL_SIGMA_REL,),
)
B = replace(
    A,
    batch=1.0,
    lr=0.02,
    betas=(0.9, 0.99),
    noise=None,
    attn_resolutions=(16, 8),
    more_sigma_rel=(),
)
C = B
D = replace(C, lr=1.0, loss_scaling=1.0, clip_act=256.0)
E = replace(D, lr_decay=True)
F = E
G = replace(F, dropout=None)

U = replace(G, clip_act=None)  # a bound would hide what is to be seen

HABITS = {"A": A, "B": B, "C": C, "D": D, "E": E, "F": F, "G": G, UNIT_SCALING: U}
"""How each config is trained."""

LR_DECAY = "lr_decay"
"""The one ingredient that is not part of the network."""

INGREDIENTS = {
    "uncertainty": ("B", "weighting of the loss by a learned uncertainty u(σ), Eq. 21"),
    "ones_channel": ("C", "channel of ones that stands in for biases"),
    "class_scale": ("C", "factor √classes that gives one-hot classes unit mean square"),
    "weight_norm": ("D", "normalisation of weights at use, Eq. 47"),
    "forced_norm": ("E", "normalisation of stored weights in training, Eq. 66"),
    LR_DECAY: ("E", "decay of the learning rate as 1/√step, Eq. 67"),
    "pixel_norm": ("F", "normalisation of pixels at the start of encoder blocks, Eq. 30"),
    "mp_fourier": ("G", "factor √2 of the noise features, Eq. 75"),
    "mp_silu": ("G", "divisor 0.596 of SiLU, Eq. 81"),
    "mp_sum": ("G", "weights of sums, Eq. 88; plain sums without"),
    "mp_cat": ("G", "weights of concatenations, Eq. 103; plain ones without"),
    "emb_gain": ("G", "learned gain of each block's embedding, zero at first; one without"),
    "output_gain": ("G", "learned gain of the output, zero at first; one without"),
}
"""What can be left out by name: the first config that has it, and what it is."""


def network_default(rung: str, field: str) -> Any:
    """Value of a network's field that follows from its rung, at the paper's size S."""
    value = getattr(HABITS[rung], field)
    return 0.0 if field == "dropout" and value is None else value


def check_leave_out(config: str, names: Iterable[str]) -> None:
    """Refuse to leave out what a config does not have.

    Args:
        config: One of `CONFIGS`.
        names: Names of ingredients.

    Raises:
        ValueError: For names that do not exist, that come later in the ladder, or that occur
            twice; for a config beside the ladder, any.
    """
    seen: set[str] = set()
    for name in names:
        if name not in INGREDIENTS:
            raise ValueError(f"leave_out must name some of {', '.join(INGREDIENTS)} (got {name!r})")
        if config not in LADDER:
            raise ValueError(f"config {config} has no ingredients to leave out (got {name!r})")
        since, _ = INGREDIENTS[name]
        if config < since:
            raise ValueError(
                f"config {config} has no {name} to leave out: that comes with config {since} "
                f"({LADDER[since]})"
            )
        if name in seen:
            raise ValueError(f"leave_out names {name} twice")
        seen.add(name)


def with_config(config: TrainConfig, rung: str) -> TrainConfig:
    """Turn a training config of G into that of another rung on the same data at the same size.

    Batch size and learning rate keep the ratios that they have in the paper; what a rung has a
    habit of its own for (loss scaling, Adam, noise levels, dropout, attention, EMA lengths) is
    replaced.

    Args:
        config: Training config with a network of config G.
        rung: One of `CONFIGS`.

    Returns:
        The config; change fields with `dataclasses.replace`.

    Raises:
        ValueError: If the network is not of config G, or there is no such rung.

    Source:
        Karras et al. 2024, arXiv:2312.02696, Table 1 and App. B.
    """
    net = config.network
    if rung not in CONFIGS:
        raise ValueError(f"config must be one of {', '.join(CONFIGS)} (got {rung!r})")
    if rung == net.config:
        return config
    if net.config != "G":
        raise ValueError(
            f"habits of config {rung} follow from those of config G, but this run has config "
            f"{net.config}; start from a preset"
        )
    habits = HABITS[rung]
    P_mean, P_std = habits.noise or (config.P_mean, config.P_std)
    network = replace(
        net,
        config=rung,
        dropout=net.dropout if habits.dropout is None else habits.dropout,
        clip_act=habits.clip_act,
        attn_resolutions=_attention(rung, net.attn_resolutions, net.img_resolution),
    )
    return replace(
        config,
        network=network,
        batch_size=round(config.batch_size * habits.batch),
        ref_lr=config.ref_lr * habits.lr,
        ref_batches=config.ref_batches if habits.lr_decay else 0,
        betas=habits.betas,
        loss_scaling=habits.loss_scaling,
        P_mean=P_mean,
        P_std=P_std,
        ema_sigma_rel=tuple(sorted({*config.ema_sigma_rel, *habits.more_sigma_rel})),
    )


def _attention(rung: str, of_g: tuple[int, ...], img_resolution: int) -> tuple[int, ...]:
    """Where a rung attends if G does at these resolutions: A at the next finer one too."""
    if len(HABITS[rung].attn_resolutions) == len(G.attn_resolutions) or not of_g:
        return of_g
    finer = 2 * max(of_g)
    return of_g if finer > img_resolution else (finer, *of_g)


def leave_out(config: TrainConfig, names: Iterable[str]) -> TrainConfig:
    """Leave ingredients out of a training config.

    Args:
        config: Training config.
        names: Some of `INGREDIENTS`.

    Returns:
        The config; learning-rate decay is left out of it, all else out of its network.

    Raises:
        ValueError: If its config does not have one of them.
    """
    names = tuple(names)
    check_leave_out(config.network.config, names)
    of_network = tuple(name for name in names if name != LR_DECAY)
    return replace(
        config,
        network=replace(config.network, leave_out=of_network),
        ref_batches=0 if LR_DECAY in names else config.ref_batches,
    )
