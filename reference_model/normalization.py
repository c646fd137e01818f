"""Normalisation to unit root mean square: of pixels, of weights, and of attention's inputs.

Source: Karras et al. 2024, arXiv:2312.02696, Eq. 30, Eq. 59 and Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Keeps all-zero slices finite (Algorithm 1).
EPS = 1e-4


def root_mean_square(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """√(mean of squares) over `dim`, which stays with size one; in float32 at least.

    Squares of half-precision numbers overflow, hence the wider type.
    """
    norm_dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=norm_dtype)
    return norm.mul_(math.sqrt(norm.numel() / x.numel()))


def normalize(
    x: Tensor, dim: int | Sequence[int], *, rms: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """Divide by the root mean square over `dim`, so that what remains has RMS one.

    `EPS` is added to the RMS itself, not under the root (Algorithm 1, where Eq. 30 puts it
    inside; they differ for tiny inputs only).

    Args:
        x: Tensor of any shape and floating dtype.
        dim: Dimensions that share one norm: 1 for pixel normalisation of `[B, C, H, W]`.
        rms: `root_mean_square(x, dim)`, where it is known already.
        factor: RMS of the result, in place of one.

    Returns:
        Tensor of the same shape and dtype.

    Source:
        arXiv:2312.02696, Eq. 30 and Algorithm 1.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Normalize.apply(x, dim, rms, factor)
    return _scaled(x, dim, rms, factor)[0]


def _scaled(
    x: Tensor, dim: int | Sequence[int], rms: Tensor | None, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, the RMS, and what `x` was multiplied by."""
    if rms is None:
        rms = root_mean_square(x, dim)
    scale = factor * (rms + EPS).reciprocal()
    return x * scale.to(x.dtype), rms, scale


class _Normalize(torch.autograd.Function):
    """y = factor · x / (RMS + EPS), with a gradient that costs three passes instead of nine.

    Autograd would differentiate the norm step by step. In closed form, over each slice of N
    entries, ∇x = factor / (RMS + EPS) · ∇y − y · (Σ ∇y·y / N) / (factor · RMS).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int | Sequence[int], rms: Tensor | None, factor: float
    ) -> Tensor:
        y, rms, scale = _scaled(x, dim, rms, factor)
        ctx.save_for_backward(y, rms, scale)
        ctx.dim, ctx.factor = dim, factor
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, rms, scale = ctx.saved_tensors
        along = (grad.to(rms.dtype) * y).mean(ctx.dim, keepdim=True)
        # Where all entries are zero, so is their mean: any divisor does.
        along /= rms.clamp_min(torch.finfo(rms.dtype).tiny)
        grad = grad * scale.to(grad.dtype)
        return grad.addcmul_(y, along.to(y.dtype), value=-1 / ctx.factor), None, None, None
