"""Slices of a stored matrix: the part that a rank reads, and halves that one rank sums separately."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from farthing.lazy import np, torch
from farthing.ops.arrays import like, narrow
from farthing.ops.weights import FP8_BLOCK, INTEGERS, Weight, in_place_of

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

CUT_BLOCK = 128  # FP8 scale blocks, groups of INT4 scales, and groups of activations on the CPU


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a tensor that a rank reads: [start, stop) along `dim`, or all of it (dim None)."""

    dim: int | None
    start: int = 0
    stop: int = 0
    more: tuple[tuple[int, int], ...] = ()  # of several matrices stored as one: what follows the first's part

    @property
    def size(self) -> int:
        """Elements along `dim`."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Every [start, stop)."""
        return (self.start, self.stop), *self.more

    def of(self, value: Tensor) -> Tensor:
        """This part of a tensor."""
        if self.dim is None:
            return value
        parts = [value.narrow(self.dim, start, stop - start) for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


def bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of one of `parts` slices, aligned to scale blocks if there are enough of them.

    A slice that splits a block of 128 cannot keep its stored format or its activation scales.
    """
    unit = CUT_BLOCK if size >= CUT_BLOCK * parts else 1
    blocks = -(-size // unit)
    return min(size, unit * (blocks * index // parts)), min(size, unit * (blocks * (index + 1) // parts))


def share_of(size: int, parts: int, index: int) -> int:
    """The size of one of the slices of `bounds`."""
    start, stop = bounds(size, parts, index)
    return stop - start


def cut_weight(weight: Weight, cut: Cut) -> Weight:
    """Rows (dim 0) or columns (dim 1) of a stored matrix; dense if the cut splits a scale block."""
    assert cut.dim is not None
    if cut.more:
        return _joined([cut_weight(weight, Cut(cut.dim, *span)) for span in cut.spans])
    start, size = cut.start, cut.stop - cut.start
    if cut.dim == 1 and weight.order is not None:
        return _ordered_columns(weight, start, cut.stop)
    if weight.bias is not None:  # of columns, the first part has it, because their products are summed
        kept = narrow(weight.bias, 0, start, size) if cut.dim == 0 else None if start else weight.bias
        return replace(cut_weight(replace(weight, bias=None), cut), bias=kept)
    if weight.format == "dense":
        return replace(weight, data=narrow(weight.data, cut.dim, start, size))
    assert weight.scale is not None
    stored = INTEGERS.get(weight.format)
    if weight.format == "fp8":
        unit = weight.fp8_block[cut.dim]
    elif weight.grouped and cut.dim == 1:
        unit = max(weight.group_size, stored.unit if stored else 0)
    else:
        unit = 1
    inside = unit > 1 and start // unit == (cut.stop - 1) // unit  # the slice is inside one block
    torn = bool(start % unit or (1 < unit < FP8_BLOCK and size % unit)) and not inside
    if weight.grouped and cut.dim == 1:
        torn = torn or bool(size % unit and (not inside or weight.units)) or bool(start % 2 or size % 2)
    if torn or (weight.units and inside and size != unit):
        whole = narrow(weight.dequantize(), cut.dim, start, size)
        return Weight("dense", whole, rounded=True, inputs=weight.inputs)
    if weight.format == "int8":
        scale = narrow(weight.scale, 0, start, size) if cut.dim == 0 else weight.scale
        return replace(weight, data=narrow(weight.data, cut.dim, start, size), scale=scale)
    packed = 2 if weight.nibbles and cut.dim == 1 else 1
    data = narrow(weight.data, cut.dim, start // packed, size // packed)

    def part(t: Tensor | None, unit: int = weight.group_size if weight.grouped and cut.dim else unit) -> Any:
        if t is None:
            return None
        first = start // unit
        return narrow(t, cut.dim or 0, first, (cut.stop - 1) // unit - first + 1)

    units = weight.units and (part(weight.units[0], unit), part(weight.units[1], unit))
    return replace(
        weight, data=data, scale=part(weight.scale), zero_point=part(weight.zero_point),
        minimum=part(weight.minimum), units=units,
    )  # fmt: skip


def _ordered_columns(weight: Weight, start: int, stop: int) -> Weight:
    """Columns [start, stop) of a matrix with an order: those that each group has of them, in groups of the
    size that takes least memory, of which the last of each is filled up."""
    order, scale = weight.order, weight.scale
    assert order is not None and scale is not None
    if weight.units is not None:
        _say_floats(weight.format, round(8 * weight.nbytes / weight.data.shape[0] / weight.shape[1], 1))
        return in_place_of(
            weight, Weight("dense", narrow(weight.dequantize(), 1, start, stop - start), rounded=True)
        )
    group, groups = weight.group_size, scale.shape[1]
    here = np.flatnonzero((order >= start) & (order < stop))
    counts = np.bincount(here // group, minlength=groups)
    bits = INTEGERS[weight.format].bits
    least = 32 if 4 < bits < 8 else 16
    sizes = [size for size in (16, 32, 64, 128) if size >= least and group % size == 0] or [group]

    def size_of(size: int) -> float:  # a scale has 16 bits, a zero point 8
        return float((-(-counts // size)).sum() * (size * bits + 16 + 8 * (weight.zero_point is not None)))

    size = min(sizes, key=size_of)
    each = -(-counts // size)  # groups of the new size, of each group
    at = np.concatenate([[0], np.cumsum(each * size)])[:-1]  # the first column of each group
    place = at[here // group] + np.arange(len(here)) - (np.cumsum(counts) - counts)[here // group]
    taken, columns = np.zeros(each.sum() * size, np.int64), np.full(each.sum() * size, -1, np.int64)
    taken[place], columns[place] = here, np.asarray(order)[here] - start
    stored, whole = like(taken, scale), like(np.repeat(np.arange(groups), each), scale)
    data = weight.data
    if weight.nibbles:
        u = torch.stack((data & 15, data >> 4), -1).flatten(1)[:, stored]
        data = u[:, 0::2] | u[:, 1::2] << 4
    else:
        data = data[:, stored]
    zero, minimum = (None if t is None else t[:, whole] for t in (weight.zero_point, weight.minimum))
    return replace(
        weight, data=data, scale=scale[:, whole], zero_point=zero, minimum=minimum,
        order=like(columns, scale), bias=None if start else weight.bias,
    )  # fmt: skip


@cache
def _say_floats(stored: str, bits: float) -> None:
    log.warning(
        "columns of matrices in %s with an order are divided: the parts are held in float32, 32 bits a "
        "weight instead of %g, because units do not fit them",
        stored, bits,
    )  # fmt: skip


def _joined(parts: Sequence[Weight]) -> Weight:
    """Rows of one stored matrix below each other; dense if they do not join at the edges of scale blocks."""
    first = parts[0]
    aligned = first.format != "fp8" or all(part.shape[0] % FP8_BLOCK == 0 for part in parts[:-1])
    if not aligned or any(part.format != first.format for part in parts):
        return Weight("dense", torch.cat([p.dequantize() for p in parts]), rounded=True, inputs=first.inputs)

    def cat(tensors: Iterable[Tensor | None]) -> Any:
        found = [t for t in tensors if t is not None]
        return torch.cat(found) if found else None

    fields = {n: cat(getattr(p, n) for p in parts) for n in ("data", "scale", "zero_point", "minimum")}
    units = first.units and tuple(map(cat, zip(*(p.units or () for p in parts), strict=True)))
    return replace(first, **fields, units=units)


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
