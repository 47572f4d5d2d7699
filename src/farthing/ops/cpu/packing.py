"""Conversion of checkpoint weights to packed matrices: choice of format, and packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing import _native
from farthing.lazy import torch
from farthing.ops.weights import InputRounding, Weight

if TYPE_CHECKING:
    from torch import Tensor

# Share of zero 16 x 16 blocks from which the block-sparse form is faster than the dense one.
SPARSE_FROM = 0.2


PackedFormat, Kind = _native.Format, _native.Kind  # defined in native/matrix.h and native/pack.h


@dataclass(frozen=True, slots=True)
class Plan:
    """The packed format of a stack of weights."""

    format: Any  # PackedFormat
    group: int = 0


def supported_group(group: int) -> bool:
    """Whether a group divides 64 columns or is a multiple of 64, and is at least 32."""
    return group % 32 == 0 and (64 % group == 0 or group % 64 == 0)


def int4_group(columns: int) -> int | None:
    """The group size for rounding dense rows; None if they stay dense, as in the reference."""
    return 64 if columns % 64 == 0 else 32 if columns % 32 == 0 else None


def _lossless_bf16(t: Tensor) -> bool:
    return t.dtype == torch.bfloat16 or bool((t.bfloat16().to(t.dtype) == t).all())


def _plan_one(w: Weight, quantization: str | None) -> Plan:
    dense = w.format == "dense" or (w.format == "fp8" and quantization is not None)
    if not dense:
        if w.format == "int8":
            return Plan(PackedFormat.Q8)
        if w.format == "fp8":
            return Plan(PackedFormat.FP8)
        if supported_group(w.group_size):
            return Plan(PackedFormat.Q4, w.group_size)
    elif quantization == "int8":
        return Plan(PackedFormat.Q8)
    elif quantization == "int4" and (group := int4_group(w.shape[1])):
        return Plan(PackedFormat.Q4, group)
    if w.format == "dense":
        return Plan(PackedFormat.BF16 if _lossless_bf16(w.data) else PackedFormat.F32)
    return Plan(PackedFormat.F32)


def plan(weights: Sequence[Weight], quantization: str | None) -> Plan:
    """The common format of matrices packed together; float32 if their formats differ."""
    plans = {_plan_one(w, quantization) for w in weights}
    return plans.pop() if len(plans) == 1 else Plan(PackedFormat.F32)


def inputs_of(weights: Sequence[Weight]) -> InputRounding | None:
    """Input rounding shared by stacked matrices; None: 8 bits with a scale per row and group."""
    found = [w.inputs for w in weights if w.inputs is not None]
    if len(found) < len(weights) or len({i.bits for i in found}) != 1:
        return None
    scales = [i.scale for i in found if i.scale is not None]
    if scales:
        return InputRounding(found[0].bits, scale=max(scales)) if len(scales) == len(found) else None
    return InputRounding(found[0].bits, sum(i.clip for i in found) / len(found))


def _source(w: Weight, target: Plan) -> tuple[tuple[Any, int, int, int, int, int, int], list[Tensor]]:
    """The native call's tuple (kind, data, scale, zero, n, k, group) and the tensors it points into."""
    n, k = w.shape
    kind = {
        ("int8", PackedFormat.Q8): Kind.INT8,
        ("int4", PackedFormat.Q4): Kind.INT4,
        ("fp8", PackedFormat.FP8): Kind.FP8,
    }.get((w.format, target.format))
    if kind is None:
        data = w.data if w.format == "dense" else w.dequantize()
        data = data.contiguous() if data.dtype == torch.bfloat16 else data.float().contiguous()
        kind = Kind.BF16 if data.dtype == torch.bfloat16 else Kind.F32
        return (kind, data.data_ptr(), 0, 0, n, k, k), [data]
    assert w.scale is not None
    tensors = [w.data.contiguous(), w.scale.float().contiguous()]
    if w.zero_point is not None:
        tensors.append(w.zero_point.contiguous())
    zero = tensors[2].data_ptr() if w.zero_point is not None else 0
    return (kind, tensors[0].data_ptr(), tensors[1].data_ptr(), zero, n, k, w.group_size), tensors


def pack(native: Any, weights: Sequence[Weight], target: Plan, interleave: bool = False) -> Any:
    """Pack matrices [N_i, K] stacked along their rows (or two of them interleaved) into one."""
    columns = {w.shape[1] for w in weights}
    if len(columns) != 1:
        raise ValueError(f"matrices with K = {sorted(columns)} cannot be stacked; expected one K")
    sources, alive = zip(*(_source(w, target) for w in weights), strict=True)
    zero = target.format == PackedFormat.Q4 and any(w.zero_point is not None for w in weights)
    packed = native.pack(target.format, target.group, zero, interleave, SPARSE_FROM, list(sources))
    del alive
    return packed


def pack_dense(native: Any, matrix: Tensor, quantized: bool) -> Any:
    """Pack a float matrix unchanged, or rounded to int8."""
    w = Weight("dense", matrix)
    return pack(native, [w], _plan_one(w, "int8" if quantized else None))
