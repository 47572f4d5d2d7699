"""Weights on a GPU: one layout per storage format, and the product of one tile in each.

Legend: E matrices per stack (experts), N rows, K columns, g group size of int4.

| format | data | scale float32 | zero |
|---|---|---|---|
| dense | activations' dtype [E, N, K] | - | - |
| int8 | int8 or float8_e4m3fn [E, N, K] | [E, N] | - |
| int4, mxfp4 | uint8 [E, N, P h], P = ceil(K / 2h) | [E, N, 2 ceil(K / 2g)] | int8 as scale, or None |
| q4_1 | as int4, q = u | as int4 | float32 as scale: minimums |
| int8_groups | int8 or float8_e4m3fn [E, N, K] | [E, N, K / g] | float32 as scale: minimums, or None |
| fp8 | float8_e4m3fn [E, N, K] | [E, row blocks, ceil(K / 128)] | - |

4 bits: each run of h bytes has h columns in the low nibbles and the next h columns in the high nibbles. Both
halves are then plain tiles of adjacent columns, without shuffles. h divides g, so that a half has one scale
per row.

A gated pair (gate and up) is one matrix of 2 I rows, gate_i at 2 i and up_i at 2 i + 1: a tile has both
operands of silu(gate) * up. In FP8 gate's rows come first, then up's, like their scale blocks, and a program
processes a tile of each.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from farthing.ops.arrays import same
from farthing.ops.weights import FP8_BLOCK, Weight
from farthing_gpu.launch import dot, narrow, widen

log = logging.getLogger(__name__)

DENSE = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)
FP8 = tl.constexpr(3)
MXFP4 = tl.constexpr(4)
Q4_1 = tl.constexpr(5)
INT8_GROUPS = tl.constexpr(6)
_BLOCK = tl.constexpr(128)  # rows and columns of an FP8 scale


@triton.jit
def product(
    x, rows, live, x_scale, order, w, w_scale, w_zero, n, N, K,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, HAS_ZERO: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x rows [BM] (element offsets, int64; x_scale of FP8: by row number) times w rows n [BN], transposed.

    order [K], of formats with groups: the column of x that each column multiplies, or -1; None: the same.
    live [BM]: rows that exist. For FP8 `rows` counts rows of K columns each.

    Legend: BM x BN the tile size; K input columns; BK columns per iteration. x rows are given individually,
    so that a grouped product can gather its tokens on load.

    Accumulation is float32. FP8 follows DeepGEMM: the tensor cores sum 128 columns, then the partial sum is
    scaled and added in a separate register, because the tensor cores' accumulator keeps only about 14 bits.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    if FORMAT == FP8:
        acc = _fp8(acc, x, rows, live, x_scale, w, w_scale, n, N, K)
    elif FORMAT == INT8_GROUPS:
        acc = _int8_groups(acc, x, rows, live, order, w, w_scale, w_zero, n, N, K, GROUP, HALF, HAS_ZERO)
    elif GROUP > 1:
        acc = _nibbles(acc, x, rows, live, order, w, w_scale, w_zero, n, N, K, FORMAT, GROUP, HALF, HAS_ZERO)
    else:
        wide = w + n.to(tl.int64)[None, :] * K
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            a = tl.load(x + rows[:, None] + k[None, :], mask=live[:, None] & (k[None, :] < K), other=0.0)
            b = tl.load(wide + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
            acc = dot(a, widen(b, a.dtype), acc)
        if FORMAT == INT8:
            acc = acc * tl.load(w_scale + n, mask=n < N, other=0.0)[None, :]
    return acc


@triton.jit
def _inputs(x, rows, live, order, k, K):
    """Columns k of x's rows, in the order of a matrix that has one."""
    at, exists = k, k < K
    if order is not None:
        at = tl.load(order + k, mask=exists, other=-1)
        exists = at >= 0
    return tl.load(x + rows[:, None] + at[None, :], mask=live[:, None] & exists[None, :], other=0.0)


@triton.jit
def _nibbles(
    acc, x, rows, live, order, w, w_scale, w_zero, n, N, K,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, HAS_ZERO: tl.constexpr,
):  # fmt: skip
    runs = (K + 2 * HALF - 1) // (2 * HALF)
    groups = (K + 2 * GROUP - 1) // (2 * GROUP) * 2
    j = tl.arange(0, HALF)
    wide = w + n.to(tl.int64)[None, :] * (runs * HALF)
    ok = n < N
    for run in range(0, runs):
        codes = tl.load(wide + run * HALF + j[:, None], mask=ok[None, :], other=0)
        for high in tl.static_range(2):
            start = run * 2 * HALF + high * HALF
            a = _inputs(x, rows, live, order, start + j, K)
            code = ((codes >> 4) if high else (codes & 15)).to(tl.int8)
            where = n * groups + start // GROUP
            scale = tl.load(w_scale + where, mask=ok, other=0.0)
            if FORMAT == MXFP4:  # twice the value: 0 to 3, then 4, 6, 8, 12
                m = code & 7
                m = tl.where(m < 4, m, (2 + (m & 1)) << ((m >> 1) - 1).to(tl.int8)).to(tl.int8)
                code = tl.where(code > 7, -m, m)
            elif FORMAT == INT4:
                code = code - 8
                if HAS_ZERO:
                    code = code - tl.load(w_zero + where, mask=ok, other=0)[None, :]
            part = dot(a, widen(code, a.dtype), tl.zeros_like(acc))
            acc += part * scale[None, :]
            if FORMAT == Q4_1:
                acc += _minimums(a, w_zero + where, ok)
    return acc


@triton.jit
def _minimums(a, minimum, ok):
    least = tl.load(minimum, mask=ok, other=0.0)
    return tl.sum(a.to(tl.float32), 1)[:, None] * least[None, :]


@triton.jit
def _int8_groups(
    acc, x, rows, live, order, w, w_scale, w_zero, n, N, K,
    GROUP: tl.constexpr, STEP: tl.constexpr, HAS_ZERO: tl.constexpr,
):  # fmt: skip
    groups = K // GROUP
    j = tl.arange(0, STEP)
    wide = w + n.to(tl.int64)[None, :] * K
    ok = n < N
    for start in range(0, K, STEP):
        k = start + j
        a = _inputs(x, rows, live, order, k, K)
        b = tl.load(wide + k[:, None], mask=ok[None, :] & (k[:, None] < K), other=0.0)
        where = n * groups + start // GROUP
        part = dot(a, widen(b, a.dtype), tl.zeros_like(acc))
        acc += part * tl.load(w_scale + where, mask=ok, other=0.0)[None, :]
        if HAS_ZERO:
            acc += _minimums(a, w_zero + where, ok)
    return acc


@triton.jit
def _fp8(acc, x, rows, live, x_scale, w, w_scale, n, N, K):
    blocks = (K + _BLOCK - 1) // _BLOCK
    j = tl.arange(0, _BLOCK)
    wide = w + n.to(tl.int64)[None, :] * K
    scales = w_scale + tl.min(n, 0) // _BLOCK * blocks  # a tile of at most 128 rows is in one scale block
    for block in range(0, blocks):
        # Issue plain memory loads before the product that waits for the tensor cores.
        scale = tl.load(x_scale + rows * blocks + block, mask=live, other=0.0) * tl.load(scales + block)
        k = block * _BLOCK + j
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=live[:, None] & (k[None, :] < K), other=0.0)
        b = tl.load(wide + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        acc += dot(a, b, tl.zeros_like(acc)) * scale[:, None]
    return acc


@triton.jit
def fp8_twice(x, rows, live, x_scale, w, w_scale, n, far, N, M, K, BM: tl.constexpr, BN: tl.constexpr):
    """x rows [BM] times w rows n [BN] that are less than N, and times rows n + far where n is less than M.

    The input is loaded once for both: two tiles of 128 rows read a quarter less from L2 than as two programs,
    and while one warp group accumulates its first tile, the other uses the tensor cores. Each tile is in one
    scale block.
    """
    blocks = (K + _BLOCK - 1) // _BLOCK
    j = tl.arange(0, _BLOCK)
    near = w + n.to(tl.int64)[None, :] * K
    step = tl.cast(far, tl.int64) * K
    start = tl.min(n, 0)
    scales = w_scale + start // _BLOCK * blocks
    scale_step = (far + _BLOCK - 1) // _BLOCK * blocks
    first = tl.zeros((BM, BN), tl.float32)
    second = tl.zeros((BM, BN), tl.float32)
    for block in range(0, blocks):
        x_s = tl.load(x_scale + rows * blocks + block, mask=live, other=0.0)
        s = tl.load(scales + block)
        t = tl.load(scales + scale_step + block, mask=start < M, other=0.0)
        k = block * _BLOCK + j
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=live[:, None] & (k[None, :] < K), other=0.0)
        b = tl.load(near + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        c = tl.load(near + step + k[:, None], mask=(n[None, :] < M) & (k[:, None] < K), other=0.0)
        first += dot(a, b, tl.zeros_like(first)) * (x_s * s)[:, None]
        second += dot(a, c, tl.zeros_like(second)) * (x_s * t)[:, None]
    return first, second


@triton.jit
def finish(
    acc, m, n, T, N, scale, residual, out, stride_r, stride_o,
    HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out [T, N] at rows m, columns n = residual + scale [N] * acc."""
    if HAS_SCALE:
        acc = acc * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    mask = (m[:, None] < T) & (n[None, :] < N)
    rows = m.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual + rows * stride_r + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * stride_o + n[None, :], narrow(acc, out.dtype.element_ty), mask=mask)


FORMATS = {
    "dense": 0, "int8": 1, "int4": 2, "fp8": 3, "mxfp4": 4, "q4_1": 5, "int8_groups": 6,
}  # as the kernels number them  # fmt: skip
_HOLDING = {"q4_k": "q4_1"} | dict.fromkeys(
    ("nl4", "iq4_nl", "iq4_xs", "q5_0", "q5_1", "q5_k", "q6_k"), "int8_groups"
)
_MOST_HALF = 64
_LEAST_HALF = 16  # the smallest inner dimension on tensor cores


@dataclass(frozen=True, slots=True)
class Matrix:
    """A packed stack; see the table above."""

    format: str
    data: Tensor
    scale: Tensor | None
    zero: Tensor | None
    n: int
    k: int
    group: int = 0  # columns that share a scale, of formats that have groups
    # float32 [E]: calibrated scales of the inputs, which are passed as integers; `scale` includes them (int8)
    inputs: Tensor | None = None
    order: Tensor | None = None  # int32 [E, k]: the input's column of each of its columns, or -1
    padding: int = 0  # columns without one

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        parts = (self.data, self.scale, self.zero, self.order)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @property
    def half(self) -> int:
        """Columns in each half of a run of nibbles, or multiplied at once; 0 without groups."""
        return half_of(self.group) if self.group else 0


def half_of(group: int) -> int:
    """The largest power of two that divides a group, at most 64; ValueError below 16."""
    half = min(group & -group, _MOST_HALF)
    if half < _LEAST_HALF:
        raise ValueError(f"group size: got {group}; expected a multiple of {_LEAST_HALF}")
    return half


def pack(
    weight: Weight,
    dtype: torch.dtype,
    device: torch.device,
    fp8: bool = True,
    inputs: float | None = None,
    quantize: bool = True,
) -> Matrix:
    """Pack one matrix, E = 1. fp8: whether the device supports FP8; else it is stored in `dtype`.

    inputs: calibrated scale of the input of an int8 matrix.
    quantize: whether inputs of FP8 in blocks are FP8 too.
    """
    n, k = weight.shape
    if weight.format == "dense" or (weight.format == "fp8" and not fp8):
        value = weight.data.to(dtype) if weight.format == "dense" else weight.dequantize(dtype)
        return Matrix("dense", value.to(device).contiguous()[None], None, None, n, k)
    assert weight.scale is not None
    scale = weight.scale.float().to(device)[None]
    if weight.format == "int8":
        ranges = None if inputs is None else torch.full((1,), inputs, device=device)
        rows = scale[..., 0].contiguous() if ranges is None else scale[..., 0] * ranges
        return Matrix("int8", weight.data.to(device).contiguous()[None], rows, None, n, k, inputs=ranges)
    if weight.format == "fp8" and not (quantize and in_blocks(weight)):
        return _pack_scaled(weight, dtype, device)
    if weight.format == "fp8":
        return Matrix("fp8", weight.data.to(device).contiguous()[None], scale.contiguous(), None, n, k)
    return _pack_groups(weight, device)


def in_blocks(weight: Weight) -> bool:
    """Whether it is FP8 whose products have inputs in FP8."""
    return weight.format == "fp8" and weight.fp8_block == (FP8_BLOCK, FP8_BLOCK)


def _pack_scaled(weight: Weight, dtype: torch.dtype, device: torch.device) -> Matrix:
    """FP8 with a scale per row or group, which take the places of int8: they are widened alike."""
    n, k = weight.shape
    group, scale = weight.fp8_block[1], weight.scale
    assert scale is not None
    data, scale = weight.data.to(device).contiguous()[None], scale.float().to(device)
    if bool((scale == scale[:, :1]).all()) and len(scale) == n:
        return Matrix("int8", data, scale[None, :, 0].contiguous(), None, n, k)
    scale = scale.repeat_interleave(weight.fp8_block[0], 0)[:n]
    if k % group:
        log.warning("FP8 of %d x %d with groups of %d is decoded to %s", n, k, group, dtype)
        return Matrix("dense", weight.dequantize(dtype).to(device)[None], None, None, n, k)
    return Matrix("int8_groups", data, scale.contiguous()[None], None, n, k, group)


def _pack_groups(weight: Weight, device: torch.device) -> Matrix:
    n, k = weight.stored
    name, group, scale = _HOLDING.get(weight.format, weight.format), weight.group_size, weight.scale
    zero = weight.zero_point if weight.minimum is None else weight.minimum
    assert scale is not None
    if name == "int8_groups" and weight.zero_point is not None:
        zero = -(weight.zero_point.float() * scale.float())
    half, scale = half_of(group), scale.float().to(device)
    zero = None if zero is None else zero.to(device)
    if name == "int8_groups":
        data = weight.quantized().to(device).contiguous()
    else:
        pairs = weight.data.to(device)
        codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)
        codes = F.pad(codes, (0, -k % (2 * half))).view(n, -1, 2, half)
        data = (codes[:, :, 0] | (codes[:, :, 1] << 4)).flatten(1).contiguous()
        # Padded columns may belong to a group that does not exist; its scale is zero.
        spare = scale.shape[1] % 2
        scale = F.pad(scale, (0, spare))
        zero = None if zero is None else F.pad(zero, (0, spare))
    zero = None if zero is None else zero.contiguous()[None]
    order = None if weight.order is None else weight.order.to(device, torch.int32)[None]
    padding = k - weight.shape[1]
    return Matrix(name, data[None], scale.contiguous()[None], zero, n, k, group, None, order, padding)


def stack_rows(parts: Sequence[Matrix]) -> list[Matrix]:
    """Merge matrices of one input along N where their formats allow it, keeping their order."""
    merged: list[Matrix] = [parts[0]]
    for m in parts[1:]:
        last = merged[-1]
        alike = (last.format, last.k, last.group) == (m.format, m.k, m.group)
        alike = alike and last.data.dtype == m.data.dtype and same(last.order, m.order)
        if not alike or (last.format == "fp8" and last.n % FP8_BLOCK):
            merged.append(m)
            continue
        zero = _zeros(last, m)
        merged[-1] = Matrix(
            m.format, torch.cat((last.data, m.data), 1), _cat(last.scale, m.scale), zero, last.n + m.n, m.k,
            m.group, m.inputs, m.order, m.padding,
        )  # fmt: skip
    return merged


def pair(gate: Matrix, up: Matrix) -> Matrix:
    """gate [I, D] and up [I, D] -> one matrix [2 I, D]: interleaved rows; in FP8 concatenated."""
    kinds = [(m.format, m.n, m.k, m.group, m.data.dtype) for m in (gate, up)]
    if kinds[0] != kinds[1] or not same(gate.order, up.order):
        raise ValueError(
            f"gate is {gate.format} {gate.n} x {gate.k} and up {up.format} {up.n} x {up.k}; "
            f"expected one format"
        )

    def alternate(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.stack((a, b), 2).flatten(1, 2).contiguous()

    join = _cat if gate.format == "fp8" else alternate
    data, scale = join(gate.data.view(torch.uint8), up.data.view(torch.uint8)), join(gate.scale, up.scale)
    assert data is not None
    zero = alternate(_zero(gate), _zero(up)) if gate.zero is not None or up.zero is not None else None
    return Matrix(
        gate.format, data.view(gate.data.dtype), scale, zero, 2 * gate.n, gate.k, gate.group, gate.inputs,
        gate.order, gate.padding,
    )  # fmt: skip


class MatrixStack:
    """Experts' matrices of one kind (`kind_of`), copied into one as they arrive."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._whole: Matrix | None = None

    def add(self, m: Matrix) -> None:
        """The next expert's."""
        if self._whole is None:
            self._whole = _with(
                m, [None if t is None else t.new_empty((self._most, *t.shape[1:])) for t in _parts(m)]
            )
        for whole, part in zip(_parts(self._whole), _parts(m), strict=True):
            if whole is not None and part is not None:
                whole[self._count] = part[0]
        self._count += 1

    def matrix(self) -> Matrix:
        """All of them, without the room for more."""
        if self._whole is None:
            raise ValueError("there are no experts to stack; expected at least one")
        if self._count == self._most:
            return self._whole
        return _with(
            self._whole, [None if t is None else t[: self._count].clone() for t in _parts(self._whole)]
        )


def _with(m: Matrix, parts: Sequence[Tensor | None]) -> Matrix:
    data, scale, zero, inputs, order = parts
    assert data is not None
    return replace(m, data=data, scale=scale, zero=zero, inputs=inputs, order=order)


def _parts(m: Matrix) -> tuple[Tensor | None, ...]:
    return m.data, m.scale, m.zero, m.inputs, m.order


def kind_of(m: Matrix) -> tuple[object, ...]:
    """What is equal for matrices in one stack."""
    parts = m.zero is None, m.inputs is None, m.order is None
    return m.format, m.n, m.k, m.group, m.data.dtype, *parts


def _cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat((a, b), 1)


def _zero(m: Matrix) -> Tensor:
    assert m.scale is not None
    dtype = torch.int8 if m.format == "int4" else torch.float32
    return torch.zeros(m.scale.shape, dtype=dtype, device=m.scale.device) if m.zero is None else m.zero


def _zeros(a: Matrix, b: Matrix) -> Tensor | None:
    return None if a.zero is None and b.zero is None else torch.cat((_zero(a), _zero(b)), 1)
