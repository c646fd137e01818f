"""What the network of each rung of the ladder is made of: a table, each row a change of the last.

The wiring (`unet`) is common to all, training is in `ladder`. Source throughout: Karras et al.
2024, arXiv:2312.02696, Table 1, Sec. 2 and App. B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reference_model.blocks import (
    MPAttention,
    MPDecoderBlock,
    MPEmbedding,
    MPEncoderBlock,
    MPOutput,
    MPResidual,
)
from reference_model.group_norm_blocks import (
    GroupNormBlock,
    GroupNormOutput,
    GroupNormResidual,
    SoftmaxAttention,
)
from reference_model.layers import (
    Conv,
    GroupNorm,
    GroupScale,
    Sinusoid,
    normal_init,
    scale_and_shift,
    scale_only,
    zero_init,
)
from reference_model.mp_layers import (
    SILU_MAGNITUDE,
    Gain,
    MPConv,
    MPFourier,
    mp_cat,
    mp_sum_weights,
)
from reference_model.normalization import normalize
from reference_model.unit_blocks import (
    UnitAttention,
    UnitDecoderBlock,
    UnitEmbedding,
    UnitEncoderBlock,
    UnitOutput,
    UnitResidual,
)
from reference_model.unit_scaling import UnitConv, descend, unit_cat

if TYPE_CHECKING:
    from reference_model.configs import NetworkConfig


def one_layer(conv: Callable[..., nn.Module], inputs: int, outputs: int) -> nn.Module:
    """Embed noise features by one linear layer."""
    return conv(inputs, outputs, kernel=())


def two_layers(conv: Callable[..., nn.Module], inputs: int, outputs: int) -> nn.Module:
    """Embed noise features by two linear layers with a SiLU between."""
    return nn.Sequential(
        conv(inputs, outputs, kernel=()), nn.SiLU(), conv(outputs, outputs, kernel=())
    )


def plain_sum_weights(t: float) -> tuple[float, float]:
    """Weights of the summands of a plain sum, which knows no balance."""
    return 1.0, 1.0


def plain_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate channels as they are."""
    return torch.cat([a, b], dim=1)


def pixel_norm(x: Tensor) -> Tensor:
    """Give the channels of each pixel the RMS one (Eq. 30)."""
    return normalize(x, dim=1)


def identity(x: Tensor) -> Tensor:
    """Leave out what stands here otherwise."""
    return x


def go_on(x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
    """Pass an encoder's output and the embedding on as they are."""
    return x, emb


PlainFourier = partial(MPFourier, amplitude=1.0)
"""Noise features of configs C to F: cosines as they are."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """Components in which the rungs of the ladder differ.

    Attributes:
        conv: Convolutions and linear layers, but for the next two.
        last_conv: The layer that ends a residual branch or attention of A to E, or the network.
        label_conv: Embedding of the class.
        noise_features: Noise level to features.
        noise_layers: Features to embedding.
        class_scale: Whether one-hot classes are scaled to unit mean square.
        embedding: Noise level and class to a vector.
        ones_channel: Whether the image gets a further channel of ones.
        encoder_block: Block of the encoder.
        decoder_block: Block of the decoder.
        residual: Residual branch of both.
        attention: Self-attention in blocks.
        output: What follows the last decoder block.
        norm: Normalisation of groups of channels.
        modulation: How the embedding acts on the residual branch of A to E.
        modulation_width: Numbers it takes for each channel.
        pixel_norm: Normalisation at the start of encoder blocks of F and G.
        sum_weights: Weights of main path and branch, from their balance.
        cat: Joins the main path with a skip connection.
        descend: What an encoder's output and the embedding pass on the way that the skip
            connection bridges.
        silu_magnitude: What SiLU is divided by.
        emb_gain: Scales the embedding's action on a block of F and G.
        output_gain: Scales the output of F and G.
        uncertainty: Whether the loss is weighted by a learned uncertainty u(σ).
        logvar_features: Noise level to the features of u(σ).
    """

    conv: Callable[..., nn.Module]
    last_conv: Callable[..., nn.Module]
    label_conv: Callable[..., nn.Module]
    noise_features: Callable[[int], nn.Module]
    noise_layers: Callable[..., nn.Module] = two_layers
    class_scale: bool = False
    embedding: type[nn.Module] = MPEmbedding
    ones_channel: bool = False
    encoder_block: type[nn.Module] = GroupNormBlock
    decoder_block: type[nn.Module] = GroupNormBlock
    residual: type[nn.Module] = GroupNormResidual
    attention: type[nn.Module] = SoftmaxAttention
    output: type[nn.Module] = GroupNormOutput
    norm: type[nn.Module] = GroupNorm
    modulation: Callable[[Tensor, Tensor], Tensor] = scale_and_shift
    modulation_width: int = 2
    pixel_norm: Callable[[Tensor], Tensor] = identity
    sum_weights: Callable[[float], tuple[float, float]] = plain_sum_weights
    cat: Callable[..., Tensor] = plain_cat
    descend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = go_on
    silu_magnitude: float = 1.0
    emb_gain: type[nn.Module] = nn.Identity
    output_gain: type[nn.Module] = nn.Identity
    uncertainty: bool = False
    logvar_features: Callable[[int], nn.Module] = PlainFourier


def _layers(conv: Callable[..., nn.Module]) -> dict[str, Any]:
    """The same kind of layer everywhere, as from config C on."""
    return {"conv": conv, "last_conv": conv, "label_conv": conv}


# EDM's ADM network: biases, and idle branches at first.
A = Rung(
    conv=partial(Conv, bias=True),
    last_conv=partial(Conv, bias=True, init=zero_init),
    label_conv=partial(Conv, init=normal_init),
    noise_features=Sinusoid,
)

# Minor improvements: of the network, the uncertainty (and, in `ladder`, less attention).
B = replace(A, uncertainty=True)

# Architectural streamlining: no biases, no means, one init; bounded attention.
C = replace(
    B,
    **_layers(Conv),
    noise_features=PlainFourier,
    class_scale=True,
    ones_channel=True,
    attention=MPAttention,
    norm=GroupScale,
    modulation=scale_only,
    modulation_width=1,
)

# Magnitude-preserving learned layers: weights are normalised at use.
D = replace(C, **_layers(partial(MPConv, forced=False)))

# Control effective learning rate: what is stored is normalised too (and, in `ladder`, decay).
E = replace(D, **_layers(MPConv))

# Remove group normalizations: pixel norm at the start of encoder blocks takes their place.
F = replace(
    E,
    noise_layers=one_layer,
    encoder_block=MPEncoderBlock,
    decoder_block=MPDecoderBlock,
    residual=MPResidual,
    output=MPOutput,
    pixel_norm=pixel_norm,
)

# Magnitude-preserving fixed-function layers: everything between the learned ones.
G = replace(
    F,
    noise_features=MPFourier,
    sum_weights=mp_sum_weights,
    cat=mp_cat,
    silu_magnitude=SILU_MAGNITUDE,
    emb_gain=Gain,
    output_gain=Gain,
    logvar_features=MPFourier,
)

# Beside the ladder: G with static factors in place of everything that normalises.
U = replace(
    G,
    **_layers(UnitConv),
    embedding=UnitEmbedding,
    encoder_block=UnitEncoderBlock,
    decoder_block=UnitDecoderBlock,
    residual=UnitResidual,
    attention=UnitAttention,
    output=UnitOutput,
    pixel_norm=identity,
    cat=unit_cat,
    descend=descend,
    emb_gain=nn.Identity,
    output_gain=nn.Identity,
)

RUNGS = {"A": A, "B": B, "C": C, "D": D, "E": E, "F": F, "G": G, "U": U}
"""The networks of Table 1, and the unit-scaled one beside them."""


def _but(**changes: Any) -> Callable[[Rung], Rung]:
    return lambda rung: replace(rung, **changes)


def _but_layers(**switches: bool) -> Callable[[Rung], Rung]:
    return lambda rung: replace(rung, **_layers(partial(rung.conv, **switches)))


LEAVE_OUT: dict[str, Callable[[Rung], Rung]] = {
    "uncertainty": _but(uncertainty=False),
    "ones_channel": _but(ones_channel=False),
    "class_scale": _but(class_scale=False),
    "weight_norm": _but_layers(normalized=False),
    "forced_norm": _but_layers(forced=False),
    "pixel_norm": _but(pixel_norm=identity),
    "mp_fourier": _but(noise_features=PlainFourier, logvar_features=PlainFourier),
    "mp_silu": _but(silu_magnitude=1.0),
    "mp_sum": _but(sum_weights=plain_sum_weights),
    "mp_cat": _but(cat=plain_cat),
    "emb_gain": _but(emb_gain=nn.Identity),
    "output_gain": _but(output_gain=nn.Identity),
}
"""What a rung becomes without one of its ingredients (`ladder.INGREDIENTS`)."""


def rung_of(config: NetworkConfig) -> Rung:
    """The rung that a network is built from, without the ingredients that it leaves out."""
    rung = RUNGS[config.config]
    for name in config.leave_out:
        rung = LEAVE_OUT[name](rung)
    return rung
