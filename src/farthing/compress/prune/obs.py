"""Optimal brain surgery on blocks of weights: which to cut at the least cost, and how to update the rest.

A row of y = W x with second moments H = E[x x^T] that loses the columns b costs at least
w_b^T ([H^-1]_bb)^-1 w_b after the remaining columns compensate (Hassibi and Stork 1993; Frantar and Alistarh
2022 for blocks). Rows of one block lose the same columns, so they share one inverse; they form a "strip".

Legend: B matrices; N rows; K columns; r, c rows and columns of a block; S = N / r strips; C = K / c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

WORK_BYTES = 2**26  # of inverses processed at once
DAMP = 0.01  # relative to the mean diagonal


@dataclass(frozen=True, slots=True)
class Trace:
    """The order in which the blocks of every strip are cut, and the cost of each in output energy.

    Costs never fall along a strip: a block that can only be cut after an expensive one costs as much.
    """

    order: Tensor  # [B, S, steps] int64, blocks along K
    cost: Tensor  # [B, S, steps] float32, the sum over calibration tokens of |change of y|^2

    def keep(self, drop: Tensor, cells: tuple[int, int], columns: int) -> Tensor:
        """The mask [B, N, K] when strip s of matrix b loses its first drop[b, s] blocks."""
        b, s, steps = self.order.shape
        gone = torch.zeros(b, s, columns // cells[1], dtype=torch.bool)
        gone.scatter_(2, self.order, torch.arange(steps) < drop.unsqueeze(2))
        return ~gone.repeat_interleave(cells[0], 1).repeat_interleave(cells[1], 2)


def normalized(gram: Tensor, damp: float = DAMP) -> tuple[Tensor, Tensor]:
    """gram [B, K, K] over its mean diagonal, damped, in float64; and that mean, [B]."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-20)
    eye = torch.eye(gram.shape[-1], dtype=torch.float64)
    return gram.double() / mean.double().view(-1, 1, 1) + damp * eye, mean


def saliency(w: Tensor, gram: Tensor, damp: float = DAMP) -> Tensor:
    """w^2 / [H^-1]_kk of w [B, N, K]: the cost of cutting a weight alone, with the others adapting."""
    h, mean = normalized(gram, damp)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h)).diagonal(dim1=1, dim2=2)
    return w.square() / inverse.float().unsqueeze(1) * mean.view(-1, 1, 1)


def block_trace(w: Tensor, gram: Tensor, cells: tuple[int, int], most: float, damp: float = DAMP) -> Trace:
    """Cut blocks of w [B, N, K] one by one, the cheapest of each strip first, up to a share `most` of it.

    gram [B, K, K] = sum of x x^T. After every cut the remaining weights of the strip take the least-squares
    update, so later costs are those of the updated weights. K^2 c operations per cut and strip.
    Raises ValueError if blocks do not tile the matrix.
    """
    (r, c), (b, n, k) = cells, w.shape
    if n % r or k % c:
        raise ValueError(f"blocks of {r}x{c} do not tile a matrix of {n}x{k}; expected multiples of both")
    h, mean = normalized(gram, damp)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h)).float()
    strips, steps = n // r, max(1, int(most * (k // c)))
    values = w.reshape(b * strips, r, k)
    orders, costs = [], []
    for part in _parts(b * strips, 4 * k * k):
        matrix = torch.div(part, strips, rounding_mode="floor")
        order, cost = _cut(values[part].clone(), inverse[matrix].clone(), c, steps)
        orders.append(order)
        costs.append(cost * mean[matrix].unsqueeze(1))
    shape = (b, strips, steps)
    return Trace(torch.cat(orders).view(shape), torch.cat(costs).cummax(1).values.view(shape))


def _parts(count: int, size: int) -> Iterator[Tensor]:
    yield from torch.arange(count).split(max(1, WORK_BYTES // size))


def _cut(values: Tensor, inverse: Tensor, c: int, steps: int) -> tuple[Tensor, Tensor]:
    """values [P, r, K] and inverse [P, K, K], one strip each and overwritten -> (order, cost), [P, steps]."""
    p, r, k = values.shape
    strip, offset = torch.arange(p), torch.arange(c)
    alive = torch.ones(p, k // c, dtype=torch.bool)
    orders, costs = [], []
    for _ in range(steps):
        diagonal = inverse.view(p, k // c, c, k // c, c).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        factor, failed = torch.linalg.cholesky_ex(diagonal)  # [P, C, c, c]
        columns = values.view(p, r, k // c, c).permute(0, 2, 3, 1)  # [P, C, c, r]
        score = torch.linalg.solve_triangular(factor, columns, upper=False).square().sum((2, 3))
        score = score.masked_fill(~alive | (failed != 0) | score.isnan(), torch.inf)
        best = score.argmin(1)
        orders.append(best)
        costs.append(score[strip, best])
        index = best.unsqueeze(1) * c + offset  # [P, c]
        along, across = index.unsqueeze(2).expand(p, c, k), index.unsqueeze(1)
        rows = inverse.gather(1, along)
        solved = torch.cholesky_solve(rows, factor[strip, best])  # [P, c, K]
        values -= values.gather(2, across.expand(p, r, c)) @ solved
        values.scatter_(2, across.expand(p, r, c), 0.0)
        inverse -= rows.transpose(1, 2) @ solved
        inverse.scatter_(1, along, 0.0).scatter_(2, across.expand(p, k, c), 0.0)
        inverse[strip.unsqueeze(1), index, index] = 1.0  # keeps the factorization of a cut block defined
        alive[strip, best] = False
    return torch.stack(orders, 1), torch.stack(costs, 1)


def cheapest(traces: list[Trace], blocks: int) -> list[Tensor]:
    """Number of blocks that every strip loses, [B, S] each, when one threshold cuts `blocks` in total."""
    if blocks < 1:
        return [torch.zeros(t.cost.shape[:2], dtype=torch.int64) for t in traces]
    flat = torch.cat([t.cost.flatten() for t in traces])
    if blocks > flat.numel():
        raise ValueError(f"{blocks} blocks to cut; expected at most {flat.numel()}")
    threshold = flat.kthvalue(blocks).values
    return [(t.cost <= threshold).sum(2) for t in traces]


def least_squares(w: Tensor, gram: Tensor, keep: Tensor, rows: int = 1, damp: float = DAMP) -> Tensor:
    """The weights w^ [B, N, K], masked by `keep`, with the least sum over tokens of |w^ x - w x|^2.

    Damping keeps w^ near w. `rows` consecutive rows share a mask, and one factorization of K^3 / 3.
    """
    b, n, k = w.shape
    h, _ = normalized(gram, damp)
    out = torch.empty(b * n // rows, rows, k)
    values, masks = w.reshape(-1, rows, k), keep.reshape(-1, rows, k)[:, 0].double()
    for part in _parts(len(values), 8 * k * k):
        mine, m = h[torch.div(part, n // rows, rounding_mode="floor")], masks[part]
        target = (values[part].double() @ mine) * m.unsqueeze(1)
        kept = mine * m.unsqueeze(1) * m.unsqueeze(2) + torch.diag_embed(1 - m)
        solution = torch.cholesky_solve(target.transpose(1, 2), torch.linalg.cholesky(kept))
        out[part] = (solution.transpose(1, 2) * m.unsqueeze(1)).float()
    return out.view(b, n, k)
