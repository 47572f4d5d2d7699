"""Softmax over rows, read once and written once.

Legend: T rows; N columns. A row that fits in the registers of one program is kept there; a longer one (a
vocabulary) is read twice, computing maximum and sum in one pass (Milakov and Gimelshein 2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_HELD = 16384


@triton.jit
def _softmax(x, out, stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + n, mask=n < N, other=float("-inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * N + n, e / tl.sum(e, 0), mask=n < N)


@triton.jit
def _softmax_long(x, out, stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    # Each lane keeps its own maximum and sum, combined once at the end.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        v = tl.load(x + row * stride + start + n, mask=start + n < N, other=float("-inf"))
        new = tl.maximum(top, v)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - safe) + tl.exp(v - safe)
        top = new
    peak = tl.max(top, 0)
    scale = 1.0 / tl.sum(total * tl.exp(top - peak), 0)
    for start in range(0, N, BLOCK):
        v = tl.load(x + row * stride + start + n, mask=start + n < N, other=float("-inf"))
        tl.store(out + row * N + start + n, tl.exp(v - peak) * scale, mask=start + n < N)


def softmax(x: Tensor, held: int = MOST_HELD) -> Tensor:
    """x [T, N] float32 -> [T, N]; rows longer than `held` are streamed."""
    rows, n = x.shape
    out = torch.empty(rows, n, dtype=torch.float32, device=x.device)
    if not rows:
        return out
    if n <= held:
        block = triton.next_power_of_2(n)
        _softmax[(rows,)](x, out, x.stride(0), n, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    else:
        _softmax_long[(rows,)](x, out, x.stride(0), n, BLOCK=min(held, 4096), num_warps=8)
    return out
