"""Gated DeltaNet on a GPU: the convolution of all tokens, then one program per piece of a head's state.

Legend: T tokens; B sequences; C channels of the convolution, W tokens wide; Hk key heads; Hv value heads;
dk, dv their sizes. A state [dk, dv] is divided by columns, which do not depend on each other, into pieces
that stay in registers while a sequence's tokens pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.api import Place
from farthing.ops.delta import NORM_EPS, Delta, pack_delta
from farthing.ops.selection import sequences_of
from farthing.ops.specs import DeltaParts, DeltaSpec
from farthing_gpu.launch import silu, widen

_CHANNELS = 256  # of a program of the convolution
_COLUMNS = 32  # of a state, at most


@triton.jit
def _convolve(
    x,
    weight,
    tail,
    slots,
    sequences,
    positions,
    starts,
    out,
    stride_x,
    C,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    sequence = tl.load(sequences + token)
    position = tl.load(positions + token)
    first = tl.load(starts + sequence)
    kept = tail + tl.load(slots + sequence).to(tl.int64) * (W - 1) * C
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(W):
        back = W - 1 - i
        w = tl.load(weight + i * C + c, mask=mask, other=0.0)
        # Of this step, of an earlier one, or before the sequence: zeros.
        here = tl.where(token - back >= first, C, 0)
        value = widen(tl.load(x + (token - back) * stride_x + c, mask=c < here, other=0.0), tl.float32)
        if back > 0:
            earlier = tl.where(position >= back, C - here, 0)
            row = (position - back + W - 1) % (W - 1)
            value += tl.load(kept + row * C + c, mask=c < earlier, other=0.0)
        total += w * value
    tl.store(out + token * C + c, silu(total), mask=mask)


@triton.jit
def keep_tail(
    x, tail, slots, sequences, positions, starts, stride_x, C, W: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The convolution's input x [T, C] of each sequence's last W - 1 tokens, to its slot's rows of tail."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.load(sequences + token)
    kept = tl.where(token + W - 1 >= tl.load(starts + sequence + 1), C, 0)
    row = tl.load(slots + sequence).to(tl.int64) * (W - 1) + tl.load(positions + token) % (W - 1)
    value = widen(tl.load(x + token * stride_x + c, mask=c < C, other=0.0), tl.float32)
    tl.store(tail + row * C + c, value, mask=c < kept)


@triton.jit
def _advance(
    qkv, gates, rate, shift, state, slots, positions, starts, out, stride_g, C, eps, scale, HK: tl.constexpr,
    HV: tl.constexpr, dk: tl.constexpr, dv: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, DK), tl.program_id(2) * BV + tl.arange(0, BV)
    key = head // (HV // HK) * dk
    seen = (i < dk)[:, None] & (j < dv)[None, :]
    own = (
        state + (tl.load(slots + sequence).to(tl.int64) * HV + head) * dk * dv + i[:, None] * dv + j[None, :]
    )
    first = tl.load(starts + sequence).to(tl.int64)
    steps = tl.load(starts + sequence + 1) - first
    continued = tl.where(tl.load(positions + first) > 0, dk, 0)
    s = tl.load(own, mask=(i < continued)[:, None] & (j < dv)[None, :], other=0.0)
    row, gate, to = qkv + first * C, gates + first * stride_g + head, out + first * HV * dv + head * dv
    rate_h, shift_h = tl.load(rate + head), tl.load(shift + head)
    for _ in range(steps):
        q = tl.load(row + key + i, mask=i < dk, other=0.0)
        k = tl.load(row + HK * dk + key + i, mask=i < dk, other=0.0)
        v = tl.load(row + 2 * HK * dk + head * dv + j, mask=j < dv, other=0.0)
        q = q * (scale / tl.sqrt(tl.sum(q * q, 0) + eps))
        k = k / tl.sqrt(tl.sum(k * k, 0) + eps)
        b = widen(tl.load(gate), tl.float32)
        a = widen(tl.load(gate + HV), tl.float32) + shift_h
        soft = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
        s = s * tl.exp(rate_h * soft)
        d = (v - tl.sum(s * k[:, None], 0)) / (1.0 + tl.exp(-b))
        s = s + k[:, None] * d[None, :]
        tl.store(to + j, tl.sum(s * q[:, None], 0), mask=j < dv)
        row += C
        gate += stride_g
        to += HV * dv
    tl.store(own, s, mask=seen)


def pack(spec: DeltaSpec, parts: DeltaParts, vector: Callable[[Tensor], Tensor]) -> Delta:
    """vector: copies a parameter to the device."""
    return pack_delta(spec, parts, vector)


def advance(x: Tensor, gates: Tensor, d: Delta, place: Place) -> Tensor:
    """`Ops.delta` of rows with unit column stride."""
    batch, state, layer = place.batch, place.cache.state, place.row
    assert batch.state_slots is not None and state is not None
    s, tokens, slots = d.spec, x.shape[0], batch.state_slots
    sequences, tail = sequences_of(batch).to(torch.int32), state.tail[layer]
    where = slots, sequences, batch.positions, batch.query_start
    grid = tokens, triton.cdiv(s.channels, _CHANNELS)
    qkv = torch.empty(tokens, s.channels, device=x.device)
    _convolve[grid](
        x, d.parts.conv, tail, *where, qkv, x.stride(0), s.channels, W=s.width, BLOCK=_CHANNELS
    )  # fmt: skip
    keep_tail[grid](x, tail, *where, x.stride(0), s.channels, W=s.width, BLOCK=_CHANNELS)
    out = torch.empty(tokens, s.value_heads, s.value_dim, device=x.device)
    columns = min(_COLUMNS, triton.next_power_of_2(s.value_dim))
    _advance[(slots.shape[0], s.value_heads, triton.cdiv(s.value_dim, columns))](
        qkv, gates, d.parts.rate, d.parts.shift, state.data[layer], slots, batch.positions, batch.query_start,
        out, gates.stride(0), s.channels, NORM_EPS, s.key_dim**-0.5, HK=s.key_heads, HV=s.value_heads,
        dk=s.key_dim, dv=s.value_dim, DK=triton.next_power_of_2(s.key_dim), BV=columns,
    )  # fmt: skip
    normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + s.norm_eps) * d.parts.norm
    return (normed.flatten(1) * F.silu(x[:, s.channels :].float())).to(x.dtype)
