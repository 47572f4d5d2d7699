"""Quantization of a matrix: grids, FP8 blocks, scaling, rotation, the column sweep of GPTQ and SparseGPT."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farthing.checkpoint.compressed_tensors import stored_scale
from farthing.checkpoint.floats import quantize_blocks
from farthing.compress import native
from farthing.compress.native import fast_bfloat16
from farthing.ops.weights import CODES, Format, Weight, pack_int4


def quantize_fp8(w: Tensor, name: str = "weight", ue8m0: bool = False) -> Weight:
    """w [N, K] -> e4m3 with one float32 scale per block; the last blocks may be ragged.

    Raises ValueError with the tensor's name for NaN, infinity or a value out of float32 range.

    FP8 blocks 128x128 (DeepSeek-V3 section 3.3) that cannot overflow.
    """
    if not bool(w.float().isfinite().all()):
        raise ValueError(f"{name} has NaN or infinity; expected finite numbers")
    data, scale = quantize_blocks(w, ue8m0=ue8m0)
    return Weight("fp8", data, scale)


TINY = 1e-30  # smallest scale, for rows of zeros: no scale is ever zero


@dataclass(frozen=True, slots=True)
class Grid:
    """value = (q - zero) * scale with integer q in [low, high], or q * scale with q one of CODES.

    Legend: B matrices at once; N rows; K columns; G groups of g = K / G columns.
    """

    scale: Tensor  # [B, N, G]
    zero: Tensor | None = None  # [B, N, G], integers
    low: int = CODES[0]
    high: int = CODES[-1]
    fitted: bool = False  # q is one of CODES

    @property
    def levels(self) -> native.Levels:
        """What q may be."""
        return self.low, self.high, self.fitted

    def rows(self, index: slice) -> Grid:
        """That of some rows."""
        zero = None if self.zero is None else self.zero[:, index]
        return replace(self, scale=self.scale[:, index], zero=zero)

    def expand(self, columns: int) -> tuple[Tensor, Tensor | None]:
        """scale and zero point of every column, [B, N, K]."""
        return _spread(self.scale, columns), None if self.zero is None else _spread(self.zero, columns)

    def round(self, w: Tensor) -> Tensor:
        """The nearest values of the grid, [B, N, K]."""
        return self.snap(w, *self.expand(w.shape[-1]))

    def snap(self, w: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest values for these scales and zero points."""
        if self.fitted:
            return _nearest_codes(w / scale).mul_(scale)
        if zero is None:
            return (w / scale).round_().clamp_(self.low, self.high).mul_(scale)
        return (w / scale + zero).round_().clamp_(self.low, self.high).sub_(zero).mul_(scale)

    def integers(self, value: Tensor) -> Tensor:
        """q of values on the grid, int8 [B, N, K]."""
        scale, zero = self.expand(value.shape[-1])
        q = value / scale if zero is None else value / scale + zero
        return q.round().clamp(self.low, self.high).to(torch.int8)

    def weights(self, value: Tensor) -> list[Weight]:
        """The B matrices in storage format: int4 or nl4 for 4 bits, q5_0 for 5, int8 for 8."""
        q = self.integers(value)
        if self.fitted:
            u = _INDEX.index_select(0, q.view(torch.uint8).int().flatten()).view_as(q)
            return [Weight("nl4", pack_int4(u[b]), self.scale[b].contiguous()) for b in range(len(q))]
        if self.high > 7:
            wide: Format = "q5_0" if self.high == 15 else "int8"
            return [Weight(wide, q[b], self.scale[b].contiguous()) for b in range(len(q))]
        zeros = [
            None if self.zero is None else z.to(torch.int8)
            for z in (self.zero if self.zero is not None else q)
        ]
        return [Weight("int4", pack_int4(q[b]), self.scale[b].contiguous(), zeros[b]) for b in range(len(q))]


# The nearest code of every half: thresholds between codes are whole multiples of it.
_HALVES = 256
_NEAREST = torch.tensor(
    [min(CODES, key=lambda code: abs(code - (i - _HALVES + 0.5) / 2)) for i in range(2 * _HALVES)],
    dtype=torch.float32,
)


# The place of every code, minus 8, by its byte.
_INDEX = torch.zeros(256, dtype=torch.int8)
_INDEX[torch.tensor(CODES) % 256] = torch.arange(-8, 8, dtype=torch.int8)


def _nearest_codes(x: Tensor) -> Tensor:
    """The nearest of CODES."""
    return torch.take(_NEAREST, x.mul(2).add_(_HALVES).clamp_(0, 2 * _HALVES - 1).long())


def _spread(x: Tensor, columns: int) -> Tensor:
    """[B, N, G] -> [B, N, K]; a view if a group is a whole row."""
    groups = x.shape[-1]
    return x.expand(-1, -1, columns) if groups == 1 else x.repeat_interleave(columns // groups, -1)


def int8_grid(w: Tensor, energy: Tensor | None = None) -> Grid:
    """One symmetric scale per row of w [B, N, K].

    With `energy` [B, K] = E[x^2], the range may shrink below the maximum if that lowers the row's expected
    squared output error (assuming uncorrelated columns).
    """
    amax = w.abs().amax(-1, keepdim=True)
    scale = amax.clamp_min(127 * TINY) / 127
    if energy is None:
        return Grid(scale, None, -127, 127)
    return _shrink(w, Grid(scale, None, -127, 127), energy, (1.0, 0.93, 0.86, 0.8))


def even_grid(
    w: Tensor,
    group: int,
    energy: Tensor | None = None,
    symmetric: bool = True,
    gram: Tensor | None = None,
    bits: int = 4,
) -> Grid:
    """One scale (and zero point) per `group` columns of w [B, N, K]; ranges shrink as in `int8_grid`.

    With `gram` [B, K, K] the error includes correlations within a group (AWQ's search for a clip). Symmetric
    ranges use all of [-8, 7]: the largest magnitude maps to -8 or to 7.5, whichever has less error; so do
    those of 5 bits.
    """
    blocks, energy = _blocks(w, group, energy)
    if not symmetric:
        low = blocks.amin(-1).clamp_max(0)
        high = blocks.amax(-1).clamp_min(0)
        scale = ((high - low) / 15).clamp_min(TINY)
        zero = (-8 - low / scale).round().clamp(-8, 7)
        return _in_16_bits(_shrink(w, Grid(scale, zero, -8, 7), energy, _SHRINKS, gram))
    top = (1 << bits - 1) - 1
    scale = (blocks.abs().amax(-1) / (top + 0.5)).clamp_min(TINY)
    found = _shrink(w, Grid(scale, None, -top - 1, top), energy, ((top + 0.5) / top, *_SHRINKS), gram)
    return _in_16_bits(found)


def _in_16_bits(grid: Grid) -> Grid:
    """The grid with scales that float16 holds, unless one is too small or too large for it."""
    half = grid.scale.half()
    held = bool(((half >= torch.finfo(torch.float16).tiny) & half.isfinite()).all())
    return replace(grid, scale=half.float()) if held else grid


def fitted_grid(w: Tensor, group: int, energy: Tensor | None = None) -> Grid:
    """The values of CODES with one scale of 16 bits per `group` columns of w [B, N, K].

    Scales have both signs, because CODES reach further on one side.
    """
    blocks, energy = _blocks(w, group, energy)
    scale = (blocks.abs().amax(-1) / CODES[-1]).clamp_min(TINY)
    shares = [share * sign for sign in (1, -1) for share in _SHARES]
    found = _shrink(w, Grid(scale, fitted=True), energy, tuple(shares))
    return replace(found, scale=stored_scale(found.scale))


_SHARES = (1.0, 0.92, 0.85, 0.78, 0.7)  # of the largest magnitude, which become the largest code


def _blocks(w: Tensor, group: int, energy: Tensor | None) -> tuple[Tensor, Tensor]:
    """w as groups [B, N, G, g], and the energy of its columns, [B, K]."""
    b, n, k = w.shape
    if k % group:
        raise ValueError(f"group size {group} does not divide K = {k}; expected a divisor such as 32")
    return w.view(b, n, k // group, group), torch.ones(b, k) if energy is None else energy


_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6)


def _shrink(
    w: Tensor, grid: Grid, energy: Tensor, factors: tuple[float, ...], gram: Tensor | None = None
) -> Grid:
    """The grid with the multiples of its scales that have the least energy-weighted rounding error, group by
    group."""
    b, n, k = w.shape
    columns = k // grid.scale.shape[-1]
    if gram is None and grid.zero is None and native.runs(w[..., :columns]):
        return replace(grid, scale=native.search_ranges(w, grid.scale, grid.levels, energy, factors))
    rows = max(1, _AT_ONCE // (b * k))
    if n > rows:
        parts = [
            _shrink(w[:, at : at + rows], grid.rows(slice(at, at + rows)), energy, factors, gram).scale
            for at in range(0, n, rows)
        ]
        return replace(grid, scale=torch.cat(parts, 1))
    groups = grid.scale.shape[-1]
    blocks, weight = w.reshape(b, n, groups, -1), energy.reshape(b, 1, groups, -1)
    zero = None if grid.zero is None else grid.zero.unsqueeze(-1)
    own = None if gram is None else _diagonal_blocks(gram, groups)
    best = grid.scale
    least = torch.full_like(best, torch.inf)
    for factor in factors:
        scale = grid.scale * factor
        delta = grid.snap(blocks, scale.unsqueeze(-1), zero).sub_(blocks)
        if own is None:
            error = delta.square_().mul_(weight).sum(-1)
        else:
            error = (torch.einsum("bngi,bgij->bngj", delta, own) * delta).sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return replace(grid, scale=best)


_AT_ONCE = 1 << 16  # numbers whose errors are compared at once: they stay in L2


def _diagonal_blocks(gram: Tensor, groups: int) -> Tensor:
    """[B, K, K] -> [B, G, g, g]: second moments within each group."""
    b, k, _ = gram.shape
    g = k // groups
    return gram.view(b, groups, g, groups, g).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()


# Round or prune column by column, letting the remaining columns compensate for the error.
#
# GPTQ (Frantar et al. 2022, algorithm 1) and SparseGPT (Frantar and Alistarh 2023) in one: a column's new
# value is its grid point, zero where masked, or itself. B matrices of one shape are processed at once.
#
# With H = U D U^T, U upper triangular with a unit diagonal, the best column after earlier errors E is w_k
# + sum over i < k of E_i U_ik (Chee et al. 2023: LDLQ, which is GPTQ), so nothing is inverted; and the
# error of the outputs under H is the sum over k of D_k |that column - its new value|^2. Legend: B
# matrices; N rows; K columns.

BLOCK = 64  # columns between products with all earlier errors


@dataclass(frozen=True, slots=True)
class Feedback:
    """Second moments of the inputs, factored in the order in which their columns are processed."""

    order: Tensor  # [B, K] int64
    lower: Tensor  # [B, K, K] float32, U^T
    pivots: Tensor  # [B, K] float32, D
    damping: Tensor  # [B], what was added to the diagonal

    @classmethod
    def of(cls, gram: Tensor, act_order: bool = True, damp: float = 0.01) -> Feedback:
        """From gram [B, K, K] = sum of x x^T over calibration tokens, damped by a share of its mean diagonal.

        act_order: columns of high energy first; scales do not move, so no index is stored. The damping grows
        tenfold until the factorization succeeds (a rare expert's gram is rank-deficient).
        """
        b, k, _ = gram.shape
        energy = gram.diagonal(dim1=1, dim2=2)
        order = energy.argsort(-1, descending=True) if act_order else torch.arange(k).expand(b, k)
        # Reversed, because the Cholesky factor of the reversed H is the reversed U D^(1/2).
        h = torch.empty_like(gram)
        for i, back in enumerate(order.flip(1)):
            torch.index_select(gram[i].index_select(0, back), 1, back, out=h[i])
        # Scaled to a mean diagonal of 1: no overflow, no underflow.
        mean = energy.mean(-1).clamp_min(1e-20)
        h /= mean.view(b, 1, 1)
        added = 0.0
        while True:
            h.diagonal(dim1=1, dim2=2).add_(damp - added)
            factor, failed = torch.linalg.cholesky_ex(h, upper=True)
            if bool(failed.any()) and h.dtype is torch.float32:  # too close to singular for its precision
                h = h.double()
                factor, failed = torch.linalg.cholesky_ex(h, upper=True)
            if not bool(failed.any()):
                diagonal = factor.diagonal(dim1=1, dim2=2).clone()
                lower = factor.div_(diagonal.unsqueeze(2)).float().flip(1, 2).contiguous()
                pivots = diagonal.square().float().flip(1) * mean.unsqueeze(1)
                return cls(order, lower, pivots, damp * mean)
            if damp > 1e6:
                raise ValueError("the input statistics have NaN or infinity; expected finite numbers")
            added, damp = damp, 10 * damp

    def __getitem__(self, index: slice | Tensor) -> Feedback:
        """Those of some of the B matrices."""
        return Feedback(self.order[index], self.lower[index], self.pivots[index], self.damping[index])


def sweep(
    w: Tensor, back: Feedback, grid: Grid | None = None, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """w [B, N, K] -> its compressed value [B, N, K] and ||(value - w) x||^2, [B].

    keep [B, N, K] bool, False = zero.

    GPTQ (Frantar et al. 2022, algorithm 1) and SparseGPT (Frantar and Alistarh 2023) in one: a column's new
    value is its grid point, zero where masked, or itself. B matrices of one shape are processed at once.

    With H = U D U^T, U upper triangular with a unit diagonal, the best column after earlier errors E is w_k +
    sum over i < k of E_i U_ik (Chee et al. 2023: LDLQ, which is GPTQ), so nothing is inverted; and the error
    of the outputs under H is the sum over k of D_k |that column - its new value|^2. Legend: B matrices; N
    rows; K columns.
    """
    b, n, k = w.shape
    if grid is not None and grid.zero is None and keep is None and native.runs(w):
        factors = back.order, back.lower, back.pivots, back.damping
        return native.sweep(w, factors, grid.scale, grid.levels)
    rows = back.order.unsqueeze(2).expand(b, k, n)
    w = w.float().transpose(1, 2).gather(1, rows)  # [B, K, N]: a column at a time is contiguous
    mask = None if keep is None else keep.transpose(1, 2).gather(1, rows)
    values, errors, squared = torch.empty_like(w), torch.empty_like(w), torch.zeros(b)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        left = w[:, start:stop].clone()
        if start:
            left.baddbmm_(back.lower[:, start:stop, :start], errors[:, :start])
        scale, zero = (None, None) if grid is None else _columns(grid, back.order[:, start:stop], k)
        for j in range(start, stop):
            i = j - start
            new = left[:, i]
            if grid is not None and scale is not None:
                new = grid.snap(new, scale[:, i], None if zero is None else zero[:, i])
            if mask is not None:
                new = new * mask[:, j]
            values[:, j] = new
            torch.sub(w[:, j], new, out=errors[:, j])
            left[:, i + 1 :].addcmul_(back.lower[:, j + 1 : stop, j].unsqueeze(2), errors[:, j].unsqueeze(1))
        missed = (left - values[:, start:stop]).square().sum(2)
        squared += (missed * back.pivots[:, start:stop]).sum(1)
    squared -= back.damping * errors.square().sum((1, 2))
    value = torch.empty_like(w).scatter_(1, rows, values).transpose(1, 2).contiguous()
    return value, squared.clamp_min(0)


def _columns(grid: Grid, columns: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of some columns [B, C], as [B, C, N]."""
    b, n, groups = grid.scale.shape
    index = (columns // (k // groups)).unsqueeze(2).expand(b, columns.shape[1], n)
    scale = grid.scale.transpose(1, 2).gather(1, index)
    return scale, None if grid.zero is None else grid.zero.transpose(1, 2).gather(1, index)


def output_error(w: Tensor, value: Tensor, gram: Tensor) -> Tensor:
    """||(value - w) x||^2 / ||w x||^2 over the calibration tokens, [B]; exact, from the gram alone."""
    return energy_of(value.float() - w.float(), gram) / energy_of(w, gram).clamp_min(1e-30)


def energy_of(w: Tensor, gram: Tensor, short: bool = False) -> Tensor:
    """||w x||^2 over the calibration tokens, [B]. short: the product in bfloat16, if it is faster, for a w
    whose rows do not cancel in it as rounding errors do."""
    w = w.float()
    dtype = torch.bfloat16 if short and fast_bfloat16() else torch.float32
    return ((w.to(dtype) @ gram.to(dtype)).float() * w).sum((1, 2)).clamp_min(0)
