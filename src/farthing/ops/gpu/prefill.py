"""Causal attention of prompts: keys and values expanded to heads, tiled, with online softmax.

Legend: T tokens of the step; S keys of their sequences, concatenated; H heads; n, r, v the nope, rotary and
value head sizes; BM queries and BK keys per tile.

A head's key is (its part of the expanded latent, the rotary key shared by all heads), so the rotary part is
never copied per head (DeepSeek-V2 section 2.1.2). Tiles entirely below the diagonal need no mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.gpu.launch import Config, config
from farthing.ops.gpu.numeric import dot, narrow


@triton.jit
def _turn(
    q, qp, position, acc, total, top, start, kv, k_pe, first, length, head, scale,
    H: tl.constexpr, n: tl.constexpr, r: tl.constexpr, v: tl.constexpr, MASK: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of keys from `start`; kv rows are H (n + v) wide."""
    at = start + tl.arange(0, BK)
    ok = at < length
    row = (first + at).to(tl.int64)
    d, i, w = tl.arange(0, N), tl.arange(0, R), tl.arange(0, V)
    own = kv + row * (H * (n + v)) + head * (n + v)
    key = tl.load(own[None, :] + d[:, None], mask=ok[None, :] & (d[:, None] < n), other=0.0)  # [N, BK]
    pe = tl.load(k_pe + row[None, :] * r + i[:, None], mask=ok[None, :] & (i[:, None] < r), other=0.0)
    score = dot(q, key, tl.zeros((q.shape[0], BK), tl.float32))
    score = dot(qp, pe, score) * scale
    if MASK:
        score = tl.where(at[None, :] <= position[:, None], score, float("-inf"))
    new = tl.maximum(top, tl.max(score, 1))
    shrink = tl.exp(top - new)
    p = tl.exp(score - new[:, None])
    value = tl.load(own[:, None] + n + w[None, :], mask=ok[:, None] & (w[None, :] < v), other=0.0)
    acc = dot(narrow(p, q.dtype), value, acc * shrink[:, None])
    return acc, total * shrink + tl.sum(p, 1), new


@triton.jit
def _prefill(
    q, q_pe, kv, k_pe, out, query_start, key_first, key_length, scale, stride_q, stride_o,
    H: tl.constexpr, n: tl.constexpr, r: tl.constexpr, v: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    V: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Later tiles have the most keys, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, sequence = tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(query_start + 2 * sequence), tl.load(query_start + 2 * sequence + 1)
    token = begin + tile * BM + tl.arange(0, BM)
    if begin + tile * BM < end:
        first, length = tl.load(key_first + sequence), tl.load(key_length + sequence)
        live = token < end
        # This step's tokens are the last of their sequence. Padding rows behave like the last row.
        position = length - end + tl.minimum(token, end - 1)
        d, i, w = tl.arange(0, N), tl.arange(0, R), tl.arange(0, V)
        wide = token.to(tl.int64)[:, None]
        a = tl.load(
            q + wide * stride_q + head * (n + r) + d[None, :],
            mask=live[:, None] & (d[None, :] < n),
            other=0.0,
        )
        b = tl.load(
            q_pe + (wide * H + head) * r + i[None, :], mask=live[:, None] & (i[None, :] < r), other=0.0
        )
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, V), tl.float32)
        oldest = length - end + begin + tile * BM  # the tile's first position
        plain = (oldest + 1) // BK * BK
        newest = tl.minimum(oldest + BM, length)
        for start in range(0, plain, BK):
            acc, total, top = _turn(
                a, b, position, acc, total, top, start, kv, k_pe, first, length, head, scale,
                H, n, r, v, False, N, R, V, BK,
            )  # fmt: skip
        for start in range(plain, newest, BK):
            acc, total, top = _turn(
                a, b, position, acc, total, top, start, kv, k_pe, first, length, head, scale,
                H, n, r, v, True, N, R, V, BK,
            )  # fmt: skip
        result = narrow(acc / total[:, None], out.dtype.element_ty)
        tl.store(out + wide * stride_o + head * v + w[None, :], result, mask=live[:, None] & (w[None, :] < v))


def prefill(
    q: Tensor, q_pe: Tensor, kv: Tensor, k_pe: Tensor, out: Tensor, spans: list[tuple[int, int]],
    key_first: Tensor, key_lengths: list[int], scale: float, sizes: tuple[int, int, int, int],
    choice: Config | None = None,
) -> None:  # fmt: skip
    """out [T, H v] at the tokens of `spans`: causal attention of q [T, H (n + r)], q_pe [T, H, r] rotated.

    kv [S, H (n + v)], k_pe [S, r]: sequence b has key_lengths[b] rows from key_first[b] on; its queries are
    the tokens spans[b] = (begin, end), at its last positions. sizes = (H, n, r, v).
    """
    heads, n, r, v = sizes
    kernel = "prefill_float32" if q.dtype is torch.float32 else "prefill"
    longest = max(end - begin for begin, end in spans)
    c = choice or config(kernel, longest, q.device)
    starts = torch.tensor([*spans], dtype=torch.int32, device=q.device)
    lengths = torch.tensor(key_lengths, dtype=torch.int32, device=q.device)
    _prefill[(triton.cdiv(longest, c.bm), heads, len(spans))](
        q, q_pe, kv, k_pe, out, starts, key_first, lengths, scale, q.stride(0), out.stride(0), H=heads,
        n=n, r=r, v=v, N=_padded(n), R=_padded(r), V=_padded(v), BM=c.bm, BK=c.bk, **c.resources,
    )  # fmt: skip


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))
