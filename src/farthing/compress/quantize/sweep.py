"""Round or prune column by column, letting the remaining columns compensate for the error.

GPTQ (Frantar et al. 2022, algorithm 1) and SparseGPT (Frantar and Alistarh 2023) in one: a column's new
value is its grid point, zero where masked, or itself. B matrices of one shape are processed at once.

With H = U D U^T, U upper triangular with a unit diagonal, the best column after earlier errors E is w_k + sum
over i < k of E_i U_ik (Chee et al. 2023: LDLQ, which is GPTQ), so nothing is inverted; and the error of the
outputs under H is the sum over k of D_k |that column - its new value|^2.
Legend: B matrices; N rows; K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farthing.compress.quantize.grid import Grid, snap

BLOCK = 64  # columns between products with all earlier errors


@dataclass(frozen=True, slots=True)
class Feedback:
    """Second moments of the inputs, factored in the order in which their columns are processed."""

    order: Tensor  # [B, K] int64
    upper: Tensor  # [B, K, K] float32, U
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
        back = order.flip(1)
        h = gram.gather(1, back.unsqueeze(2).expand(b, k, k)).gather(2, back.unsqueeze(1).expand(b, k, k))
        # Scaled to a mean diagonal of 1: no overflow, no underflow.
        mean = energy.mean(-1).clamp_min(1e-20)
        h = h.double() / mean.double().view(b, 1, 1)
        added = 0.0
        while True:
            h.diagonal(dim1=1, dim2=2).add_(damp - added)
            lower, failed = torch.linalg.cholesky_ex(h)
            if not bool(failed.any()):
                diagonal = lower.diagonal(dim1=1, dim2=2)
                upper = (lower / diagonal.unsqueeze(1)).float().flip(1, 2)
                pivots = diagonal.square().float().flip(1) * mean.unsqueeze(1)
                return cls(order, upper, pivots, damp * mean)
            if damp > 1e6:
                raise ValueError("the input statistics have NaN or infinity; expected finite numbers")
            added, damp = damp, 10 * damp

    def __getitem__(self, index: slice | Tensor) -> Feedback:
        """Those of some of the B matrices."""
        return Feedback(self.order[index], self.upper[index], self.pivots[index], self.damping[index])


def sweep(
    w: Tensor, back: Feedback, grid: Grid | None = None, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """w [B, N, K] -> its compressed value [B, N, K] and ||(value - w) x||^2, [B].

    keep [B, N, K] bool, False = zero.
    """
    b, n, k = w.shape
    rows = back.order.unsqueeze(2).expand(b, k, n)
    w = w.float().transpose(1, 2).gather(1, rows)  # [B, K, N]: a column at a time is contiguous
    mask = None if keep is None else keep.transpose(1, 2).gather(1, rows)
    values, errors, squared = torch.empty_like(w), torch.empty_like(w), torch.zeros(b)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        left = w[:, start:stop].clone()
        if start:
            left.baddbmm_(back.upper[:, :start, start:stop].transpose(1, 2), errors[:, :start])
        scale, zero = (None, None) if grid is None else _columns(grid, back.order[:, start:stop], k)
        for j in range(start, stop):
            i = j - start
            new = left[:, i]
            if grid is not None and scale is not None:
                new = snap(new, scale[:, i], None if zero is None else zero[:, i], grid.low, grid.high)
            if mask is not None:
                new = new * mask[:, j]
            values[:, j] = new
            torch.sub(w[:, j], new, out=errors[:, j])
            left[:, i + 1 :].addcmul_(back.upper[:, j, j + 1 : stop].unsqueeze(2), errors[:, j].unsqueeze(1))
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


def energy_of(w: Tensor, gram: Tensor) -> Tensor:
    """||w x||^2 over the calibration tokens, [B]."""
    w = w.float()
    return ((w @ gram) * w).sum((1, 2)).clamp_min(0)
