"""GGUF's block types as our stored formats: the same integers and scales, so nothing is rounded.

A type's function takes the blocks of a matrix, uint8 [N, B, bytes of a block]. Legend: N rows; B blocks of a
row; g columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from farthing.lazy import np, torch
from farthing.ops.weights import INTEGERS, Format, Weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

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

    def tensor(x: Floats | None) -> Any:
        return None if x is None else torch.from_numpy(np.ascontiguousarray(x.reshape(n, -1), np.float32))

    return Weight(
        name, torch.from_numpy(np.ascontiguousarray(data)), tensor(scale), minimum=tensor(minimum),
        units=None if units is None else (tensor(units[0]), tensor(units[1])),
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
    return _made("int8_groups", u.astype(np.int8) - 16, _half(b, 0))


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
    scale = np.ldexp(np.float32(1), b[..., 0].astype(np.int32) - 128)
    return _made("mxfp4", _halves(b[..., 1:], 16), scale)


PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCKS: dict[str, Callable[[Bytes], Weight]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
# What a type becomes, and the columns that share a scale.
FORMATS: dict[str, tuple[Format, int]] = {
    "Q4_0": ("int4", 32), "Q4_1": ("q4_1", 32), "Q5_0": ("int8_groups", 32), "Q5_1": ("q5_1", 32),
    "Q8_0": ("int8_groups", 32), "Q2_K": ("q4_k", 16), "Q3_K": ("q6_k", 16), "Q4_K": ("q4_k", 32),
    "Q5_K": ("q5_k", 32), "Q6_K": ("q6_k", 16), "IQ4_NL": ("iq4_nl", 32), "IQ4_XS": ("iq4_xs", 32),
    "MXFP4": ("mxfp4", 32),
}  # fmt: skip
