"""Differentiable ops with hand-written gradients, and routed experts as separate steps.

They are the routed experts (tokens sorted by expert, one matrix product per expert), the head with its cross
entropy, RMSNorm, and causal attention on a CPU, where torch's fused kernel has a slow backward pass.

Shapes: B sequences, H heads, T positions, N tokens, D hidden, E experts, K experts per token, I expert
width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128  # experts' row counts are padded to a multiple: a CPU product compiles a kernel per shape


def sort_by_expert(ids: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """(token and weight of every padded row, row of each slot [N, K], padded row count per expert).

    Padding rows repeat token 0 with weight 0, so they add nothing to any sum or gradient.
    """
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + ROWS - 1) // ROWS * ROWS
    order = torch.argsort(flat.to(torch.int16), stable=True)  # slots sorted by expert
    shift = (padded.cumsum(0) - padded) - (
        counts.cumsum(0) - counts
    )  # [E] first padded row - first sorted slot
    row = torch.empty_like(flat)
    row[order] = torch.arange(flat.numel(), device=ids.device) + shift.repeat_interleave(counts)
    sizes: list[int] = padded.tolist()
    token = flat.new_zeros(sum(sizes))
    token[row] = torch.arange(flat.numel(), device=ids.device) // ids.shape[1]
    weight = weights.new_zeros(len(token), 1)
    weight[row, 0] = weights.flatten()
    return token, weight, row.view(ids.shape), sizes


class _RoutedExperts(torch.autograd.Function):
    """One loop over experts, so that an expert's rows stay in cache between products. R padded rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        width = down.shape[2]
        token, w, row, sizes = sort_by_expert(ids, weights, down.shape[0])
        w = w.to(x.dtype)
        gate, up, act = (x.new_empty(len(token), width) for _ in range(3))  # [R, I]
        out = x.new_empty(len(token), x.shape[1])  # [R, D]
        for e, s in spans(sizes):
            rows = x.index_select(0, token[s])
            torch.mm(rows, gate_up[e, :width].T, out=gate[s])
            torch.mm(rows, gate_up[e, width:].T, out=up[s])
            torch.mul(F.silu(gate[s]), up[s], out=act[s])
            act[s] *= w[s]  # the routing weight commutes with `down`, and rows are narrower here
            torch.mm(act[s], down[e].T, out=out[s])
        ctx.save_for_backward(x, gate, up, act, w, token, row, gate_up, down)
        ctx.sizes = sizes
        return sum_slots(out, row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, act, w, token, row, gate_up, down = ctx.saved_tensors
        dy = dy.to(x.dtype)
        d_down, d_gate_up = torch.zeros_like(down), torch.zeros_like(gate_up)
        d_weights = torch.empty(act.shape[0], device=x.device)
        d_rows = x.new_empty(act.shape[0], x.shape[1])
        for e, s in spans(ctx.sizes):
            rows, d_out = x.index_select(0, token[s]), dy.index_select(0, token[s])
            d_act = d_out @ down[e]
            torch.mm(d_out.T, act[s], out=d_down[e])
            silu = F.silu(gate[s])
            d_weights[s] = (d_act * silu).mul_(up[s]).sum(-1, dtype=torch.float32)
            d_act *= w[s]
            d_gate = torch.ops.aten.silu_backward(d_act * up[s], gate[s])
            dh = torch.cat((d_gate, d_act.mul_(silu)), -1)  # [rows, 2I]
            torch.mm(dh, gate_up[e], out=d_rows[s])
            torch.mm(dh.T, rows, out=d_gate_up[e])
        return sum_slots(d_rows, row), d_weights[row], None, d_gate_up, d_down


def spans(sizes: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows of the sorted slots) for every expert that has any."""
    found, start = [], 0
    for e, n in enumerate(sizes):
        if n:
            found.append((e, slice(start, start + n)))
        start += n
    return found


def sum_slots(rows: Tensor, row: Tensor) -> Tensor:
    """sum_k rows[row[n, k]]: [R, D], [N, K] -> [N, D]. embedding_bag is the fused CPU kernel for it."""
    out: Tensor = F.embedding_bag(row, rows, mode="sum")
    return out


def routed_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """sum_k weights[n, k] * down_e(silu(gate_e(x)) * up_e(x)), e = ids[n, k].

    x [N, D]; weights [N, K] float32; ids [N, K]; gate_up [E, 2I, D]; down [E, D, I] -> [N, D] in x.dtype.
    """
    out: Tensor = _RoutedExperts.apply(x, weights, ids, gate_up, down)  # type: ignore[no-untyped-call]
    return out


class _FusedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, to never materialize [N, V]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
        N = hidden.shape[0]
        x = hidden.to(head.dtype)
        d_hidden, d_head = torch.empty_like(x), torch.zeros(head.shape, device=head.device)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, N, chunk):
            s = slice(start, start + chunk)
            probs = torch.softmax(F.linear(x[s], head), -1)  # [chunk, V]
            picked = probs.gather(1, targets[s, None])
            total -= picked.float().clamp_min(1e-30).log().sum()
            d_logits = probs.scatter_(1, targets[s, None], picked - 1)
            torch.mm(d_logits, head, out=d_hidden[s])
            if ctx.needs_input_grad[1]:
                d_head += d_logits.T @ x[s]
        ctx.save_for_backward(d_hidden, d_head)
        ctx.scale, ctx.dtypes = 1.0 / N, (hidden.dtype, head.dtype)
        return total / N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        scale = float(grad) * ctx.scale
        return d_hidden.to(ctx.dtypes[0]) * scale, (d_head * scale).to(ctx.dtypes[1]), None, None


def fused_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Mean cross entropy (nats) of softmax(hidden head^T). hidden [N, D], head [V, D], targets [N] int64."""
    loss: Tensor = _FusedCrossEntropy.apply(hidden, head, targets, chunk)  # type: ignore[no-untyped-call]
    return loss


class _CausalAttention(torch.autograd.Function):
    """Blocks of queries against the keys before them: scores fit in cache, and masked ones are skipped."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, block: int) -> Tensor:
        q = q * scale
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        probs = []
        for b, s, e in _query_blocks(q.shape, block):
            scores = torch.bmm(q[b, :, s:e], k[b, :, :e].mT)  # [H, e - s, e]
            scores[:, :, s:] += torch.full((e - s, e - s), float("-inf"), dtype=q.dtype).triu(1)
            probs.append(torch.softmax(scores, -1))
            torch.bmm(probs[-1], v[b, :, :e], out=out[b, :, s:e])
        ctx.save_for_backward(q, k, v, *probs)
        ctx.scale, ctx.block = scale, block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probs = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (b, s, e), p in zip(_query_blocks(q.shape, ctx.block), probs, strict=True):
            g = grad[b, :, s:e]
            dv[b, :, :e] += torch.bmm(p.mT, g)
            d_probs = torch.bmm(g, v[b, :, :e].mT)
            d_scores = torch._softmax_backward_data(d_probs, p, -1, p.dtype)
            torch.bmm(d_scores, k[b, :, :e], out=dq[b, :, s:e])
            dk[b, :, :e] += torch.bmm(d_scores.mT, q[b, :, s:e])
        return dq * ctx.scale, dk, dv, None, None


def _query_blocks(shape: torch.Size, block: int) -> list[tuple[int, int, int]]:
    """(sequence, first query, end of queries) of every block of [B, H, T, d]."""
    B, _, T, _ = shape
    return [(b, s, min(s + block, T)) for b in range(B) for s in range(0, T, block)]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int = 256) -> Tensor:
    """softmax(scale q k^T + causal mask) v. q, k [B, H, T, d], v [B, H, T, dv] -> [B, H, T, dv]."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out: Tensor = _CausalAttention.apply(q, k, v, scale, block)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x32 = x.float()
        square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x32 * inverse
        ctx.save_for_backward(normed, inverse, weight)
        ctx.dtype = x.dtype
        out: Tensor = (normed * weight).to(dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, weight = ctx.saved_tensors
        along = grad * normed
        d_weight = along.flatten(0, -2).sum(0)
        projection = (along @ weight).div_(weight.numel())[..., None]
        dx = torch.addcmul(grad * weight, normed, projection, value=-1).mul_(inverse)
        return dx.to(ctx.dtype), d_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32, returned in `dtype`."""
    out: Tensor = _RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return out


# Routed experts as separate differentiable steps: dispatch, one product per expert, combine.
#
# `routed_experts` computes the same, fused and faster. This form is for code that needs the tensors
# between the products: FP8, fake quantization, measuring neurons.
#
# Shapes: N tokens, D hidden, E experts, K experts per token, R padded rows sorted by expert, J and L
# columns.


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
