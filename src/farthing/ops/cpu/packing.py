"""Conversion of checkpoint weights to packed matrices: choice of format, and packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing import _native
from farthing.lazy import torch
from farthing.ops.blocks import ALWAYS, CELL, NEVER, costs_of
from farthing.ops.weights import Weight, int4_group

if TYPE_CHECKING:
    from torch import Tensor

PackedFormat, Kind = _native.Format, _native.Kind  # defined in native/formats.h and native/pack.h
HOLDING: dict[str, Any] = dict(_native.held_formats())  # stored format -> the packed one of the same values
HELD = {packed: stored for stored, packed in HOLDING.items()}


@dataclass(frozen=True, slots=True)
class Plan:
    """The packed format of a stack of weights."""

    format: Any  # PackedFormat
    group: int = 0


F32 = Plan(PackedFormat.F32)
_INTEGERS = (PackedFormat.Q8, PackedFormat.Q8_PLANES, PackedFormat.Q4, PackedFormat.NL4)
PLANES_FROM = 128 << 20  # bytes of an 8-bit head, several times what caches hold


def choose(stored: str, columns: int, group: int, quantization: str | None) -> Plan:
    """The packed format of a matrix stored as `float32`, `bfloat16`, `fp8`, `int8` or `int4` (with `group`
    columns per scale), which `quantization` rounds unless it holds integers."""
    if quantization is not None and stored not in ("int8", "int4"):
        rounded = int4_group(columns) if quantization == "int4" else columns
        if rounded is not None:
            stored, group = "nl4" if quantization == "int4" else quantization, rounded
    found = HOLDING.get(stored, PackedFormat.F32)
    if not _native.is_grouped(found):
        return Plan(found)
    return Plan(found, group) if _native.fits_group(found, group, columns) else F32


def for_head(found: Plan, n: int, columns: int) -> Plan:
    """The packed format of an output head [n, columns] that other matrices would be packed in as `found`.

    The bytes of a large 8-bit head are stored as nibbles, of which `greedy` reads the high ones alone.
    """
    large = found.format == PackedFormat.Q8 and n * columns >= PLANES_FROM
    return Plan(PackedFormat.Q8_PLANES) if large else found


def packed_bytes(n: int, columns: int, plan: Plan, zero: bool = False) -> int:
    """Bytes of a dense packed matrix [n, columns], as the planner counts it."""
    return int(_native.matrix_bytes(plan.format, plan.group, zero, n, columns))


def _lossless_bf16(t: Tensor) -> bool:
    return t.dtype == torch.bfloat16 or bool((t.bfloat16().to(t.dtype) == t).all())


def _plan_one(w: Weight, quantization: str | None) -> Plan:
    dense = w.format == "dense"
    found = choose("float32" if dense else w.format, w.shape[1], w.group_size, quantization)
    return Plan(PackedFormat.BF16) if dense and found == F32 and _lossless_bf16(w.data) else found


def plan(weights: Sequence[Weight], quantization: str | None) -> Plan:
    """The common format of matrices packed together; float32 if their formats differ."""
    plans = {_plan_one(w, quantization) for w in weights}
    return plans.pop() if len(plans) == 1 else F32


def _is_held(w: Weight, target: Plan) -> bool:
    """Whether a stored weight is packed as it is, not dequantized first."""
    holding = PackedFormat.Q8 if target.format == PackedFormat.Q8_PLANES else target.format
    return w.format != "dense" and HOLDING[w.format] == holding


def _finite(w: Weight) -> bool:
    """Whether FP8 values have no NaN; native code checks everything else that it rounds."""
    return w.format != "fp8" or bool(((w.data.view(torch.uint8) & 0x7F) != 0x7F).all())


def _source(w: Weight, target: Plan) -> tuple[tuple[Any, int, int, int, int, int, int], list[Tensor]]:
    """The native call's tuple (kind, data, scale, zero, n, k, group) and the tensors it points into."""
    n, k = w.shape
    if not _is_held(w, target) and w.format != "fp8":  # which native code converts
        data = w.data if w.format == "dense" else w.dequantize()
        data = data.contiguous() if data.dtype == torch.bfloat16 else data.float().contiguous()
        kind = Kind.BF16 if data.dtype == torch.bfloat16 else Kind.F32
        return (kind, data.data_ptr(), 0, 0, n, k, k), [data]
    assert w.scale is not None
    kind = Kind[w.format.upper()]
    tensors = [w.data.contiguous(), w.scale.float().contiguous()]
    if w.zero_point is not None:
        tensors.append(w.zero_point.contiguous())
    zero = tensors[2].data_ptr() if w.zero_point is not None else 0
    return (kind, tensors[0].data_ptr(), tensors[1].data_ptr(), zero, n, k, w.group_size), tensors


def pack(
    native: Any,
    weights: Sequence[Weight],
    target: Plan,
    interleave: bool = False,
    blocks: bool | None = None,
) -> Any:
    """Pack matrices [N_i, K] stacked along their rows (or two of them interleaved) into one.

    blocks: whether blocks of zeros are left out; by default, where that saves time.
    """
    columns = {w.shape[1] for w in weights}
    if len(columns) != 1:
        raise ValueError(f"matrices with K = {sorted(columns)} cannot be stacked; expected one K")
    if target.format in _INTEGERS and not all(_is_held(w, target) or _finite(w) for w in weights):
        raise ValueError("got NaN or infinity; expected finite values, because they are rounded to integers")
    sources, alive = zip(*(_source(w, target) for w in weights), strict=True)
    zero = any(w.zero_point is not None and _is_held(w, target) for w in weights)
    if blocks is None:  # padding is no reason: the planner knows the shapes, not the zeros
        whole = columns.pop() % CELL == 0
        costs = costs_of(HELD.get(target.format, ""), native.isa) if whole else NEVER
    else:
        costs = ALWAYS if blocks else NEVER
    packed = native.pack(target.format, target.group, zero, interleave, costs, list(sources))
    del alive
    return packed


def pack_dense(native: Any, matrix: Tensor, quantized: bool) -> Any:
    """Pack a float matrix unchanged, or rounded to int8, with all its blocks."""
    w = Weight("dense", matrix)
    return pack(native, [w], _plan_one(w, "int8" if quantized else None), blocks=False)
