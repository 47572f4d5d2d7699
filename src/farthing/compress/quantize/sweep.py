"""Round or prune column by column, letting the remaining columns compensate for the error.

GPTQ (Frantar et al. 2022, algorithm 1) and SparseGPT (Frantar and Alistarh 2023) in one: a column's new
value is its grid point, zero where masked, or itself. B matrices of one shape are processed at once.
Legend: B matrices; N rows; K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farthing.compress.quantize.grid import Grid, snap

BLOCK = 64  # columns between updates of all columns to the right


def sweep(
    w: Tensor,
    gram: Tensor,
    grid: Grid | None = None,
    keep: Tensor | None = None,
    act_order: bool = True,
    damp: float = 0.01,
) -> Tensor:
    """w [B, N, K] -> its compressed value [B, N, K].

    gram [B, K, K] = sum of x x^T over calibration tokens; keep [B, N, K] bool, False = zero.
    act_order: process columns of high energy first; scales do not move, so no index is stored.
    """
    b, n, k = w.shape
    order = gram.diagonal(dim1=1, dim2=2).argsort(-1, descending=True) if act_order else None
    if order is None:
        order = torch.arange(k).expand(b, k)
    inverse = order.argsort(-1)
    columns = order.unsqueeze(1).expand(b, n, k)
    w = w.float().gather(2, columns)
    h = gram.gather(1, order.unsqueeze(2).expand(b, k, k)).gather(2, order.unsqueeze(1).expand(b, k, k))
    upper = inverse_factor(h, damp)
    scale = zero = None
    if grid is not None:
        scale, zero = grid.expand(k)
        scale = scale.gather(2, columns)
        zero = None if zero is None else zero.gather(2, columns)
    mask = None if keep is None else keep.gather(2, columns)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.zeros(b, n, stop - start)
        for j in range(start, stop):
            old = w[:, :, j]
            new = old.clone()
            if grid is not None and scale is not None:
                new = snap(old, scale[:, :, j], None if zero is None else zero[:, :, j], grid.low, grid.high)
            if mask is not None:
                new = new * mask[:, :, j]
            error = (old - new) / upper[:, j, j].view(b, 1)
            w[:, :, j:stop] -= error.unsqueeze(2) * upper[:, j : j + 1, j:stop]
            w[:, :, j] = new
            errors[:, :, j - start] = error
        w[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return w.gather(2, inverse.unsqueeze(1).expand(b, n, k))


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse of gram [B, K, K], damped by a share of its mean diagonal.

    The damping grows tenfold until the factorization succeeds (a rare expert's gram is rank-deficient).
    """
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-20).view(-1, 1, 1)
    h = gram.double() / mean.double()  # scaled to a mean diagonal of 1: no overflow, no underflow
    eye = torch.eye(h.shape[1], dtype=torch.float64)
    while True:
        lower, failed = torch.linalg.cholesky_ex(h + damp * eye)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                factor: Tensor = upper.float()
                return factor
        if damp > 1e6:
            raise ValueError("the input statistics have NaN or infinity; expected finite numbers")
        damp *= 10


def output_error(w: Tensor, value: Tensor, gram: Tensor) -> Tensor:
    """||(value - w) x||^2 / ||w x||^2 over the calibration tokens, [B]; exact, from the gram alone."""
    delta = value.float() - w.float()
    num = ((delta @ gram) * delta).sum((1, 2))
    den = ((w.float() @ gram) * w.float()).sum((1, 2))
    return num.clamp_min(0) / den.clamp_min(1e-30)
