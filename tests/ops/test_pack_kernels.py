"""Packing on every instruction set: the bytes of native/pack/formats.h, built here with numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("farthing._native")

from farthing import _native
from farthing.checkpoint.floats import quantize_blocks
from farthing.ops.cpu.formats import Plan, pack
from farthing.ops.weights import CODES, Weight, quantize_int4, quantize_int8, to_codes
from tests.isas import ISAS

pytestmark = pytest.mark.pairs

SHAPES = [(1, 64), (16, 128), (17, 192), (50, 320)]  # rows, columns
HEADER = 64
Bytes = NDArray[np.uint8]


@pytest.fixture(scope="module", params=ISAS)
def native(request: pytest.FixtureRequest) -> Any:
    return _native.Backend(2, request.param, "")


def record_bytes(packed: Any) -> Bytes:
    data = np.zeros(packed.serialized_bytes, np.uint8)
    packed.serialize(data.ctypes.data, 0)
    return data[HEADER:]


def panels(a: NDArray[Any]) -> NDArray[Any]:
    """[N, K] -> [panels, 16, K], zeros in the rows that are missing."""
    padded = np.zeros((-(-a.shape[0] // 16) * 16, a.shape[1]), a.dtype)
    padded[: len(a)] = a
    return padded.reshape(-1, 16, a.shape[1])


def columns(a: NDArray[Any], multiple: int) -> NDArray[Any]:
    return np.pad(a, ((0, 0), (0, -a.shape[1] % multiple)))


def as_bytes(a: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(a).view(np.uint8).reshape(len(a), -1)


def integers8(q: NDArray[np.int8], scale: NDArray[np.float32]) -> Bytes:
    u = (panels(columns(q, 64)).astype(np.int16) + 128).astype(np.uint8)
    data = u.reshape(len(u), 16, -1, 4).transpose(0, 2, 1, 3)
    return np.concatenate((as_bytes(panels(scale)), as_bytes(data)), 1).reshape(-1)


def nibbles(
    q: NDArray[np.int8], scale: NDArray[np.float32], zero: NDArray[np.int8] | None = None, offset: int = 8
) -> Bytes:
    s = panels(scale)
    row = top = np.abs(s).max(2)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        power = np.exp2(np.floor(np.log2(top)) - 15).astype(np.float32)
        for by in (*((top / np.float32(i)) * np.float32(2.0**-11) for i in range(15, 7, -1)), power):
            halves = (s / by[..., None]).astype(np.float16).astype(np.float32) * by[..., None]
            fits = (np.abs(halves - s) <= np.float32(2.0**-22) * np.abs(s)).all(2)  # these are then exact
            row = np.where((top >= 2.0**-100) & fits & (top <= np.float32(65504) * by), by, row)
    with np.errstate(invalid="ignore"):
        relative = np.where(row[..., None] > 0, s / row[..., None], 0).astype(np.float16)
    parts = [as_bytes(row), as_bytes(relative.transpose(0, 2, 1))]
    if zero is not None:
        parts.append(as_bytes(panels(zero).transpose(0, 2, 1)))
    head = np.concatenate(parts, 1)
    head = np.pad(head, ((0, 0), (0, -head.shape[1] % 64)))
    u = (panels(q) + offset).astype(np.uint8).reshape(len(s), 16, -1, 2, 4)
    data = (u[:, :, :, 0] | u[:, :, :, 1] << 4).transpose(0, 2, 1, 3)
    return np.concatenate((head, as_bytes(data)), 1).reshape(-1)


def floats(n: int, k: int, kind: str, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g)
    if kind == "outliers":
        w[torch.rand(n, k, generator=g) < 0.02] *= 20
    if kind == "halves":  # many are halfway between two codes
        w = torch.randint(-254, 255, (n, k), generator=g) / 2
    w *= {"tiny": 6e-39, "small": 1e-37, "huge": 5e37}.get(kind, 1.0)
    w[:, : min(32, k // 2)] *= kind != "zeros"
    return w.bfloat16() if kind == "bf16" else w


KINDS = ["f32", "bf16", "outliers", "halves", "tiny", "small", "huge", "zeros"]


def same(packed: Any, expected: Bytes) -> None:
    np.testing.assert_array_equal(record_bytes(packed), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_int4_is_rounded_as_in_torch(native: Any, shape: tuple[int, int], kind: str) -> None:
    w = floats(*shape, kind)
    for group in (32, 64):
        r = quantize_int4(w, group)
        assert r.scale is not None
        expected = nibbles(r.quantized().numpy(), r.scale.numpy())
        same(pack(native, [Weight("dense", w)], Plan(_native.Format.Q4, group), blocks=False), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tiny"])  # they become zeros
def test_codes_are_rounded_as_in_torch(native: Any, shape: tuple[int, int], kind: str) -> None:
    w = floats(*shape, kind)
    for group in (32, 64):
        q, scale = to_codes(w, group)
        index = np.searchsorted(CODES, q.numpy()) - CODES.index(0)
        expected = nibbles(index.astype(np.int8), scale.numpy(), offset=CODES.index(0))
        same(pack(native, [Weight("dense", w)], Plan(_native.Format.NL4, group), blocks=False), expected)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 7), (33, 130)])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_rounded_as_in_torch(native: Any, shape: tuple[int, int], kind: str) -> None:
    w = floats(*shape, kind)
    r = quantize_int8(w)
    assert r.scale is not None
    expected = integers8(r.data.numpy(), r.scale.numpy())
    same(pack(native, [Weight("dense", w)], Plan(_native.Format.Q8), blocks=False), expected)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 7), (33, 131)])
def test_floats(native: Any, shape: tuple[int, int]) -> None:
    w = floats(*shape, "f32")
    wide = panels(columns(w.numpy(), 2)).transpose(0, 2, 1)
    same(pack(native, [Weight("dense", w)], Plan(_native.Format.F32)), as_bytes(wide).reshape(-1))
    half = panels(columns(w.bfloat16().view(torch.int16).numpy(), 32))
    pairs = half.reshape(len(half), 16, -1, 2).transpose(0, 2, 1, 3)
    for stored in (w, w.bfloat16()):
        same(pack(native, [Weight("dense", stored)], Plan(_native.Format.BF16)), as_bytes(pairs).reshape(-1))


def fp8(n: int, k: int) -> Weight:
    return Weight("fp8", *quantize_blocks(floats(n, k, "outliers", 3)))


@pytest.mark.parametrize("shape", [*SHAPES, (150, 96), (5, 7), (130, 260)])
def test_fp8_is_kept(native: Any, shape: tuple[int, int]) -> None:
    w = fp8(*shape)
    assert w.scale is not None
    rows = w.scale[torch.arange(shape[0]) // 128].numpy()
    data = panels(columns(w.data.view(torch.uint8).numpy(), 32)).transpose(0, 2, 1)
    expected = np.concatenate((as_bytes(panels(rows).transpose(0, 2, 1)), as_bytes(data)), 1)
    same(pack(native, [w], Plan(_native.Format.FP8)), expected.reshape(-1))


@pytest.mark.parametrize(
    "plan", [Plan(_native.Format.Q4, 64), Plan(_native.Format.Q8), Plan(_native.Format.F32)]
)
def test_fp8_is_converted(native: Any, plan: Plan) -> None:
    w = fp8(150, 320)
    value = Weight("dense", w.dequantize())
    same(pack(native, [w], plan, blocks=False), record_bytes(pack(native, [value], plan, blocks=False)))


def stored4(n: int, k: int, group: int, zero: bool) -> Weight:
    g = torch.Generator().manual_seed(4)
    scale = torch.randn(n, k // group, generator=g)
    points = torch.randint(-8, 8, scale.shape, generator=g, dtype=torch.int8) if zero else None
    return Weight("int4", torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8), scale, points)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 32), (17, 192, 64), (50, 384, 128), (20, 96, 32)])
def test_integers_are_kept(native: Any, shape: tuple[int, int, int], zero: bool) -> None:
    w = stored4(*shape, zero)
    assert w.scale is not None
    points = None if w.zero_point is None else w.zero_point.numpy()
    expected = nibbles(w.quantized().numpy(), w.scale.numpy(), points)
    same(pack(native, [w], Plan(_native.Format.Q4, shape[2]), blocks=False), expected)
    n, k = shape[0], shape[1] + 5
    q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n, 1)
    same(
        pack(native, [Weight("int8", q, scale)], Plan(_native.Format.Q8), blocks=False),
        integers8(q.numpy(), scale.numpy()),
    )


def stacked(weights: Sequence[Weight]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    scales = [w.scale for w in weights if w.scale is not None]
    return torch.cat([w.quantized() for w in weights]).numpy(), torch.cat(scales).numpy()


def test_rounded_and_stored_rows_share_a_panel(native: Any) -> None:
    dense = Weight("dense", floats(11, 192, "f32"))
    int8 = quantize_int8(floats(9, 192, "f32", 1))
    expected = integers8(*stacked([int8, quantize_int8(dense.data), int8]))
    same(pack(native, [int8, dense, int8], Plan(_native.Format.Q8), blocks=False), expected)
    int4 = stored4(9, 192, 64, zero=False)
    expected = nibbles(*stacked([dense_rounded := quantize_int4(dense.data), int4, dense_rounded]))
    same(pack(native, [dense, int4, dense], Plan(_native.Format.Q4, 64), blocks=False), expected)


def test_interleaved_panels(native: Any) -> None:
    gate, up = (Weight("dense", floats(n, 64, "f32", n)) for n in (40, 40))
    plan = Plan(_native.Format.Q8)
    both = record_bytes(pack(native, [gate, up], plan, interleave=True, blocks=False)).reshape(3, 2, -1)
    for i, w in enumerate((gate, up)):
        alone = record_bytes(pack(native, [w], plan, blocks=False)).reshape(3, -1)
        np.testing.assert_array_equal(both[:, i], alone)


def test_wide_groups_of_floats_are_refused(native: Any) -> None:
    w = Weight("dense", floats(16, 256, "f32"))
    with pytest.raises(ValueError, match="group: got 128 for float rows; expected 32 or 64"):
        pack(native, [w], Plan(_native.Format.Q4, 128), blocks=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("plan", [Plan(_native.Format.Q8), Plan(_native.Format.Q4, 32)])
def test_values_that_are_not_finite_are_refused(native: Any, plan: Plan, value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.ones(33, 96, dtype=dtype)
        for row, column in ((0, 0), (32, 95), (17, 40)):
            changed = w.clone()
            changed[row, column] = value
            with pytest.raises(ValueError, match="got NaN or infinity; expected finite values"):
                pack(native, [Weight("dense", changed)], plan)
        pack(native, [Weight("dense", w)], plan)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("name", ["FP8", "F32", "BF16", "Q8", "Q8_PLANES", "Q4", "NL4"])
def test_nan_in_fp8_is_refused(native: Any, name: str, code: int) -> None:
    """Kernels would read it as 480, other programs as NaN."""
    plan = Plan(getattr(_native.Format, name), 64 if name in ("Q4", "NL4") else 0)
    data = torch.full((33, 192), 0x7E, dtype=torch.uint8)
    data[::2] = 0xFE
    w = Weight("fp8", data.view(torch.float8_e4m3fn), torch.ones(1, 2))
    pack(native, [w], plan)
    for row, column in ((0, 0), (32, 191), (17, 100)):
        changed = data.clone()
        changed[row, column] = code
        with pytest.raises(ValueError, match="got NaN or infinity; expected finite values"):
            pack(native, [replace(w, data=changed.view(torch.float8_e4m3fn))], plan)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001, 0x7F800000, 0xFF800000])
def test_what_is_not_finite_stays_so_in_bfloat16(native: Any, bits: int) -> None:
    w = torch.ones(16, 32)
    w.view(torch.int32)[3, 5] = bits - (bits >> 31 << 32)
    packed = record_bytes(pack(native, [Weight("dense", w)], Plan(_native.Format.BF16)))
    found = torch.from_numpy(packed.view(np.int16).astype(np.int32) << 16).view(torch.float32)
    assert int((~found.isfinite()).sum()) == 1
    assert int((found == 1).sum()) == 16 * 32 - 1
