"""Slices of a stored matrix: the part that a rank reads, and halves that one rank sums separately."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from farthing.ops.weights import FP8_BLOCK, Weight

if TYPE_CHECKING:
    from torch import Tensor

CUT_BLOCK = 128  # FP8 scale blocks, groups of INT4 scales, and groups of activations on the CPU


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a tensor that a rank reads: [start, stop) along `dim`, or all of it (dim None)."""

    dim: int | None
    start: int = 0
    stop: int = 0


def bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of one of `parts` slices, aligned to scale blocks if there are enough of them.

    A slice that splits a block of 128 cannot keep its stored format or its activation scales.
    """
    unit = CUT_BLOCK if size >= CUT_BLOCK * parts else 1
    blocks = -(-size // unit)
    return min(size, unit * (blocks * index // parts)), min(size, unit * (blocks * (index + 1) // parts))


def cut_weight(weight: Weight, cut: Cut) -> Weight:
    """Rows (dim 0) or columns (dim 1) of a stored matrix; dense if the cut splits a scale block."""
    assert cut.dim is not None
    start, size = cut.start, cut.stop - cut.start
    if weight.format == "dense":
        return replace(weight, data=weight.data.narrow(cut.dim, start, size))
    assert weight.scale is not None
    if weight.format == "fp8":
        unit = FP8_BLOCK
    elif weight.format == "int4" and cut.dim == 1:
        unit = weight.group_size
    else:
        unit = 1
    inside = unit > 1 and start // unit == (cut.stop - 1) // unit  # the slice is inside one block
    torn = start % unit and not inside
    if weight.format == "int4" and cut.dim == 1:
        torn = torn or bool(size % unit and not inside) or bool(start % 2 or size % 2)
    if torn:
        whole = weight.dequantize().narrow(cut.dim, start, size)
        return Weight("dense", whole, rounded=True, inputs=weight.inputs)
    if weight.format == "int8":
        scale = weight.scale.narrow(0, start, size) if cut.dim == 0 else weight.scale
        return replace(weight, data=weight.data.narrow(cut.dim, start, size), scale=scale)
    packed = 2 if weight.format == "int4" and cut.dim == 1 else 1
    data = weight.data.narrow(cut.dim, start // packed, size // packed)

    def part(t: Tensor) -> Tensor:
        return t.narrow(cut.dim or 0, start // unit, (cut.stop - 1) // unit - start // unit + 1)

    zero = None if weight.zero_point is None else part(weight.zero_point)
    return replace(weight, data=data, scale=part(weight.scale), zero_point=zero)


def columns_of(weight: Weight, at: int) -> list[Weight]:
    """Columns [0, at) and [at, K) of a matrix."""
    return [cut_weight(weight, Cut(1, *ends)) for ends in ((0, at), (at, weight.shape[1]))]


def halves_of(mlp: tuple[Weight, Weight, Weight]) -> list[tuple[Weight, Weight, Weight]]:
    """Gate, up and down of a gated MLP split into two of half the width, as on two tensor-parallel ranks."""
    gate, up, down = mlp
    cuts = [bounds(down.shape[1], 2, i) for i in range(2)]
    return [
        (cut_weight(gate, Cut(0, *ends)), cut_weight(up, Cut(0, *ends)), cut_weight(down, Cut(1, *ends)))
        for ends in cuts
    ]
