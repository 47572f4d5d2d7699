"""Two differentiable operations with hand-written gradients, because autograd's own cost several times more:
the routed experts (tokens sorted by expert, one matrix product an expert) and the head with its cross entropy.

Shapes: N tokens, D hidden, E experts, K experts per token, I expert width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RoutedExperts(torch.autograd.Function):
    """The routing weight is applied before `down` (it commutes), where rows are I wide instead of D."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        E, K = gate_up.shape[0], ids.shape[1]
        order = torch.argsort(ids.flatten().to(torch.int16), stable=True)  # [N*K] slots sorted by expert
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        sizes = torch.bincount(ids.flatten(), minlength=E).tolist()
        token = order // K
        xs = x.index_select(0, token)  # [N*K, D]
        h = torch.empty(xs.shape[0], gate_up.shape[1], dtype=x.dtype, device=x.device)
        for e, s in _spans(sizes):
            torch.mm(xs[s], gate_up[e].T, out=h[s])
        gate, up = h.chunk(2, -1)
        w = weights.flatten().index_select(0, order)[:, None].to(x.dtype)
        act = F.silu(gate) * up * w  # [N*K, I]
        out = torch.empty_like(xs)
        for e, s in _spans(sizes):
            torch.mm(act[s], down[e].T, out=out[s])
        ctx.save_for_backward(xs, h, act, w, token, inverse, gate_up, down)
        ctx.sizes, ctx.shape = sizes, ids.shape
        return _sum_slots(out, inverse, ids.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xs, h, act, w, token, inverse, gate_up, down = ctx.saved_tensors
        dout = dy.to(xs.dtype).index_select(0, token)  # [N*K, D]
        dact = torch.empty_like(act)
        d_down, d_gate_up = torch.zeros_like(down), torch.zeros_like(gate_up)
        for e, s in _spans(ctx.sizes):
            torch.mm(dout[s], down[e], out=dact[s])
            torch.mm(dout[s].T, act[s], out=d_down[e])
        gate, up = h.chunk(2, -1)
        silu = F.silu(gate)
        d_weights = (dact * silu).mul_(up).sum(-1, dtype=torch.float32)
        dact *= w
        dh = torch.empty_like(h)
        dh[:, : gate.shape[1]] = torch.ops.aten.silu_backward(dact * up, gate)
        torch.mul(dact, silu, out=dh[:, gate.shape[1] :])
        dxs = dout  # reused: same shape, no longer needed
        for e, s in _spans(ctx.sizes):
            torch.mm(dh[s], gate_up[e], out=dxs[s])
            torch.mm(dh[s].T, xs[s], out=d_gate_up[e])
        dx = _sum_slots(dxs, inverse, ctx.shape)
        return dx, d_weights.index_select(0, inverse).view(ctx.shape), None, d_gate_up, d_down


def _spans(sizes: list[int]) -> list[tuple[int, slice]]:
    """(expert, rows of the sorted slots) for every expert that has any."""
    spans, start = [], 0
    for e, n in enumerate(sizes):
        if n:
            spans.append((e, slice(start, start + n)))
        start += n
    return spans


def _sum_slots(rows: Tensor, inverse: Tensor, shape: torch.Size) -> Tensor:
    """Adds the K sorted rows of each token: rows [N*K, D] -> [N, D]. embedding_bag is the fused CPU kernel for it."""
    return F.embedding_bag(inverse.view(shape), rows, mode="sum")


def routed_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """sum_k weights[n, k] * down_e(silu(gate_e(x)) * up_e(x)), e = ids[n, k].

    x [N, D]; weights [N, K] float32; ids [N, K] int64; gate_up [E, 2I, D]; down [E, D, I]. Returns [N, D] in x.dtype.
    """
    out: Tensor = _RoutedExperts.apply(x, weights, ids, gate_up, down)
    return out


class _FusedCrossEntropy(torch.autograd.Function):
    """Computes the gradients during the forward, chunk by chunk, so that [N, V] never exists as a whole."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
        N = hidden.shape[0]
        x = hidden.to(head.dtype)
        d_hidden = torch.empty_like(x)
        d_head_t = torch.zeros(head.shape[1], head.shape[0], device=head.device)  # [D, V]
        total = torch.zeros((), device=hidden.device)
        for start in range(0, N, chunk):
            s = slice(start, start + chunk)
            probs = torch.softmax(F.linear(x[s], head), -1, dtype=torch.float32)
            rows = torch.arange(probs.shape[0], device=probs.device)
            picked = probs[rows, targets[s]]
            total -= picked.clamp_min(1e-30).log().sum()
            probs[rows, targets[s]] = picked - 1
            d_logits = probs.to(head.dtype)
            torch.mm(d_logits, head, out=d_hidden[s])
            d_head_t += x[s].T @ d_logits
        ctx.save_for_backward(d_hidden, d_head_t)
        ctx.scale, ctx.dtypes = 1.0 / N, (hidden.dtype, head.dtype)
        return total / N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head_t = ctx.saved_tensors
        scale = float(grad) * ctx.scale
        return d_hidden.to(ctx.dtypes[0]) * scale, (d_head_t.T * scale).to(ctx.dtypes[1]), None, None


def fused_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Mean cross entropy (nats) of softmax(hidden head^T). hidden [N, D], head [V, D], targets [N] int64."""
    loss: Tensor = _FusedCrossEntropy.apply(hidden, head, targets, chunk)
    return loss
