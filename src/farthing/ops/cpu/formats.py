"""Formats of the CPU kernels' matrices: chosen for a checkpoint's weights, which are packed in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing import _native
from farthing.ops.arrays import (
    address,
    as_float32,
    contiguous,
    dtype_name,
    is_bfloat16,
    same,
)
from farthing.ops.cpu.stack import vector
from farthing.ops.weights import (
    ALWAYS,
    CELL,
    INTEGERS,
    NEVER,
    Weight,
    costs_of,
    int4_group,
)

if TYPE_CHECKING:
    from torch import Tensor


PackedFormat, Kind = _native.Format, _native.Kind  # defined in native/pack/formats.h and native/pack/pack.h
HOLDING: dict[str, Any] = dict(_native.held_formats())  # stored format -> the packed one of the same values
HELD = {packed: stored for stored, packed in HOLDING.items()}


@dataclass(frozen=True, slots=True)
class Plan:
    """The packed format of a stack of weights."""

    format: Any  # PackedFormat
    group: int = 0


F32 = Plan(PackedFormat.F32)
PLANES_FROM = 128 << 20  # bytes of an 8-bit head, several times what caches hold


def choose(stored: str, columns: int, group: int, quantization: str | None) -> Plan:
    """The packed format of a matrix stored as `float32`, `bfloat16`, `fp8` or integers (with `group` columns
    per scale), which `quantization` rounds unless it holds integers."""
    if quantization is not None and stored not in INTEGERS:
        rounded = int4_group(columns) if quantization == "int4" else columns
        if rounded is not None:
            stored, group = "nl4" if quantization == "int4" else quantization, rounded
    packed = HOLDING.get(stored, PackedFormat.F32)
    if not _native.is_grouped(packed) and stored != "fp8":
        return Plan(packed)
    return Plan(packed, group) if _native.fits_group(packed, group, columns) else F32


def for_head(shared: Plan, n: int, columns: int) -> Plan:
    """The packed format of an output head [n, columns] that other matrices would be packed in as `shared`.

    The bytes of a large 8-bit head are stored as nibbles, of which `greedy` reads the high ones alone.
    """
    large = shared.format == PackedFormat.Q8 and n * columns >= PLANES_FROM
    return Plan(PackedFormat.Q8_PLANES) if large else shared


def packed_bytes(n: int, columns: int, plan: Plan, zero: bool = False) -> int:
    """Bytes of a dense packed matrix [n, columns], as the planner counts it."""
    return int(_native.matrix_bytes(plan.format, plan.group, zero, n, columns))


def _plan_one(w: Weight, quantization: str | None) -> Plan:
    dense = w.format == "dense"
    chosen = choose("float32" if dense else w.format, w.stored[1], w.group_size, quantization)
    return Plan(PackedFormat.BF16) if dense and chosen == F32 and is_bfloat16(w.data) else chosen


def plan(weights: Sequence[Weight], quantization: str | None) -> Plan:
    """The common format of matrices packed together; float32 if their formats or orders differ."""
    plans = {_plan_one(w, quantization) for w in weights}
    alike = len(plans) == 1 and all(same(w.order, weights[0].order) for w in weights)
    return plans.pop() if alike else F32


def _is_held(w: Weight, target: Plan) -> bool:
    """Whether a stored weight is packed as it is, not dequantized first."""
    holding = PackedFormat.Q8 if target.format == PackedFormat.Q8_PLANES else target.format
    return w.format != "dense" and HOLDING[w.format] == holding


def _packed_shape(w: Weight, target: Plan) -> tuple[int, int]:
    return w.stored if _is_held(w, target) else w.shape


def _source(w: Weight, target: Plan) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The native call's tuple (kind, data, scale, zero, n, k, group, minimum, units, units of the minimums,
    rows of an FP8 scale) and the tensors it points into."""
    n, k = _packed_shape(w, target)
    if not _is_held(w, target) and w.format != "fp8":  # which native code converts
        data = w.data if w.format == "dense" else w.dequantize()
        short = dtype_name(data.dtype) == "bfloat16"
        data = contiguous(data) if short else vector(data)
        return (Kind.BF16 if short else Kind.F32, address(data), 0, 0, n, k, k, 0, 0, 0, 1), [data]
    kind = Kind.FP8 if w.format == "fp8" else Kind.INT4 if w.nibbles else Kind.INT8
    assert w.scale is not None
    stored = (w.data, as_float32(w.scale), w.zero_point, w.minimum, *(w.units or (None, None)))
    kept = [None if t is None else contiguous(t) for t in stored]
    data_, scale, zero, *rest = (0 if t is None else address(t) for t in kept)
    rows = w.fp8_block[0] if w.format == "fp8" else 1
    return (kind, data_, scale, zero, n, k, w.group_size, *rest, rows), [t for t in kept if t is not None]


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
    columns = {_packed_shape(w, target)[1] for w in weights}
    if len(columns) != 1:
        raise ValueError(f"matrices with K = {sorted(columns)} cannot be stacked; expected one K")
    sources, alive = zip(*(_source(w, target) for w in weights), strict=True)
    zero = any(w.zero_point is not None and _is_held(w, target) for w in weights)
    if blocks is None:  # padding is no reason: the planner knows the shapes, not the zeros
        whole = columns.pop() % CELL == 0
        costs = costs_of(HELD.get(target.format, ""), native.isa) if whole else NEVER
    else:
        costs = ALWAYS if blocks else NEVER
    packed = native.pack(target.format, target.group, zero, interleave, costs, list(sources))
    del alive
    if (order := weights[0].order) is not None and _is_held(weights[0], target):
        packed.reorder(address(order))
    return packed


def pack_dense(native: Any, matrix: Tensor, quantized: bool) -> Any:
    """Pack a float matrix unchanged, or rounded to int8, with all its blocks."""
    w = Weight("dense", matrix)
    return pack(native, [w], _plan_one(w, "int8" if quantized else None), blocks=False)
