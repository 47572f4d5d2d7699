"""GGUF's block types as our stored formats: the same integers and scales, so nothing is rounded; and back.

A type's function takes the blocks of a matrix, uint8 [N, B, bytes of a block], and returns numpy arrays.
Legend: N rows; B blocks of a row; g columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from farthing.lazy import np, torch
from farthing.ops.weights import (
    INTEGERS,
    Format,
    Weight,
    check_finite,
    nearest_of,
    quantize_int4,
    quantize_int8_groups,
    round_to_grid,
    to_codes,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]


def _half(blocks: Bytes, at: int) -> Floats:
    """float16 at a byte of every block -> [N, B]."""
    found: Floats = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)
    return found


def _fields(packed: Bytes, shifts: Sequence[int]) -> Bytes:
    """[..., n] bytes shifted right by each of these: [..., len(shifts), n]."""
    shifted: Bytes = packed[..., None, :] >> np.array(shifts, np.uint8)[:, None]
    return shifted


def _halves(packed: Bytes, bytes_together: int) -> Bytes:
    """Nibbles, of which all low ones of so many bytes come first, then their high ones: [N, B, columns]."""
    runs = packed.reshape(*packed.shape[:2], -1, bytes_together)
    nibbles: Bytes = (_fields(runs, (0, 4)) & np.uint8(15)).reshape(*packed.shape[:2], -1)
    return nibbles


def _bits(packed: Bytes) -> Bytes:
    """[N, B, bytes] -> their bits, lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _made(
    name: Format,
    u: NDArray[Any],
    scale: NDArray[Any],
    minimum: NDArray[Any] | None = None,
    units: tuple[Floats, Floats | None] | None = None,
) -> Weight:
    """u [N, B, columns]; of units, scale and minimum [N, B, groups] are multiples."""
    n = len(u)
    u = u.reshape(n, -1)
    data = u.astype(np.int8) if INTEGERS[name].bits > 4 else u[:, ::2] | u[:, 1::2] << 4
    if units is not None:
        scale = scale * units[0][..., None]
        minimum = None if minimum is None or units[1] is None else minimum * units[1][..., None]

    def rows(x: Floats | None) -> Any:
        return None if x is None else np.ascontiguousarray(x.reshape(n, -1), np.float32)

    return Weight(
        name, np.ascontiguousarray(data), rows(scale), minimum=rows(minimum),  # type: ignore[arg-type]
        units=None if units is None else (rows(units[0]), rows(units[1])),
    )  # fmt: skip


def _scales_of_6_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes -> 8 scales and 8 minimums of 6 bits."""
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 2 & 48)), -1)
    return scales, np.concatenate((middle & 63, (high >> 4) | (middle >> 2 & 48)), -1)


def _q8_0(b: Bytes) -> Weight:
    return _made("int8_groups", b[..., 2:].view(np.int8), _half(b, 0))


def _q4_0(b: Bytes) -> Weight:
    return _made("int4", _halves(b[..., 2:], 16), _half(b, 0))


def _q4_1(b: Bytes) -> Weight:
    return _made("q4_1", _halves(b[..., 4:], 16), _half(b, 0), _half(b, 2))


def _q5_0(b: Bytes) -> Weight:
    u = _halves(b[..., 6:], 16) | _bits(b[..., 2:6]) << 4
    return _made("q5_0", u.astype(np.int8) - 16, _half(b, 0))


def _q5_1(b: Bytes) -> Weight:
    u = _halves(b[..., 8:], 16) | _bits(b[..., 4:8]) << 4
    return _made("q5_1", u, _half(b, 0), _half(b, 2))


def _q2_k(b: Bytes) -> Weight:
    u = _fields(b[..., 16:80].reshape(*b.shape[:2], 2, 32), (0, 2, 4, 6)) & 3
    units = _half(b, 80), -_half(b, 82)
    return _made("q4_k", u, b[..., :16] & 15, b[..., :16] >> 4, units)


def _q3_k(b: Bytes) -> Weight:
    low = _fields(b[..., 32:96].reshape(*b.shape[:2], 2, 32), (0, 2, 4, 6)) & 3
    high = _fields(b[..., :32], range(8)) & 1
    q = low.reshape(high.shape).astype(np.int8) + 4 * high.astype(np.int8) - 4
    scales = (_fields(b[..., 96:104], (0, 4)) & 15).reshape(*b.shape[:2], 16)
    scales = scales | (_fields(b[..., 104:108], (0, 2, 4, 6)) & 3).reshape(scales.shape) << 4
    return _made("q6_k", q, scales.astype(np.float32) - 32, None, (_half(b, 108), None))


def _q4_k(b: Bytes) -> Weight:
    scales, minimums = _scales_of_6_bits(b[..., 4:16])
    return _made("q4_k", _halves(b[..., 16:], 32), scales, minimums, (_half(b, 0), -_half(b, 2)))


def _q5_k(b: Bytes) -> Weight:
    scales, minimums = _scales_of_6_bits(b[..., 4:16])
    high = (_fields(b[..., 16:48], range(8)) & 1).reshape(*b.shape[:2], 256)
    u = _halves(b[..., 48:], 32) | high << 4
    return _made("q5_k", u, scales, minimums, (_half(b, 0), -_half(b, 2)))


def _q6_k(b: Bytes) -> Weight:
    high = _fields(b[..., 128:192].reshape(*b.shape[:2], 2, 32), (0, 2, 4, 6)) & 3
    u = _halves(b[..., :128], 64) | high.reshape(*b.shape[:2], 256) << 4
    scales = np.ascontiguousarray(b[..., 192:208]).view(np.int8)
    return _made("q6_k", u.astype(np.int8) - 32, scales, None, (_half(b, 208), None))


def _iq4_nl(b: Bytes) -> Weight:
    return _made("iq4_nl", _halves(b[..., 2:], 16), _half(b, 0))


def _iq4_xs(b: Bytes) -> Weight:
    low = (_fields(b[..., 4:8], (0, 4)) & 15).swapaxes(-1, -2).reshape(*b.shape[:2], 8)
    high = (_fields(b[..., 2:4], (0, 2, 4, 6)) & 3).swapaxes(-1, -2).reshape(low.shape)
    scales = (low | high << 4).astype(np.float32) - 32
    return _made("iq4_xs", _halves(b[..., 8:], 16), scales, None, (_half(b, 0), None))


def _mxfp4(b: Bytes) -> Weight:
    exponents = b[..., 0].astype(np.int32)
    scale = np.where(exponents < 255, np.ldexp(np.float32(1), exponents - 128), np.float32("nan"))
    return _made("mxfp4", _halves(b[..., 1:], 16), scale)


PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCKS: dict[str, Callable[[Bytes], Weight]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
# What a type becomes, and the columns that share a scale.
FORMATS: dict[str, tuple[Format, int]] = {
    "Q4_0": ("int4", 32), "Q4_1": ("q4_1", 32), "Q5_0": ("q5_0", 32), "Q5_1": ("q5_1", 32),
    "Q8_0": ("int8_groups", 32), "Q2_K": ("q4_k", 16), "Q3_K": ("q6_k", 16), "Q4_K": ("q4_k", 32),
    "Q5_K": ("q5_k", 32), "Q6_K": ("q6_k", 16), "IQ4_NL": ("iq4_nl", 32), "IQ4_XS": ("iq4_xs", 32),
    "MXFP4": ("mxfp4", 32),
}  # fmt: skip
# Types whose integers have the form of another one with more bits.
HELD_AS = {kind: name.upper() for kind, (name, _) in FORMATS.items() if name.upper() in {*FORMATS} - {kind}}


def bits_held(kind: str) -> float:
    """Of a weight of a type with units, in its format: integers, scales of 8 bits, and units of 16."""
    name, group = FORMATS[kind]
    stored = INTEGERS[name]
    return stored.bits + (1 + stored.minimums) * (8 / group + 16 / stored.unit)


# Writing: blocks of 32 columns that share a scale of 16 bits, or of MXFP4 an exponent.

WRITTEN = ("Q8_0", "Q5_0", "Q4_0", "IQ4_NL", "MXFP4", "BF16")
BLOCK = 32


def kind_for(weight: Weight) -> str:
    """The written type that holds a matrix's values best, exactly if one does."""
    if weight.format == "dense":
        return {torch.float32: "F32", torch.float16: "F16"}.get(weight.data.dtype, "BF16")
    if weight.shape[1] % BLOCK:
        return "BF16"
    if weight.order is not None or weight.group_size % BLOCK or weight.zero_point is not None:
        return "Q8_0"  # 4 bits would be rounded once more
    exact = next((kind for kind in ("Q4_0", "Q5_0", "MXFP4") if FORMATS[kind][0] == weight.format), None)
    stored = INTEGERS.get(weight.format)
    return exact or ("IQ4_NL" if stored is not None and stored.codes else "Q8_0")


def encode(weight: Weight, kind: str) -> tuple[Bytes, bool]:
    """A matrix as bytes [N, bytes of a row], and whether they have exactly its values.

    Integers that the type can hold are kept, and their scales rounded to its 16 bits; other values are
    rounded to the nearest.
    """
    if kind in PLAIN:
        plain = weight.dequantize(getattr(torch, PLAIN[kind]))
        exact = weight.format == "dense" and weight.data.dtype == plain.dtype
        return plain.contiguous().view(torch.uint8).numpy(), exact
    kept = weight if _holds(kind, weight) else nearest(weight.dequantize(), kind)
    assert kept.scale is not None
    scale = kept.scale.repeat_interleave(kept.group_size // BLOCK, 1)
    if kind == "MXFP4":
        stored = torch.log2(scale).round().clamp(-128, 126)
        head, exact = (stored + 128).to(torch.uint8).unsqueeze(-1), bool((stored.exp2() == scale).all())
    else:
        halves = scale.half()
        head, exact = halves.unsqueeze(-1).view(torch.uint8), torch.equal(halves.float(), scale)
    if kind == "Q8_0":
        body = _less_zero(kept).reshape(*scale.shape, BLOCK).to(torch.int8).view(torch.uint8)
    elif kind == "Q5_0":
        u = (kept.quantized().view(*scale.shape, BLOCK) + 16).to(torch.uint8)
        fifth = (u >> 4).view(*scale.shape, 4, 8) << torch.arange(8, dtype=torch.uint8)
        low = u & 15
        body = torch.cat((fifth.sum(-1).to(torch.uint8), low[..., :16] | low[..., 16:] << 4), -1)
    else:
        u = torch.stack((kept.data & 15, kept.data >> 4), -1).view(*scale.shape, BLOCK)
        body = u[..., : BLOCK // 2] | u[..., BLOCK // 2 :] << 4
    blocks: Bytes = torch.cat((head, body), -1).flatten(1).numpy()
    return blocks, exact and kept is weight


def _less_zero(weight: Weight) -> Tensor:
    """The integers [N, K/g, g] less their zero points, with which those of 8 bits may need 9."""
    assert weight.scale is not None
    q = weight.quantized().view(*weight.scale.shape, -1)
    return q if weight.zero_point is None else q.short() - weight.zero_point.unsqueeze(-1)


def _holds(kind: str, weight: Weight) -> bool:
    """Whether a type has all integers of a matrix."""
    stored = INTEGERS.get(weight.format)
    if stored is None or weight.minimum is not None or weight.order is not None or weight.group_size % BLOCK:
        return False
    if kind == "Q8_0":
        q = None if stored.codes or weight.zero_point is None else _less_zero(weight)
        return not stored.codes and (q is None or bool(((q >= -128) & (q <= 127)).all()))
    target = INTEGERS[FORMATS[kind][0]]
    alike = (stored.bits, stored.codes, stored.offset) == (target.bits, target.codes, target.offset)
    return alike and weight.zero_point is None


_TOGETHER = 1 << 17  # values that are rounded at once: all that is computed of them stays in a core's cache


def nearest(values: Tensor, kind: str) -> Weight:
    """Values [N, K] rounded to a type, with scales of least squared error. Raises ValueError for NaN."""
    check_finite(values)
    parts = [_rounded(part, kind) for part in values.split(max(1, _TOGETHER // values.shape[1]))]
    scale = torch.cat([part.scale for part in parts if part.scale is not None])
    return Weight(parts[0].format, torch.cat([part.data for part in parts]), scale)


def _rounded(values: Tensor, kind: str) -> Weight:
    if kind == "Q8_0":
        return quantize_int8_groups(values, BLOCK)
    if kind == "Q4_0":
        return quantize_int4(values, BLOCK)
    if kind == "Q5_0":
        grid = round_to_grid(
            values, BLOCK, (15.5, -15.5), lambda x, step: (x / step).round_().clamp_(-16, 15)
        )
        return Weight("q5_0", *grid)
    name = FORMATS[kind][0]
    values_of = INTEGERS[name].codes
    codes = sorted(set(values_of))
    q, scale = _powers_of_two(values, codes) if kind == "MXFP4" else to_codes(values, BLOCK, codes)
    places = [values_of.index(v) if v in values_of else 0 for v in range(codes[0], codes[-1] + 1)]
    u = torch.tensor(places, dtype=torch.uint8)[q.int() - codes[0]]
    return Weight(name, u[:, ::2] | u[:, 1::2] << 4, scale)


def _powers_of_two(values: Tensor, codes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales of groups, of two powers of two the one of less squared error."""
    groups = values.unflatten(1, (-1, BLOCK))
    top, rounds = groups.abs().amax(-1).clamp_min(2.0**-100), nearest_of(codes)
    low = (top / codes[-1]).log2().floor().exp2()  # reaches the largest magnitude at most twice
    found = []
    for scale in (low, 2 * low):
        q = rounds(groups / scale.unsqueeze(-1))
        found.append((q, scale, (q * scale.unsqueeze(-1) - groups).square().sum(-1)))
    (q, scale, error), (wide, doubled, larger) = found
    better = larger < error
    return torch.where(better.unsqueeze(-1), wide, q).flatten(1), torch.where(better, doubled, scale)
