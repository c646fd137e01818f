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
    """y = factor · x / (RMS + EPS), with a gradient that costs one to three passes, not nine.

    Autograd would differentiate the norm step by step. In closed form, over each slice of N
    entries, ∇x = scale · (∇y − y · Σ ∇y·y / norm²), where scale = factor / (RMS + EPS) and
    norm² = N · factor · scale · RMS.
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
        # Where all entries are zero, so is their sum: any divisor does.
        norm2 = (y.numel() / rms.numel() * ctx.factor) * scale * rms
        norm2.clamp_min_(torch.finfo(rms.dtype).tiny)
        if y.device.type == "cpu" and y.dtype == rms.dtype and not torch.compiler.is_compiling():
            result = _gradient_by_rows(grad, y, scale, norm2, ctx.dim)
        else:
            along = (grad.to(rms.dtype) * y).sum(ctx.dim, keepdim=True) / norm2
            result = grad.addcmul(y, along.to(y.dtype), value=-1).mul_(scale.to(grad.dtype))
        return result, None, None, None


def _gradient_by_rows(
    grad: Tensor, y: Tensor, scale: Tensor, norm2: Tensor, dim: int | Sequence[int]
) -> Tensor:
    """Compute the gradient of `_Normalize` in one pass over memory, slice by slice.

    It has the form of the gradient of w = g · v / ‖v‖, for which torch has a kernel.
    """
    slices = [d % y.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    order = [d for d in range(y.ndim) if d not in slices] + slices
    # Slices become rows; channels-last activations and weights are stored like that already.
    moved = y.permute(order)
    shape, (rows, count) = moved.shape, (norm2.numel(), y.numel() // norm2.numel())
    norm = norm2.sqrt_().permute(order).reshape(rows, 1)
    v, w = (t.reshape(rows, count).contiguous() for t in (moved, grad.permute(order)))
    g = scale.permute(order).reshape(rows, 1) * norm
    result, _ = torch.ops.aten._weight_norm_interface_backward(w, v, g, norm, 0)
    return result.view(shape).permute([order.index(d) for d in range(y.ndim)])
