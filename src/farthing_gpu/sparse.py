"""Products with sparse weights: 2:4, and blocks of 16 x 16.

Legend: T tokens; N rows, K columns; BM x BN the tile size; BK columns per iteration.

2:4 stores two values of every four adjacent columns and a byte with their positions: 5/8 of the bytes of
16-bit weights. Triton has no sparse tensor-core product, so lanes are rebuilt in registers. This saves memory
traffic, which bounds decoding. The inputs are first arranged by lane (every fourth column), so that weights
need no shuffle.

Block-sparse stores the nonzero blocks per panel of 16 rows; four of them form one product of 64 columns. A
panel's count is padded to a multiple of four with zero blocks. This saves both bytes and arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.weights import Weight
from farthing_gpu.launch import Config, config, dot, widen
from farthing_gpu.matrix import finish

SIDE = 16
_TURN = 4  # blocks per product
BLOCKS_FROM = 0.5  # minimum share of zero blocks for block-sparse storage; an estimate


@dataclass(frozen=True, slots=True)
class TwoOfFour:
    """values [2, N, K / 4], the activations' dtype or int8; places uint8 [N, K / 4] (first | second << 2)."""

    values: Tensor
    places: Tensor
    scale: Tensor | None  # [N] float32 of int8
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """blocks [B, 16, 16], columns int32 [B] (of blocks), starts int32 [N / 16 + 1]."""

    blocks: Tensor
    columns: Tensor
    starts: Tensor
    scale: Tensor | None
    n: int
    k: int


@triton.jit
def _two_of_four(
    x, values, places, scale, residual, out, T, N, K, stride_x, stride_r, stride_o,
    HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BN)
    m = tl.program_id(0) // across * BM + tl.arange(0, BM)
    n = tl.program_id(0) % across * BN + tl.arange(0, BN)
    groups = K // 4
    rows = m.to(tl.int64)[:, None]
    wide = n.to(tl.int64)[None, :] * groups
    plane = N.to(tl.int64) * groups
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, groups, BK // 4):
        g = start + tl.arange(0, BK // 4)
        ok = (n[None, :] < N) & (g[:, None] < groups)
        first = tl.load(values + wide + g[:, None], mask=ok, other=0.0)
        second = tl.load(values + plane + wide + g[:, None], mask=ok, other=0.0)
        place = tl.load(places + wide + g[:, None], mask=ok, other=0)
        for lane in tl.static_range(4):
            at = rows * stride_x + lane * groups + g[None, :]
            a = tl.load(x + at, mask=(m[:, None] < T) & (g[None, :] < groups), other=0.0)
            w = tl.where((place & 3) == lane, first, tl.zeros_like(first))
            w = tl.where((place >> 2) == lane, second, w)
            acc = dot(a, widen(w, a.dtype), acc)
    finish(acc, m, n, T, N, scale, residual, out, stride_r, stride_o, HAS_SCALE, HAS_RESIDUAL)


@triton.jit
def _blocks(
    x, blocks, columns, starts, scale, residual, out, T, N, K, stride_x, stride_r, stride_o,
    HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BM: tl.constexpr, SIDE: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    panel = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n, i = tl.arange(0, SIDE), tl.arange(0, SIDE * TURN)
    rows = m.to(tl.int64)[:, None]
    acc = tl.zeros((BM, SIDE), tl.float32)
    for block in range(tl.load(starts + panel), tl.load(starts + panel + 1), TURN):
        own = block + i // SIDE
        # Runs of 16 adjacent columns, which the compiler cannot infer from loaded indices.
        k = tl.max_contiguous(tl.multiple_of(tl.load(columns + own) * SIDE + i % SIDE, SIDE), SIDE)
        a = tl.load(x + rows * stride_x + k[None, :], mask=(m[:, None] < T) & (k[None, :] < K), other=0.0)
        at = own.to(tl.int64)[:, None] * (SIDE * SIDE) + n[None, :] * SIDE + (i % SIDE)[:, None]
        acc = dot(a, widen(tl.load(blocks + at), a.dtype), acc)
    finish(acc, m, panel * SIDE + n, T, N, scale, residual, out, stride_r, stride_o, HAS_SCALE, HAS_RESIDUAL)


def multiply(
    x: Tensor, weight: TwoOfFour | Blocks, out: Tensor, residual: Tensor | None = None,
    choice: Config | None = None,
) -> None:  # fmt: skip
    """out [T, N] = residual + x [T, K] W^T."""
    tokens = x.shape[0]
    if isinstance(weight, TwoOfFour):
        x = x.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1)  # [T, 4 lanes x K / 4]
    common = dict(HAS_SCALE=weight.scale is not None, HAS_RESIDUAL=residual is not None)
    sizes = (
        tokens, weight.n, weight.k, x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0)
    )  # fmt: skip
    if isinstance(weight, TwoOfFour):
        c = choice or config("two_of_four", tokens, x.device)
        grid = (triton.cdiv(tokens, c.bm) * triton.cdiv(weight.n, c.bn),)
        _two_of_four[grid](
            x, weight.values, weight.places, weight.scale, residual, out, *sizes, **common, BM=c.bm, BN=c.bn,
            BK=c.bk, **c.resources,
        )  # fmt: skip
    else:
        c = choice or config("blocks", tokens, x.device)
        _blocks[(triton.cdiv(weight.n, SIDE), triton.cdiv(tokens, c.bm))](
            x, weight.blocks, weight.columns, weight.starts, weight.scale, residual, out, *sizes, **common,
            BM=c.bm, SIDE=SIDE, TURN=_TURN, **c.resources,
        )  # fmt: skip


def find(weight: Weight, dtype: torch.dtype, device: torch.device) -> TwoOfFour | Blocks | None:
    """The sparse form of a dense or int8 matrix; None if its zeros do not fit one or do not pay off."""
    if weight.format not in ("dense", "int8"):
        return None
    n, k = weight.shape
    data = weight.data.to(device)
    if weight.format == "dense":
        data = data.to(dtype)
    scale = None if weight.scale is None else weight.scale[:, 0].float().to(device).contiguous()
    if k % SIDE == 0 and n % SIDE == 0:
        kept = (data.view(n // SIDE, SIDE, k // SIDE, SIDE) != 0).any(3).any(1)  # [N / 16, K / 16]
        if kept.float().mean() <= 1 - BLOCKS_FROM:
            return pack_blocks(data, kept, scale)
    if k % 4 == 0 and bool(((data.view(n, -1, 4) != 0).sum(-1) <= 2).all()):
        return pack_two_of_four(data, scale)
    return None


def pack_two_of_four(data: Tensor, scale: Tensor | None) -> TwoOfFour:
    """Pack data [N, K] with at most two nonzeros in every four columns."""
    n, k = data.shape
    groups = data.view(n, k // 4, 4)
    # Nonzero lanes first, in order, padded with zeros if there are fewer than two.
    order = (groups == 0).to(torch.int8).sort(dim=-1, stable=True).indices[..., :2]
    values = groups.gather(-1, order)
    places = (order[..., 0] | (order[..., 1] << 2)).to(torch.uint8)
    return TwoOfFour(values.permute(2, 0, 1).contiguous(), places.contiguous(), scale, n, k)


def pack_blocks(data: Tensor, kept: Tensor, scale: Tensor | None) -> Blocks:
    """Pack data [N, K]; kept [N / 16, K / 16]: mask of nonzero blocks."""
    n, k = data.shape
    blocks = data.view(n // SIDE, SIDE, k // SIDE, SIDE).transpose(1, 2)  # [N / 16, K / 16, 16, 16]
    counts = kept.sum(1)
    padded = (counts + _TURN - 1) // _TURN * _TURN
    starts = torch.zeros(len(counts) + 1, dtype=torch.int64, device=data.device)
    torch.cumsum(padded, 0, out=starts[1:])
    panel, column = kept.nonzero(as_tuple=True)
    within = torch.arange(len(panel), device=data.device) - (counts.cumsum(0) - counts)[panel]
    where = starts[panel] + within
    total = int(starts[-1])
    columns = torch.zeros(max(1, total), dtype=torch.int32, device=data.device)
    columns[where] = column.int()
    stored = torch.zeros(max(1, total), SIDE, SIDE, dtype=data.dtype, device=data.device)
    stored[where] = blocks[panel, column]
    return Blocks(stored, columns, starts.int(), scale, n, k)
