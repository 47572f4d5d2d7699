"""A weight matrix in its stored format: its value, its slices, and its zero blocks.

Legend: N output rows, K input columns, g group size along K.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from farthing.lazy import np, torch
from farthing.ops.arrays import (
    alternating,
    as_float32,
    as_int64,
    cast,
    dtype_name,
    like,
    on_torch,
    repeat_columns,
    same,
)

if TYPE_CHECKING:
    from torch import Tensor


log = logging.getLogger(__name__)

Format = Literal[
    "dense", "int8", "int4", "nl4", "fp8", "int8_groups", "mxfp4", "iq4_nl", "iq4_xs", "q4_1", "q5_0",
    "q5_1", "q4_k", "q5_k", "q6_k",
]  # fmt: skip
FP8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Integers:
    """What the integers u of a stored format stand for: q = u - offset, or one of `codes`."""

    bits: int = 4  # two in a byte if they are 4
    offset: int = 0
    codes: tuple[int, ...] = ()
    unit: int = 0  # columns that share a unit of the scales, of which they are whole multiples
    minimums: bool = False  # groups have a number that is added to their values


_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # twice the values
CODES = (-109, -85, -67, -51, -37, -24, -12, 0, 11, 23, 35, 48, 62, 78, 99, 127)  # formats.h says why
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
INTEGERS: dict[str, Integers] = {
    "int8": Integers(8),
    "int8_groups": Integers(8),
    "int4": Integers(offset=8),
    "nl4": Integers(codes=CODES),
    "mxfp4": Integers(codes=(*_E2M1, *(-q for q in _E2M1))),
    "iq4_nl": Integers(codes=_IQ4),
    "iq4_xs": Integers(codes=_IQ4, unit=256),
    "q4_1": Integers(minimums=True),
    "q5_0": Integers(5),
    "q5_1": Integers(5, minimums=True),
    "q4_k": Integers(unit=256, minimums=True),
    "q5_k": Integers(5, unit=256, minimums=True),
    "q6_k": Integers(6, unit=256),
}  # as native/pack/formats.h


@dataclass(frozen=True, slots=True)
class InputRounding:
    """Input quantization of a matrix, if its checkpoint specifies it; otherwise the kernels choose.

    Without `scale`, dynamic: per row and group of columns, integers in [-top, top] with the scale
    clip * amax / top, for matrices trained for fewer than 8 bits. With `scale`, static: integers in
    [-top - 1, top] with this one calibrated scale, rounded half to even.
    """

    bits: int
    clip: float = 1.0
    scale: float | None = None

    @property
    def top(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1

    def __call__(self, x: Tensor, group: int) -> Tensor:
        """x [..., K] quantized and dequantized, as seen by the kernel."""
        if self.scale is not None:
            return (x / self.scale).round().clamp(-self.top - 1, self.top) * self.scale
        groups = x.unflatten(-1, (-1, group))
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) * (self.clip / self.top)
        rounded: Tensor = (groups / scale).round().clamp(-self.top, self.top) * scale
        return rounded.flatten(-2)


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [N, K] in one of these storage formats. `dequantize()` defines its value.

    | format | data | scale (float32) | beside them |
    |---|---|---|---|
    | dense | float [N, K] | - | - |
    | int8  | int8 [N, K] | [N, 1] | - |
    | int8_groups, q5_0, q6_k | int8 [N, K] | [N, K/g] | - |
    | int4  | uint8 [N, K/2]: u = q + 8, even k low nibble | [N, K/g] | maybe zero_point |
    | nl4, mxfp4, iq4_nl, iq4_xs | uint8 [N, K/2]: indices into the format's codes | [N, K/g] | - |
    | q4_1, q4_k | uint8 [N, K/2]: u = q | [N, K/g] | minimum |
    | q5_1, q5_k | int8 [N, K] | [N, K/g] | minimum |
    | fp8   | float8_e4m3fn [N, K] | [ceil(N/128) or N, ceil(K/128) or K/g], multiplies | - |
    """

    format: Format
    data: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None  # int8 [N, K/g], in units of q
    rounded: bool = False  # dense value of a quantized weight whose slice splits scale blocks
    inputs: InputRounding | None = None  # None: the kernels choose; for integers, per row and group
    minimum: Tensor | None = None  # float32 [N, K/g], added to q times scale
    # iq4_xs, q4_k, q5_k, q6_k: float32 [N, K/256] each, of which scales and minimums are whole multiples
    units: tuple[Tensor, Tensor | None] | None = None
    bias: Tensor | None = None  # [N] added to the product, of experts alone: attention has its own
    # int64, of formats with groups: column i of `data` is column order[i] of the matrix, and those of -1 are
    # none of it: they fill groups that a slice divides. None: the same columns
    order: Tensor | None = None

    @property
    def nibbles(self) -> bool:
        """Whether a byte of `data` holds two integers."""
        return self.format in INTEGERS and INTEGERS[self.format].bits == 4

    @property
    def grouped(self) -> bool:
        """Whether groups of columns have scales of their own."""
        return self.format in INTEGERS and self.format != "int8"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), independent of packing."""
        n, k = self.stored
        return n, k if self.order is None else int((self.order >= 0).sum())

    @property
    def stored(self) -> tuple[int, int]:
        """N, and the columns of `data`, which are more than K where an order has some of -1."""
        n, k = self.data.shape
        return (n, k * 2) if self.nibbles else (n, k)

    @property
    def fp8_block(self) -> tuple[int, int]:
        """Rows and columns that share a scale in `fp8`: 128 rows or one, 128 columns or 32 or 64."""
        assert self.scale is not None
        (n, k), (rows, columns) = self.shape, self.scale.shape
        return (
            FP8_BLOCK if rows == -(-n // FP8_BLOCK) else 1,
            FP8_BLOCK if columns == -(-k // FP8_BLOCK) else k // columns,
        )

    @property
    def group_size(self) -> int:
        """Columns that share one scale, where groups of columns do, else K."""
        if self.format == "fp8":
            return self.fp8_block[1]
        k = self.stored[1]
        return k // self.scale.shape[1] if self.grouped and self.scale is not None else k

    @property
    def nbytes(self) -> int:
        """Bytes read per use of the matrix: data, scales and zero points."""
        parts = (self.data, self.scale, self.zero_point, self.minimum)
        return sum(t.nbytes for t in parts if t is not None)

    def quantized(self) -> Tensor:
        """The integers q, int8 [N, K]; or the codes that they are indices into."""
        stored = INTEGERS.get(self.format)
        if stored is None:
            raise ValueError(f"format {self.format!r} has no integers; expected one of {', '.join(INTEGERS)}")
        if stored.bits > 4:
            return self.data
        u = alternating(self.data & 15, self.data >> 4)
        if stored.codes:
            return like(np.array(stored.codes, np.int8), u)[as_int64(u)]
        return cast(u, "int8") - stored.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The value, [N, K], float32 by default."""
        if self.format == "dense":
            return as_float32(self.data) if dtype is None else cast(self.data, dtype_name(dtype))
        assert self.scale is not None
        n, k = self.stored
        if self.format in INTEGERS:
            q = as_float32(self.quantized()).reshape(n, -1, self.group_size)
            if self.zero_point is not None:
                q = q - as_float32(self.zero_point)[..., None]
            value = q * self.scale[..., None]
            if self.minimum is not None:
                value = value + self.minimum[..., None]
            value = value.reshape(n, k)
            if self.order is not None:
                value = value[:, self.order.argsort()[-self.shape[1] :]]
        else:
            blocks = zip((n, k), self.fp8_block, strict=True)
            rows, columns = (like(np.arange(size) // block, self.scale) for size, block in blocks)
            value = as_float32(self.data) * self.scale[rows][:, columns]
        return value if dtype is None else cast(value, dtype_name(dtype))

    def on_torch(self) -> Weight:
        """Of numpy arrays, the same with torch's tensors of the same memory."""
        names = ("data", "scale", "zero_point", "minimum", "bias", "order")
        fields: dict[str, Any] = {name: on_torch(getattr(self, name)) for name in names}
        units: Any = self.units and tuple(map(on_torch, self.units))
        return replace(self, **fields, units=units)


def pack_int4(q: Tensor) -> Tensor:
    """Integers in [-8, 7], int8 [N, K] with K even -> uint8 [N, K/2]."""
    u = (q + 8).to(torch.uint8)
    return u[:, 0::2] | (u[:, 1::2] << 4)


def inputs_of(weights: Sequence[Weight]) -> InputRounding | None:
    """Input rounding shared by stacked matrices; None: 8 bits with a scale per row and group."""
    ranges = [w.inputs for w in weights if w.inputs is not None]
    if len(ranges) < len(weights) or len({i.bits for i in ranges}) != 1:
        return None
    scales = [i.scale for i in ranges if i.scale is not None]
    if scales:
        return InputRounding(ranges[0].bits, scale=max(scales)) if len(scales) == len(ranges) else None
    return InputRounding(ranges[0].bits, sum(i.clip for i in ranges) / len(ranges))


def static_scale(weights: Sequence[Weight]) -> float | None:
    """The calibrated input scale of matrices that share their input; None if it is rounded dynamically or not
    at all."""
    inputs = inputs_of(weights)
    return None if inputs is None else inputs.scale


def quantize_int8(w: Tensor) -> Weight:
    """Symmetric round-to-nearest with one scale per row."""
    w = w.float()
    scale = (w.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return Weight("int8", (w / scale).round().clamp(-127, 127).to(torch.int8), scale)


def quantize_int8_groups(w: Tensor, group_size: int = 32) -> Weight:
    """Symmetric round-to-nearest with one scale of 16 bits per group of columns."""
    groups = as_float32(w).reshape(len(w), -1, group_size)
    top = abs(groups).max(-1) if isinstance(w, np.ndarray) else groups.abs().amax(-1)
    scale = as_float32(cast(top / 127, "float16")).clip(2.0**-24)
    q = cast((groups / scale[..., None]).round().clip(-128, 127), "int8")
    return Weight("int8_groups", q.reshape(len(w), -1), scale)


WIDER = 32  # columns that share a scale in matrices that are rounded to 8 bits


def in_one_format(weights: Sequence[Weight]) -> Sequence[Weight]:
    """Matrices of equal width in one format, as kernels read them together; unchanged if they are alike.

    Integers become groups of 8 bits: of the same values, or rounded where there are minimums or several
    orders. Others become dense.
    """
    first = weights[0]
    ordered_alike = all(same(w.order, first.order) for w in weights)
    if ordered_alike and len({(w.format, w.group_size, w.data.dtype) for w in weights}) == 1:
        return weights
    if all(w.format in INTEGERS and w.minimum is None for w in weights) and ordered_alike:
        group = math.gcd(*(w.group_size for w in weights))
        return [_widened(w, group) for w in weights]
    if all(w.format in INTEGERS for w in weights) and first.shape[1] % WIDER == 0:
        _say_held(weights, f"rounded to 8 bits in groups of {WIDER}", 8.5)
        return [in_place_of(w, quantize_int8_groups(w.dequantize(), WIDER)) for w in weights]
    floats = [dtype_name(w.data.dtype) for w in weights if w.format == "dense"]
    short = len(floats) < len(weights) and set(floats) <= {"bfloat16"}
    kind, bits = ("bfloat16", 16) if short else ("float32", 32)
    _say_held(weights, f"held in {kind}", bits)
    return [in_place_of(w, Weight("dense", cast(w.dequantize(), kind))) for w in weights]


def _widened(w: Weight, group: int) -> Weight:
    assert w.scale is not None
    scale, zero = (
        None if t is None else repeat_columns(t, w.group_size // group) for t in (w.scale, w.zero_point)
    )
    return replace(w, format="int8_groups", data=w.quantized(), scale=scale, zero_point=zero, units=None)


def in_place_of(w: Weight, other: Weight) -> Weight:
    """`other` with what w has beside its value."""
    return replace(other, inputs=w.inputs, bias=w.bias)


def _say_held(weights: Sequence[Weight], how: str, bits: float) -> None:
    def name(w: Weight) -> str:
        kind = dtype_name(w.data.dtype) if w.format == "dense" else w.format
        return f"{kind} in groups of {w.group_size}" if w.grouped else kind

    n, k = weights[0].shape
    before = sum(8 * w.nbytes for w in weights) / (n * k * len(weights))
    _say_once(
        tuple(name(w) + (" with an order" if w.order is not None else "") for w in weights),
        how,
        round(before, 1),
        bits,
    )


@cache
def _say_once(kinds: tuple[str, ...], how: str, before: float, after: float) -> None:
    log.warning(
        "matrices that are read together are stored in %s: they are %s, %g bits a weight instead of %g",
        " and ".join(kinds), how, after, before,
    )  # fmt: skip


def folded(gate: Weight, up: Weight, down: Weight) -> tuple[Weight, Weight, Weight]:
    """A gated MLP whose inner neurons are in the order of down's columns, so that down needs none."""
    if down.order is None:
        return gate, up, down
    return rows_in_order(gate, down.order), rows_in_order(up, down.order), replace(down, order=None)


def rows_in_order(weight: Weight, order: Tensor) -> Weight:
    """Rows `order` of a matrix; dense if they share scales."""
    if weight.format == "fp8" and weight.fp8_block[0] > 1:
        weight = Weight("dense", weight.dequantize(), rounded=True, inputs=weight.inputs, bias=weight.bias)
    found = {name: getattr(weight, name) for name in ("data", "scale", "zero_point", "minimum", "bias")}
    rows: dict[str, Any] = {name: None if t is None else t[order] for name, t in found.items()}
    units: Any = weight.units and tuple(None if t is None else t[order] for t in weight.units)
    return replace(weight, **rows, units=units)


def loaded_as(quantization: str | None, mlp: bool) -> str | None:
    """The format of a matrix under `--quantization` at load time: "int4" rounds feed-forwards to 4 bits, but
    attention and head, which are few parameters and sensitive to rounding, to 8."""
    return "int8" if quantization == "int4" and not mlp else quantization


def int4_group(columns: int) -> int | None:
    """The group size for rounding dense rows to 4 bits; None if they stay dense."""
    return 64 if columns % 64 == 0 else 32 if columns % 32 == 0 else None


RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # candidate ranges, as shares of a group's largest magnitude


def round_to_grid(
    w: Tensor, group_size: int, reach: tuple[float, float], nearest: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """w [N, K] as integers of a grid, int8 [N, K], and scales [N, K / group_size] of least squared error.

    reach: the values that a group's largest magnitude may become; nearest: of the grid, for values and steps.
    Every range of RANGES is tried with both. For a range's integers q, the best scale is x.q / q.q with error
    x.x - (x.q)^2 / q.q, so the range with the largest (x.q)^2 / q.q wins. Sums are float64, so that native
    code finds the same range. Raises ValueError if group_size does not divide K.
    """
    n, k = w.shape
    if k % group_size:
        raise ValueError(f"group_size {group_size} does not divide K = {k}; use a divisor of K, such as 32")
    tiny = torch.finfo(torch.float32).tiny
    groups = w.float().view(n, -1, group_size)
    wide, top = groups.double(), groups.abs().amax(dim=-1)
    check_finite(top)
    scale, chosen = torch.empty_like(top), torch.empty_like(top)
    best = torch.full(top.shape, -1.0, dtype=torch.float64)
    for share in RANGES:
        for end in reach:
            step = (top * share / abs(end)).clamp_min(tiny) * math.copysign(1, end)
            q = nearest(groups, step.unsqueeze(-1))
            dot = (wide * q).sum(-1)
            square = q.square_().sum(-1, dtype=torch.float64)
            gain = torch.where(square > 0, dot.square() / square.clamp_min(1), 0.0)
            better = gain > best
            best = torch.where(better, gain, best)
            fitted = torch.where(square > 0, dot / square.clamp_min(1), step.double()).float()
            fitted = torch.where(fitted.abs() < tiny, step, fitted)
            scale, chosen = torch.where(better, fitted, scale), torch.where(better, step, chosen)
    return nearest(groups, chosen.unsqueeze(-1)).to(torch.int8).view(n, k), scale


def check_finite(values: Tensor) -> None:
    """Raise ValueError for values that cannot be rounded."""
    if not bool(values.isfinite().all()):
        raise ValueError("got NaN or infinity; expected finite values, because they are rounded to integers")


def nearest_of(values: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Rounds to the nearest of ascending integers, of two the lower one. These have halves between them, so
    the least half that is not below a number decides."""
    low, high = 2 * values[0], 2 * values[-1]
    codes = torch.tensor(values, dtype=torch.float32)
    halves = torch.arange(low, high + 1) / 2
    table = codes[torch.bucketize(halves, (codes[1:] + codes[:-1]) / 2)]

    def rounded(x: Tensor) -> Tensor:
        at = (x * 2).ceil_().clamp_(low, high).sub_(low).int()
        return table.index_select(0, at.flatten()).view(x.shape)

    return rounded


def quantize_int4(w: Tensor, group_size: int = 64) -> Weight:
    """Symmetric rounding to [-8, 7] with one scale per group of columns, which may be negative, because -8
    reaches further than 7."""
    q, scale = round_to_grid(w, group_size, (7.5, -7.5), lambda x, step: (x / step).round_().clamp_(-8, 7))
    return Weight("int4", pack_int4(q), scale)


def to_codes(w: Tensor, group_size: int = 64, values: Sequence[int] = CODES) -> tuple[Tensor, Tensor]:
    """w [N, K] as values, int8 [N, K], and scales [N, K / group_size]; by default as the CPU's NL4 has it."""
    nearest, ends = nearest_of(values), (float(values[-1]), float(values[0]))
    return round_to_grid(w, group_size, ends, lambda x, step: nearest(x * (1 / step)))


def rounded(weight: Weight, quantization: str | None, mlp: bool = False, codes: bool = True) -> Weight:
    """A dense weight rounded as `--quantization` requests; any other weight unchanged.

    codes: whether 4 bits are CODES, as on the CPU, or evenly spaced integers, as on a GPU.
    """
    quantization = loaded_as(quantization, mlp)
    if quantization is None or weight.format != "dense":
        return weight
    if quantization == "int8":
        return quantize_int8(weight.data)
    group = int4_group(weight.shape[1])
    if group is None:
        return weight
    if not codes:
        return quantize_int4(weight.data, group)
    q, scale = to_codes(weight.data, group)
    return Weight("dense", (q.unflatten(1, (-1, group)) * scale.unsqueeze(-1)).flatten(1))


class PeerLost(RuntimeError):
    """Another rank has exited, or did not join a collective in time."""


@dataclass(frozen=True, slots=True)
class SharedSum:
    """Shared memory of sums over one host's ranks, as addresses (see `farthing.parallel.shared`)."""

    counters: int  # rank 0's counter; the others follow, one cache line apart
    slots: int  # two per rank
    slot_bytes: int
    step: int  # number of collectives this rank has started
    failed: int  # a word that becomes nonzero once a rank has failed
    size: int
    index: int
    parent: int  # exit if this parent process exits; 0 for none
    crowded: bool  # more ranks than cores
    timeout: float  # seconds


BLOCK = 16
CELL = 64  # columns
Costs = tuple[float, float, float, float]
NEVER: Costs = (math.inf,) * 4  # also where nothing but zeros would be left out
ALWAYS: Costs = (0.0, 0.0, 0.0, 0.0)
# Time of a cell with 1, 2, 3 and 4 blocks relative to the same columns of a dense panel, the most of several
# numbers of rows, by instruction set (`bench/kernels.py --only cells`). A matrix is stored block-sparse if
# this saves time. On AMX and NEON it was not measured, so all stay dense.
COSTS: dict[str, dict[str, Costs]] = {
    "amx": {},
    "neon": {},
    "avx512": {
        "int8": (0.51, 0.70, 0.95, 1.17),
        "int4": (0.49, 0.76, 0.98, 1.18),
        "nl4": (0.50, 0.75, 0.94, 1.17),
    },
    "avx_vnni": {
        "int8": (0.56, 0.85, 1.16, 1.27),
        "int4": (0.46, 0.68, 0.90, 1.04),
        "nl4": (0.54, 0.79, 0.99, 1.12),
    },
    "avx2": {
        "int8": (0.48, 0.85, 1.23, 1.51),
        "int4": (0.70, 1.17, 1.57, 1.99),
        "nl4": (0.54, 0.95, 1.49, 1.76),
    },
    "portable": {
        "int8": (0.34, 0.60, 0.86, 1.01),
        "int4": (0.32, 0.61, 0.86, 1.00),
        "nl4": (0.30, 0.61, 0.93, 1.14),
    },
}


def blocks_per_cell(keep: Tensor, group: int) -> Tensor:
    """Number of blocks with a weight in every cell of `keep` [N, K], as [N / 16, cells].

    group: columns that share a scale, which limits the width of a cell. K is a multiple of 64.

    A panel of 16 rows is cut into cells of 64 columns (linear/cells.h). Cells without weights are not stored;
    the others cost time that depends on their number of blocks.
    """
    n, k = keep.shape
    padded = torch.nn.functional.pad(keep, (0, 0, 0, -n % BLOCK))
    blocks = padded.view(-1, BLOCK, k // BLOCK, BLOCK).any(3).any(1)
    return blocks.view(blocks.shape[0], -1, min(group, CELL) // BLOCK).sum(2)


def measured_for(isa: str) -> str:
    """The key of `COSTS` for an instruction set's kernels."""
    return next((s for s in COSTS if isa.startswith(s)), "avx512")


def costs_of(kind: str, isa: str = "avx512") -> Costs:
    """The costs of a stored format (never block-sparse if it has none) with an instruction set's kernels."""
    return COSTS[measured_for(isa)].get(kind, NEVER)


def saves_time(counts: Tensor, kind: str, group: int, isa: str = "avx512") -> bool:
    """Whether the kernels are faster with the block-sparse form; counts and group: see `blocks_per_cell`.

    Costs are those of 64 columns; a cell of a narrower group is a part of one.
    """
    costs = costs_of(kind, isa)
    if costs == NEVER:
        return False
    return float(torch.tensor((0.0, *costs))[counts * (CELL // min(group, CELL))].sum()) < counts.numel()
