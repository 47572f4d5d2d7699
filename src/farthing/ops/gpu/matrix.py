"""Weights on the device: one layout per storage format, for one matrix or a stack of E equal shapes.

Legend: E matrices per stack (experts), N rows, K columns, g group size of int4.

| format | data | scale float32 | zero |
|---|---|---|---|
| dense | activations' dtype [E, N, K] | - | - |
| int8 | int8 [E, N, K] | [E, N] | - |
| int4 | uint8 [E, N, P h], P = ceil(K / 2h) | [E, N, 2 ceil(K / 2g)] | int8 as scale, or None |
| fp8 | float8_e4m3fn [E, N, K] | [E, row blocks, ceil(K / 128)] | - |

int4: each run of h bytes has h columns in the low nibbles and the next h columns in the high nibbles. Both
halves are then plain tiles of adjacent columns, without shuffles. h divides g, so that a half has one scale
per row.

A gated pair (gate and up) is one matrix of 2 I rows, gate_i at 2 i and up_i at 2 i + 1: a tile has both
operands of silu(gate) * up. In FP8 gate's rows come first, then up's, like their scale blocks, and a program
processes a tile of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops.weights import FP8_BLOCK, Weight

FORMATS = {"dense": 0, "int8": 1, "int4": 2, "fp8": 3}  # as in tile.py
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
    group: int = 0  # int4
    # float32 [E]: calibrated scales of the inputs, which are passed as integers; `scale` includes them (int8)
    inputs: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale, self.zero) if t is not None)

    @property
    def half(self) -> int:
        """Columns in each half of an int4 run."""
        return half_of(self.group) if self.format == "int4" else 0


def half_of(group: int) -> int:
    """The largest power of two that divides the group, at most 64; ValueError below 16."""
    half = min(group & -group, _MOST_HALF)
    if half < _LEAST_HALF:
        raise ValueError(f"int4 group size: got {group}; expected a multiple of {_LEAST_HALF}")
    return half


def pack(
    weight: Weight, dtype: torch.dtype, device: torch.device, fp8: bool = True, inputs: float | None = None
) -> Matrix:
    """Pack one matrix, E = 1. fp8: whether the device supports FP8; else it is stored in `dtype`.

    inputs: calibrated scale of the input of an int8 matrix.
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
    if weight.format == "fp8":
        return Matrix("fp8", weight.data.to(device).contiguous()[None], scale.contiguous(), None, n, k)
    return _pack_int4(weight, device)


def _pack_int4(weight: Weight, device: torch.device) -> Matrix:
    n, k = weight.shape
    group, scale, zero = weight.group_size, weight.scale, weight.zero_point
    assert scale is not None
    half = half_of(group)
    codes = (weight.quantized().to(device) + 8).to(torch.uint8)
    codes = F.pad(codes, (0, -k % (2 * half)), value=8).view(n, -1, 2, half)
    data = (codes[:, :, 0] | (codes[:, :, 1] << 4)).flatten(1).contiguous()
    # Padded columns may belong to a group that does not exist; its scale is zero.
    spare = scale.shape[1] % 2
    scale = F.pad(scale.float().to(device), (0, spare)).contiguous()
    if zero is not None:
        zero = F.pad(zero.to(device), (0, spare)).contiguous()[None]
    return Matrix("int4", data[None], scale[None], zero, n, k, group)


def stack_rows(parts: Sequence[Matrix]) -> list[Matrix]:
    """Merge matrices of one input along N where their formats allow it, keeping their order."""
    merged: list[Matrix] = [parts[0]]
    for m in parts[1:]:
        last = merged[-1]
        alike = (last.format, last.k, last.group) == (m.format, m.k, m.group)
        if not alike or (last.format == "fp8" and last.n % FP8_BLOCK):
            merged.append(m)
            continue
        zero = _zeros(last, m)
        merged[-1] = Matrix(
            m.format, torch.cat((last.data, m.data), 1), _cat(last.scale, m.scale), zero, last.n + m.n, m.k,
            m.group, m.inputs,
        )  # fmt: skip
    return merged


def pair(gate: Matrix, up: Matrix) -> Matrix:
    """gate [I, D] and up [I, D] -> one matrix [2 I, D]: interleaved rows; in FP8 concatenated."""
    if (gate.format, gate.n, gate.k, gate.group) != (up.format, up.n, up.k, up.group):
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
        gate.format, data.view(gate.data.dtype), scale, zero, 2 * gate.n, gate.k, gate.group, gate.inputs
    )


def stack_experts(parts: Iterable[Matrix], count: int) -> Matrix:
    """`count` experts of one shape and format -> one stack, filled as they arrive."""
    stack: Matrix | None = None
    for i, m in enumerate(parts):
        if stack is None:
            data, scale, zero, inputs = (
                None if t is None else t.new_empty((count, *t.shape[1:])) for t in _parts(m)
            )
            assert data is not None
            stack = replace(m, data=data, scale=scale, zero=zero, inputs=inputs)
        if _kind(m) != _kind(stack):
            raise ValueError(
                f"expert {i} is {m.format} {m.n} x {m.k}, the first {stack.format} {stack.n} x {stack.k}; "
                f"expected one format and shape"
            )
        for whole, part in zip(_parts(stack), _parts(m), strict=True):
            if whole is not None and part is not None:
                whole[i] = part[0]
    if stack is None:
        raise ValueError("there are no experts to stack; expected at least one")
    return stack


def _parts(m: Matrix) -> tuple[Tensor | None, ...]:
    return m.data, m.scale, m.zero, m.inputs


def _kind(m: Matrix) -> tuple[object, ...]:
    return m.format, m.n, m.k, m.group, m.zero is None, m.inputs is None


def _cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat((a, b), 1)


def _zero(m: Matrix) -> Tensor:
    assert m.scale is not None
    return torch.zeros(m.scale.shape, dtype=torch.int8, device=m.scale.device) if m.zero is None else m.zero


def _zeros(a: Matrix, b: Matrix) -> Tensor | None:
    return None if a.zero is None and b.zero is None else torch.cat((_zero(a), _zero(b)), 1)
