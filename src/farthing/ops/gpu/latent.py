"""Inputs of attention: rotary embedding, the latent's norm, and the write to the paged cache.

Legend: T tokens; H heads; n, r the nope and rotary head sizes; c the KV latent. One program per token rotates
the queries of all heads. Another norms the latent, rotates its key and stores both; an 8-bit cache has one
scale per part. Also here: the gather of cached rows that a prefill expands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import LatentCache
from farthing.ops.gpu.numeric import FP8_MAX, narrow, round_half_even

FLOAT_CACHE = 0
FP8_CACHE = tl.constexpr(1)
INT8_CACHE = tl.constexpr(2)
_ROWS = 16  # cache rows gathered per program
CACHE_KINDS = {torch.float8_e4m3fn: 1, torch.int8: 2}


@triton.jit
def _rotate_queries(
    q, out, positions, cos, sin, stride_q, H, n, r, BH: tl.constexpr, HALF_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h, i = tl.arange(0, BH)[:, None], tl.arange(0, HALF_R)[None, :]
    mask = (h < H) & (2 * i < r)
    step, far = (2, 1) if INTERLEAVED else (1, r // 2)
    x = q + token * stride_q + h * (n + r) + n + i * step
    at = tl.load(positions + token).to(tl.int64) * (r // 2) + i
    a = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + far, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + at, mask=2 * i < r, other=0.0)
    s = tl.load(sin + at, mask=2 * i < r, other=0.0)
    to = out + (token * H + h) * r + i * step
    tl.store(to, narrow(a * c - b * s, out.dtype.element_ty), mask=mask)
    tl.store(to + far, narrow(b * c + a * s, out.dtype.element_ty), mask=mask)


@triton.jit
def _store_part(x, mask, data, scale, KIND: tl.constexpr):
    """Store float32 x in the cache at data, with its scale if the cache is 8-bit."""
    if KIND == FP8_CACHE:
        s = tl.maximum(tl.max(tl.abs(tl.where(mask, x, 0.0)), 0) / FP8_MAX, 1e-20)
        tl.store(data, narrow(tl.clamp(x / s, -FP8_MAX, FP8_MAX), tl.float8e4nv), mask=mask)
        tl.store(scale, s)
    elif KIND == INT8_CACHE:
        s = tl.maximum(tl.max(tl.abs(tl.where(mask, x, 0.0)), 0) / 127.0, 1e-20)
        tl.store(data, round_half_even(tl.clamp(x / s, -127.0, 127.0)).to(tl.int8), mask=mask)
        tl.store(scale, s)
    else:
        tl.store(data, narrow(x, data.dtype.element_ty), mask=mask)


@triton.jit
def _write_latent(
    kv, norm, positions, cos, sin, slots, data, scale, stride_kv, c, r, eps, C: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    to = data + slot * (c + r)
    x = kv + token * stride_kv
    j = tl.arange(0, C)
    latent = tl.load(x + j, mask=j < c, other=0.0).to(tl.float32)
    latent = latent * tl.rsqrt(tl.sum(latent * latent, 0) / c + eps)
    latent = latent * tl.load(norm + j, mask=j < c, other=0.0)
    _store_part(latent, j < c, to + j, scale + slot * 2, KIND)
    at = tl.load(positions + token).to(tl.int64) * (r // 2)
    i = tl.arange(0, R)
    step = 1 if INTERLEAVED else r // 2
    # Each lane loads its partner: (x0, x1) is rotated to x0 cos - x1 sin, x1 cos + x0 sin.
    first = (i % 2 == 0) if INTERLEAVED else (i < r // 2)
    angle = i // 2 if INTERLEAVED else i % (r // 2)
    other = tl.where(first, i + step, i - step)
    own = tl.load(x + c + i, mask=i < r, other=0.0).to(tl.float32)
    peer = tl.load(x + c + other, mask=(i < r) & (other < r), other=0.0).to(tl.float32)
    cosine = tl.load(cos + at + angle, mask=i < r, other=0.0)
    sine = tl.load(sin + at + angle, mask=i < r, other=0.0)
    key = own * cosine + tl.where(first, -peer, peer) * sine
    _store_part(key, i < r, to + c + i, scale + slot * 2 + 1, KIND)


@triton.jit
def _gather(
    data, scale, table, first, length, latent, key, stride_t, size, c, r, C: tl.constexpr, R: tl.constexpr,
    EIGHT_BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ok = place < tl.load(length + sequence)
    block = tl.load(table + sequence.to(tl.int64) * stride_t + place // size, mask=ok, other=0)
    slot = (block.to(tl.int64) * size + place % size)[:, None]
    row = (tl.load(first + sequence) + place).to(tl.int64)[:, None]
    j, i = tl.arange(0, C)[None, :], tl.arange(0, R)[None, :]
    ok = ok[:, None]
    x = tl.load(data + slot * (c + r) + j, mask=ok & (j < c), other=0.0).to(tl.float32)
    k = tl.load(data + slot * (c + r) + c + i, mask=ok & (i < r), other=0.0).to(tl.float32)
    if EIGHT_BITS:
        x = x * tl.load(scale + slot * 2, mask=ok, other=0.0)
        k = k * tl.load(scale + slot * 2 + 1, mask=ok, other=0.0)
    tl.store(latent + row * c + j, narrow(x, latent.dtype.element_ty), mask=ok & (j < c))
    tl.store(key + row * r + i, narrow(k, key.dtype.element_ty), mask=ok & (i < r))


def rotate_queries(
    q: Tensor, positions: Tensor, rope: Tensor, heads: int, nope: int, rotary: int, interleaved: bool
) -> Tensor:
    """q [T, H (n + r)] -> its rotary parts, rotated [T, H, r]; rope [2, max_len, r / 2] float32."""
    tokens = q.shape[0]
    out = torch.empty(tokens, heads, rotary, dtype=q.dtype, device=q.device)
    half = triton.next_power_of_2(rotary // 2)
    _rotate_queries[(tokens,)](
        q, out, positions, rope[0], rope[1], q.stride(0), heads, nope, rotary,
        BH=triton.next_power_of_2(heads), HALF_R=half, INTERLEAVED=interleaved, num_warps=4,
    )  # fmt: skip
    return out


def write_latent(
    kv: Tensor, norm: Tensor, eps: float, positions: Tensor, rope: Tensor, interleaved: bool,
    cache: LatentCache, layer: int, slots: Tensor,
) -> None:  # fmt: skip
    """Norm and rotate kv [T, c + r] and store it in `slots` of the layer."""
    c, width = norm.shape[0], kv.shape[1]
    data = cache.data[layer]
    scale = data if cache.scale is None else cache.scale[layer]
    _write_latent[(kv.shape[0],)](
        kv, norm, positions, rope[0], rope[1], slots, data, scale, kv.stride(0), c, width - c, eps,
        C=triton.next_power_of_2(c), R=triton.next_power_of_2(width - c), INTERLEAVED=interleaved,
        KIND=CACHE_KINDS.get(data.dtype, FLOAT_CACHE), num_warps=2,
    )  # fmt: skip


def gather(
    cache: LatentCache, layer: int, table: Tensor, lengths: list[int], c: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The first lengths[b] cached rows of every sequence of table [B, max_blocks], concatenated.

    -> latents [S, c], keys [S, r], the first row of each sequence [B] int32.
    """
    data = cache.data[layer]
    r, device, total = data.shape[-1] - c, data.device, sum(lengths)
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    first = length.cumsum(0, dtype=torch.int32) - length
    latent = torch.empty(total, c, dtype=dtype, device=device)
    key = torch.empty(total, r, dtype=dtype, device=device)
    scale = data if cache.scale is None else cache.scale[layer]
    _gather[(len(lengths), triton.cdiv(max(lengths), _ROWS))](
        data, scale, table, first, length, latent, key, table.stride(0), cache.block_size, c, r,
        C=triton.next_power_of_2(c), R=triton.next_power_of_2(r), EIGHT_BITS=cache.scale is not None,
        ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return latent, key, first
