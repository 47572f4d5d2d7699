"""Fake quantization with learned ranges (LSQ, LSQ+), and rounding with one dynamic range per group.

A quantizer rounds to the integers that a kernel stores and multiplies back. Gradients pass straight through
where nothing is clipped, and also reach the range. Ranges are learned as logarithms, so a step is relative.

Shapes: R rows, J columns, G groups of g = J / G columns, B matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from farthing_lab.train.functional import Routing, plain_product

# Rounding of inputs with one dynamic range per group of columns, as a kernel computes it.
#
# The scale of every row and group is clip * amax / top, with a learned clip.
#
# The range follows the largest value of the group, so that value's gradient includes the rounding errors
# of the whole group: a layer learns to shrink values that make the others coarse.
#
# Shapes: R rows, J columns in groups of g.

TINY = 1e-12


def _round_groups(x: Tensor, clip: Tensor, group: int, high: int) -> Tensor:
    groups = x.unflatten(-1, (-1, group)).float()
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(TINY) * (clip / high)
    rounded: Tensor = (groups / scale).round().clamp(-high, high) * scale
    return rounded.flatten(-2).to(x.dtype)


def _group_gradients(grad: Tensor, x: Tensor, clip: Tensor, group: int, high: int) -> tuple[Tensor, Tensor]:
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
        return _round_groups(x, clip, group, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip = ctx.saved_tensors
        group, high = ctx.sizes
        dx, d_clip = _group_gradients(grad, x, clip, group, high)
        # LSQ's factor keeps a range's gradient as large as a weight's, which matters for norm clipping.
        factor = (x.numel() * high) ** -0.5
        return dx, d_clip * factor, None, None


def round_groups(x: Tensor, clip: Tensor, group: int, high: int) -> Tensor:
    """x [R, J] -> integers in [-high, high] times clip * amax / high of each group, in x's dtype.

    Differentiable in x and the scalar clip, whose gradient includes LSQ's factor.
    """
    out: Tensor = _RoundGroups.apply(x, clip, group, high)  # type: ignore[no-untyped-call]
    return out


Kind = Literal["tensor", "group"]
Tap = Callable[[Tensor, list[int], Routing | None], None]  # rounded inputs, rows per matrix, routing


def _round(
    x: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    v = (x if offset is None else x - offset) / scale
    out = v.round().clamp_(low, high) * scale
    return (out if offset is None else out.add_(offset)).to(dtype)


def _gradients(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, scale and offset, without LSQ's factor."""
    v = (x if offset is None else x - offset) / scale
    inside = (v >= low) & (v <= high)
    dx = grad * inside
    # d/ds of s * clamp(round(x / s)): q - v where x moves with s, the edge q where it is clipped.
    q = v.round().clamp_(low, high)
    d_scale = _sum_to(grad * torch.where(inside, q - v, q), scale.shape)
    return dx.to(x.dtype), d_scale, None if offset is None else _sum_to(grad - dx, offset.shape)


_rounding: tuple[Any, Any] = (_round, _gradients)


def compile_rounding() -> None:
    """Compile rounding into one pass over memory each for forward and backward; pays for large activations.

    TorchInductor takes half a minute; on a CPU it needs a C++ compiler.
    """
    global _rounding
    torch._dynamo.config.recompile_limit = 64  # size-1 dimensions and layouts are compiled separately
    _rounding = tuple(torch.compile(f, dynamic=True) for f in (_round, _gradients))  # type: ignore[assignment]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.ends = low, high
        out: Tensor = _rounding[0](x, scale, offset, low, high, dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset = ctx.saved_tensors
        dx, d_scale, d_offset = _rounding[1](grad, x, scale, offset, *ctx.ends)
        # LSQ's factor keeps a range's gradient as large as a weight's, which matters for norm clipping.
        factor = (x.numel() / scale.numel() * ctx.ends[1]) ** -0.5
        return dx, d_scale * factor, None if d_offset is None else d_offset * factor, None, None, None


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum x over the dimensions that `shape` broadcasts along, in float32."""
    dims = [i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1]
    return x.sum(dims, keepdim=True, dtype=torch.float32) if dims else x.float()


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: int,
    high: int,
    offset: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """clamp(round((x - offset) / scale), low, high) * scale + offset in `dtype`; differentiable.

    scale and offset are float32, have x's number of dimensions and broadcast to x. x, scale and offset get
    gradients; those of scale and offset include LSQ's factor 1 / sqrt(elements per scale * high).
    """
    out: Tensor = _FakeQuantize.apply(x, scale, offset, low, high, dtype)  # type: ignore[no-untyped-call]
    return out


@dataclasses.dataclass(frozen=True)
class Precision:
    """Bits of weights and activations of one stage of quantization-aware training; 16 means not rounded."""

    weights: int
    activations: int

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            if getattr(self, name) not in (4, 8, 16):
                raise ValueError(f"{name}: got {getattr(self, name)} bits; expected 4, 8 or 16")

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"


def top(bits: int) -> int:
    """The largest integer of a symmetric range."""
    return (1 << (bits - 1)) - 1


class WeightQuantizer(nn.Module):
    """One learned scale for `group` columns of every row of w [B, R, J], rounded to 4 or 8 bits.

    With `block` = (r, c), `keep` [B, R / r, J / c] holds 1 for blocks that are kept and 0 for zero blocks.
    """

    keep: Tensor | None

    def __init__(self, shape: torch.Size, group: int, block: tuple[int, int] | None = None) -> None:
        super().__init__()
        keep = None
        if block is not None:
            if shape[1] % block[0] or shape[2] % block[1]:
                raise ValueError(
                    f"blocks of {block[0]}x{block[1]} do not tile a matrix of {tuple(shape[1:])}"
                )
            keep = torch.ones(shape[0], shape[1] // block[0], shape[2] // block[1])
        self.register_buffer("keep", keep)
        b, rows, columns = shape
        self.group = group if columns % group == 0 else columns
        self.bits = 16
        self.log_scale = nn.Parameter(torch.zeros(b, rows, columns // self.group, 1))

    @property
    def low(self) -> int:
        """The smallest integer: -8 for int4; int8 is symmetric, like the kernels' formats."""
        return -8 if self.bits == 4 else -127

    @torch.no_grad()
    def start(self, w: Tensor, bits: int) -> None:
        """Set the bits, and the scales with the least squared error among a few shrinks of the range."""
        self.bits = bits
        if bits == 16:
            return
        groups = self.pruned(w).unflatten(-1, (-1, self.group))
        full = (groups.abs().amax(-1, keepdim=True) / (7.5 if bits == 4 else 127)).clamp_min(TINY)
        best, least = full.clone(), torch.full_like(full, torch.inf)
        for factor in (1.0, 0.94, 0.88, 0.82, 0.76, 0.7) if bits == 4 else (1.0,):
            s = full * factor
            error = (
                ((groups / s).round().clamp(self.low, top(bits)) * s - groups).square().sum(-1, keepdim=True)
            )
            best, least = torch.where(error < least, s, best), torch.minimum(error, least)
        self.log_scale.copy_(best.log())

    def pruned(self, w: Tensor) -> Tensor:
        """w [B, R, J] without its zero blocks."""
        if self.keep is None:
            return w
        b, rows, columns = self.keep.shape
        blocks = w.view(b, rows, w.shape[1] // rows, columns, w.shape[2] // columns)
        return (blocks * self.keep[:, :, None, :, None]).view(w.shape)

    def forward(self, w: Tensor) -> Tensor:
        """w [B, R, J] -> w rounded to the grid."""
        w = self.pruned(w)
        if self.bits == 16:
            return w
        groups = w.unflatten(-1, (-1, self.group))
        return fake_quantize(groups, self.log_scale.exp(), self.low, top(self.bits)).flatten(-2)

    @torch.no_grad()
    def integers(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(q int8 [B, R, J], scale float32 [B, R, J / group]) of `forward`'s result."""
        s = self.log_scale.exp()
        q = (self.pruned(w).unflatten(-1, (-1, self.group)) / s).round().clamp(self.low, top(self.bits))
        return q.flatten(-2).to(torch.int8), s.squeeze(-1)


class ActivationQuantizer(nn.Module):
    """Rounds x [R, J] to `bits`, in one of two ways.

    "group": a dynamic range for every `group` columns of a row (`lsq.py`), with a learned clip.
    "tensor": LSQ+, with one learned scale for all of x and, if `offset`, one learned offset, for inputs made
    one-sided by a SiLU or ReLU.
    """

    def __init__(self, kind: Kind = "group", group: int = 64, offset: bool = False) -> None:
        super().__init__()
        self.kind, self.group, self.bits = kind, group, 16
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.zeros(())) if offset and kind == "tensor" else None
        self.started = False

    def start(self, bits: int) -> None:
        """Set the bits; ranges are initialized from the first input."""
        self.bits, self.started = bits, False

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        self.started = True
        if self.kind == "group":
            self.log_scale.fill_(0.0)
            return
        x = x.float()
        shift = x.mean() if self.offset is not None else x.new_zeros(())
        spread = (x - shift).std().clamp_min(TINY)
        # LSQ+ starts at the multiple of the standard deviation with the least squared error.
        trials = [spread * m / top(self.bits) for m in (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0)]
        sample = (x - shift).flatten()[:: max(1, x.numel() // 65536)]
        low, high = self.integers_range
        errors = [((sample / s).round().clamp(low, high) * s - sample).square().mean() for s in trials]
        self.log_scale.copy_(trials[int(torch.stack(errors).argmin())].log())
        if self.offset is not None:
            self.offset.copy_(shift)

    @property
    def integers_range(self) -> tuple[int, int]:
        """(smallest, largest) integer."""
        return -top(self.bits) - (self.kind == "tensor"), top(self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """x [R, J] -> x rounded to the grid."""
        if self.bits == 16:
            return x
        if not self.started:
            self._begin(x)
        low, high = self.integers_range
        if self.kind == "tensor":
            scale = self.log_scale.exp().view(1, 1)
            offset = None if self.offset is None else self.offset.view(1, 1)
            return fake_quantize(x, scale, low, high, offset).to(x.dtype)
        group = self.group if x.shape[-1] % self.group == 0 else x.shape[-1]
        return round_groups(x, self.log_scale.exp(), group, high)


class QuantizedProduct(nn.Module):
    """A `Product` that rounds input and weights first: one projection, or all experts of a layer."""

    def __init__(
        self, weight: Tensor, group: int = 64, kind: Kind = "group", offset: bool = False,
        block: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight_quantizer = WeightQuantizer(weight.shape, group, block)
        self.input_quantizer = ActivationQuantizer(kind, group, offset)
        self.tap: Tap | None = None

    def start(self, weight: Tensor, precision: Precision) -> None:
        """Start a stage: set its bits and fit the ranges to the current weights."""
        if self.weight_quantizer.bits != precision.weights:
            self.weight_quantizer.start(weight, precision.weights)
        if self.input_quantizer.bits != precision.activations:
            self.input_quantizer.start(precision.activations)

    def resume(self, precision: Precision) -> None:
        """Resume a stage whose ranges are already loaded."""
        self.weight_quantizer.bits = precision.weights
        self.input_quantizer.bits, self.input_quantizer.started = precision.activations, True

    def forward(self, x: Tensor, w: Tensor, sizes: list[int], routing: Routing | None = None) -> Tensor:
        """See `farthing_lab.train.grouped.Product`."""
        x = self.input_quantizer(x)
        if self.tap is not None:
            self.tap(x, sizes, routing)
        return plain_product(x, self.weight_quantizer(w), sizes, routing)
