"""Rounding of inputs with one dynamic range per group of columns, as a kernel computes it.

The scale of every row and group is clip * amax / top, with a learned clip.

The range follows the largest value of the group, so that value's gradient includes the rounding errors of the
whole group: a layer learns to shrink values that make the others coarse.

Shapes: R rows, J columns in groups of g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TINY = 1e-12


def _round(x: Tensor, clip: Tensor, group: int, high: int) -> Tensor:
    groups = x.unflatten(-1, (-1, group)).float()
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(TINY) * (clip / high)
    rounded: Tensor = (groups / scale).round().clamp(-high, high) * scale
    return rounded.flatten(-2).to(x.dtype)


def _gradients(grad: Tensor, x: Tensor, clip: Tensor, group: int, high: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the clip."""
    groups, dy = (t.unflatten(-1, (-1, group)).float() for t in (x, grad))
    size = groups.abs()
    amax = size.amax(-1, keepdim=True).clamp_min(TINY)
    v = groups / (amax * (clip / high))
    q = v.round().clamp(-high, high)
    inside = v.abs() <= high
    # d/ds of s * clamp(round(x / s)): q - v where x moves with s, the edge q where it is clipped.
    d_scale = (dy * torch.where(inside, q - v, q)).sum(-1, keepdim=True)
    peak = (size == amax).float()
    share = peak / peak.sum(-1, keepdim=True).clamp_min(1)
    dx = dy * inside + d_scale * (clip / high) * share * groups.sign()
    return dx.flatten(-2).to(x.dtype), (d_scale * amax).sum() / high


class _RoundGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, group: int, high: int) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.sizes = group, high
        return _round(x, clip, group, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip = ctx.saved_tensors
        group, high = ctx.sizes
        dx, d_clip = _gradients(grad, x, clip, group, high)
        # LSQ's factor keeps a range's gradient as large as a weight's, which matters for norm clipping.
        factor = (x.numel() * high) ** -0.5
        return dx, d_clip * factor, None, None


def round_groups(x: Tensor, clip: Tensor, group: int, high: int) -> Tensor:
    """x [R, J] -> integers in [-high, high] times clip * amax / high of each group, in x's dtype.

    Differentiable in x and the scalar clip, whose gradient includes LSQ's factor.
    """
    out: Tensor = _RoundGroups.apply(x, clip, group, high)  # type: ignore[no-untyped-call]
    return out
