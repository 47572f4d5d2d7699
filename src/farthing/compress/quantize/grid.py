"""Quantization grids of a matrix: scales and zero points.

Legend: B matrices at once; N rows; K columns; G groups of g = K / G columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farthing.ops.weights import Weight, pack_int4

TINY = 1e-30  # smallest scale, for rows of zeros: no scale is ever zero


@dataclass(frozen=True, slots=True)
class Grid:
    """value = (q - zero) * scale with integer q in [low, high]."""

    scale: Tensor  # [B, N, G]
    zero: Tensor | None  # [B, N, G], integers
    low: int
    high: int

    def expand(self, columns: int) -> tuple[Tensor, Tensor | None]:
        """scale and zero point of every column, [B, N, K]."""
        return _spread(self.scale, columns), None if self.zero is None else _spread(self.zero, columns)

    def round(self, w: Tensor) -> Tensor:
        """The nearest values of the grid, [B, N, K]."""
        return snap(w, *self.expand(w.shape[-1]), self.low, self.high)

    def integers(self, value: Tensor) -> Tensor:
        """q of values on the grid, int8 [B, N, K]."""
        scale, zero = self.expand(value.shape[-1])
        q = value / scale if zero is None else value / scale + zero
        return q.round().clamp(self.low, self.high).to(torch.int8)

    def weights(self, value: Tensor) -> list[Weight]:
        """The B matrices in storage format: int4 for 4 bits, int8 for 8."""
        q = self.integers(value)
        if self.high > 7:
            return [Weight("int8", q[b], self.scale[b].contiguous()) for b in range(len(q))]
        zeros = [
            None if self.zero is None else z.to(torch.int8)
            for z in (self.zero if self.zero is not None else q)
        ]
        return [Weight("int4", pack_int4(q[b]), self.scale[b].contiguous(), zeros[b]) for b in range(len(q))]


def _spread(x: Tensor, columns: int) -> Tensor:
    """[B, N, G] -> [B, N, K]; a view if a group is a whole row."""
    groups = x.shape[-1]
    return x.expand(-1, -1, columns) if groups == 1 else x.repeat_interleave(columns // groups, -1)


def snap(w: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    """Round to (q - zero) * scale."""
    if zero is None:
        return (w / scale).round_().clamp_(low, high).mul_(scale)
    return (w / scale + zero).round_().clamp_(low, high).sub_(zero).mul_(scale)


def int8_grid(w: Tensor, energy: Tensor | None = None) -> Grid:
    """One symmetric scale per row of w [B, N, K].

    With `energy` [B, K] = E[x^2], the range may shrink below the maximum if that lowers the row's expected
    squared output error (assuming uncorrelated columns).
    """
    amax = w.abs().amax(-1, keepdim=True)
    scale = amax.clamp_min(127 * TINY) / 127
    if energy is None:
        return Grid(scale, None, -127, 127)
    return Grid(_shrink(w, scale, None, energy, -127, 127, (1.0, 0.93, 0.86, 0.8)), None, -127, 127)


def int4_grid(
    w: Tensor,
    group: int,
    energy: Tensor | None = None,
    symmetric: bool = True,
    gram: Tensor | None = None,
) -> Grid:
    """One scale (and zero point) per `group` columns of w [B, N, K]; ranges shrink as in `int8_grid`.

    With `gram` [B, K, K] the error includes correlations within a group (AWQ's search for a clip). Symmetric
    ranges use all of [-8, 7]: the largest magnitude maps to -8 or to 7.5, whichever has less error.
    """
    b, n, k = w.shape
    if k % group:
        raise ValueError(f"group size {group} does not divide K = {k}; expected a divisor such as 32")
    blocks = w.view(b, n, k // group, group)
    if energy is None:
        energy = torch.ones(b, k)
    if not symmetric:
        low = blocks.amin(-1).clamp_max(0)
        high = blocks.amax(-1).clamp_min(0)
        scale = ((high - low) / 15).clamp_min(TINY)
        zero = (-8 - low / scale).round().clamp(-8, 7)
        return Grid(_shrink(w, scale, zero, energy, -8, 7, _SHRINKS, gram), zero, -8, 7)
    scale = (blocks.abs().amax(-1) / 7.5).clamp_min(TINY)
    return Grid(_shrink(w, scale, None, energy, -8, 7, (7.5 / 7, *_SHRINKS), gram), None, -8, 7)


_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6)


def _shrink(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    energy: Tensor,
    low: int,
    high: int,
    factors: tuple[float, ...],
    gram: Tensor | None = None,
) -> Tensor:
    """The multiple of `scale` [B, N, G] with the least energy-weighted rounding error, group by group."""
    b, n, k = w.shape
    groups = scale.shape[-1]
    weight = energy.view(b, 1, k)
    own = None if gram is None else _diagonal_blocks(gram, groups)
    best = scale
    least = torch.full_like(scale, torch.inf)
    for factor in factors:
        trial = Grid(scale * factor, zero, low, high)
        delta = (trial.round(w) - w).view(b, n, groups, -1)
        if own is None:
            error = (delta.square_() * weight.view(b, 1, groups, -1)).sum(-1)
        else:
            error = (torch.einsum("bngi,bgij->bngj", delta, own) * delta).sum(-1)
        better = error < least
        best, least = torch.where(better, trial.scale, best), torch.where(better, error, least)
    return best


def _diagonal_blocks(gram: Tensor, groups: int) -> Tensor:
    """[B, K, K] -> [B, G, g, g]: second moments within each group."""
    b, k, _ = gram.shape
    g = k // groups
    return gram.view(b, groups, g, groups, g).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
