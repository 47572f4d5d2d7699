"""Routed experts as separate differentiable steps: dispatch, one product per expert, combine.

`functional.routed_experts` computes the same, fused and faster. This form is for code that needs the tensors
between the products: FP8, fake quantization, measuring neurons.

Shapes: N tokens, D hidden, E experts, K experts per token, R padded rows sorted by expert, J and L columns.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from farthing.train.functional import sort_by_expert, spans, sum_slots


class Product(Protocol):
    """The matrix product of a projection or of all experts of a layer: FP8, fake-quantized or plain."""

    def __call__(self, x: Tensor, w: Tensor, sizes: list[int], routing: Routing | None = None) -> Tensor:
        """Rows of expert e times w[e]^T: x [R, J], w [E, L, J] float32 masters -> [R, L] in x.dtype.

        With `routing`, x is [N, J], one row per token, and is dispatched here, so that it can be rounded
        before it is copied to each expert.
        """


@dataclasses.dataclass(frozen=True)
class Routing:
    """The token of each padded row. Rows are grouped by expert; padding repeats token 0."""

    token: Tensor  # [R] int64
    row: Tensor  # [N, K] int64, the row of each slot
    sizes: list[int]  # rows of each expert, padding included
    real: Tensor  # [R] bool, False for padding

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> Routing:
        """From expert ids [N, K]."""
        weights = torch.ones(ids.shape, device=ids.device)
        token, mark, row, sizes = sort_by_expert(ids, weights, experts)
        return cls(token, row, sizes, mark[:, 0] > 0)

    @property
    def expert(self) -> Tensor:
        """The expert of each row, [R] int64."""
        sizes = torch.tensor(self.sizes, device=self.token.device)
        return torch.arange(len(self.sizes), device=self.token.device).repeat_interleave(sizes)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (row,) = ctx.saved_tensors
        return sum_slots(grad, row), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, token, row)
        return F.embedding_bag(row, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, token, row = ctx.saved_tensors
        spread = grad.index_select(0, token)  # [R, D]
        along = (spread * rows).sum(-1, dtype=torch.float32)
        w = grad.new_zeros(len(token), 1)
        w[row.flatten(), 0] = weights.flatten().to(grad.dtype)
        return spread.mul_(w), along[row], None, None


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.sizes = sizes
        out = x.new_empty(x.shape[0], w.shape[1])
        for e, s in spans(sizes):
            torch.mm(x[s], w[e].T, out=out[s])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        grad = grad.contiguous()
        dx, dw = torch.empty_like(x), torch.zeros_like(w)
        for e, s in spans(ctx.sizes):
            torch.mm(grad[s], w[e], out=dx[s])
            torch.mm(grad[s].T, x[s], out=dw[e])
        return dx, dw, None


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """x [N, D] -> the rows of every expert [R, D]."""
    out: Tensor = _Dispatch.apply(x, routing.token, routing.row)  # type: ignore[no-untyped-call]
    return out


def plain_product(x: Tensor, w: Tensor, sizes: list[int], routing: Routing | None = None) -> Tensor:
    """The `Product` without rounding."""
    x = x if routing is None else dispatch(x, routing)
    return grouped_product(x, w.to(x.dtype), sizes)


def grouped_product(x: Tensor, w: Tensor, sizes: list[int]) -> Tensor:
    """rows [R, J] of expert e times w[e]^T -> [R, L]; w [E, L, J] of the same dtype."""
    out: Tensor = _GroupedProduct.apply(x, w, sizes)  # type: ignore[no-untyped-call]
    return out


def combine(rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """sum_k weights[n, k] rows[row[n, k]]: [R, D], [N, K] -> [N, D]."""
    out: Tensor = _Combine.apply(rows, weights, routing.token, routing.row)  # type: ignore[no-untyped-call]
    return out
