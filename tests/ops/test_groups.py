"""Formats whose groups have scales, minimums and units: exact values in the packed layout, and products."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops.api import Norm
from farthing.ops.cpu import CpuOps, weights
from farthing.ops.cpu.formats import HELD, PackedFormat, Plan, plan
from farthing.ops.cut import Cut, cut_weight
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import RouterSpec
from farthing.ops.weights import INTEGERS, Weight, quantize_int8
from tests.isas import ISAS
from tests.ops.parts import BOUNDS, EPS, GROUPS, SCALED, UNITS, distance, experts, norm, weight

pytestmark = [pytest.mark.pairs, pytest.mark.usefixtures("exact_on_amx")]

REF = ReferenceOps(torch.float32)


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(2, isa=request.param)


def values(packed: object, n: int, k: int) -> Tensor:
    """What the kernels multiply by."""
    ids, out = np.arange(n), np.empty((n, k), np.float32)
    packed.read_rows(ids.ctypes.data, n, out.ctypes.data)  # type: ignore[attr-defined]
    return torch.from_numpy(out)


def exact(ops: CpuOps, w: Weight) -> None:
    packed = ops._pack("w", [w])
    assert HELD[packed.format] == w.format
    assert torch.equal(values(packed, *w.shape), w.dequantize())
    del ops._blobs["w"]


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("name", GROUPS)
def test_values_in_groups_are_exact(ops: CpuOps, name: str, group: int) -> None:
    if name.startswith("q5") and group < 32:
        return  # a step of the kernels has 32 columns
    for n, k in ((1, group), (16, 2 * group), (50, 3 * group)):
        exact(ops, weight(name, n, k, group))


@pytest.mark.parametrize("rows", [1, 16, 50])
@pytest.mark.parametrize("name", UNITS)
def test_values_in_units_are_exact(ops: CpuOps, name: str, rows: int) -> None:
    for k in (256, 768):
        exact(ops, weight(name, rows, k))


def test_units_with_groups_of_16(ops: CpuOps) -> None:
    exact(ops, weight("q4_k", 20, 512, 16))


@pytest.mark.parametrize("name", ["f32", "bf16", "fp8", "int8", "int4_zero"])
def test_rows_of_other_formats(ops: CpuOps, name: str) -> None:
    w = weight(name, 50, 192)
    found = values(ops._pack("w", [w]), 50, 192)
    torch.testing.assert_close(found, w.dequantize(), rtol=6e-4 if "int4" in name else 1e-6, atol=0)
    with pytest.raises(ValueError, match="row -1 of a dense matrix with 50 rows"):
        values_at = np.array([-1])
        ops._blobs["w"].read_rows(values_at.ctypes.data, 1, found.numpy().ctypes.data)


@pytest.mark.parametrize("name", SCALED)
def test_values_of_other_scales_are_exact(ops: CpuOps, name: str) -> None:
    for n, k in ((1, 32), (50, 160), (200, 512)):
        w = weight(name, n, k)
        packed = ops._pack("w", [w])
        assert HELD[packed.format] == w.format
        torch.testing.assert_close(values(packed, n, k), w.dequantize(), rtol=3e-7, atol=0)
        del ops._blobs["w"]


@pytest.mark.parametrize("name", ["fp8_rows", "fp8_32"])
def test_fp8_of_other_scales_that_is_rounded_or_stacked(name: str) -> None:
    """It becomes floats first: its scales are those of its rows and groups."""
    w, x = weight(name, 48, 192), torch.randn(3, 192)
    for quantization, stack in (("int8", [w]), (None, [w, weight("fp8", 16, 192)])):
        ops = CpuOps(1, quantization)
        y = ops.linear(x, ops.pack_linear("w", lambda s=stack: s))  # type: ignore[misc]
        expected = torch.cat([x @ part.dequantize().t() for part in stack], 1)
        assert distance(y, expected) < 1e-4


@pytest.mark.parametrize(
    ("gate", "up"), [("int4", "int8"), ("int4_zero", "q5_0"), ("iq4_xs", "int8_groups"), ("q6_k", "iq4_nl")]
)
def test_gate_and_up_of_different_formats_keep_their_values(ops: CpuOps, gate: str, up: str) -> None:
    """In 8 bits, not as float32: GGUF and GPTQModel let each matrix have a type of its own."""
    x, scale = torch.randn(5, 256), Norm(norm(256), EPS)
    mlp = weight(gate, 64, 256), weight(up, 64, 256), weight("int4", 256, 64)
    y = ops.mlp(x, ops.pack_mlp("m", lambda: mlp), scale)
    packed = ops._blobs["m.gate_up"]
    assert packed.format == PackedFormat.Q8_GROUPS
    rows = values(packed, 128, 256).view(-1, 2, 16, 256).transpose(0, 1).reshape(2, 64, 256)
    torch.testing.assert_close(rows, torch.stack([w.dequantize() for w in mlp[:2]]), rtol=6e-4, atol=0)
    assert distance(y, REF.mlp(x, REF.pack_mlp("m", lambda: mlp), scale)) < 1e-4


def test_formats_that_become_floats_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    w = weight("int4", 64, 96, 48)
    weights._say_floats.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name in "ab":
            CpuOps(1).pack_linear(name, lambda: [w])
    assert [r.getMessage() for r in caplog.records if "float32" in r.getMessage()] == [
        "matrices in int4 in groups of 48 become float32, because no kernel reads them"
    ]


def test_rows_of_a_head_in_planes() -> None:
    ops, w = CpuOps(1), quantize_int8(torch.randn(40, 128))
    found = values(ops._pack_as(Plan(PackedFormat.Q8_PLANES), "w", [w]), 40, 128)
    assert torch.equal(found, w.dequantize())


def test_scales_of_16_bits_are_exact_at_any_distance(ops: CpuOps) -> None:
    w = weight("mxfp4", 33, 256)
    assert w.scale is not None
    powers = torch.randint(-20, 15, w.scale.shape).float()
    exact(ops, replace(w, scale=torch.exp2(powers)))
    halves = torch.randint(1, 0x7BFF, (33, 8), dtype=torch.int16).view(torch.float16).float()
    for name in ("int8_groups", "iq4_nl"):  # all of float16, subnormal numbers included
        exact(ops, replace(weight(name, 33, 256), scale=halves))
    exact(ops, replace(weight("int8_groups", 33, 256), scale=torch.randn(33, 8).bfloat16().float()))


def test_mxfp4_has_a_byte_per_group_of_32(ops: CpuOps) -> None:
    """As in its files; a row's scales are as far apart as theirs can be, and some are zero."""
    w = weight("mxfp4", 33, 256)
    assert w.scale is not None
    powers = torch.randint(-63, 63, w.scale.shape).float()
    exact(ops, replace(w, scale=torch.exp2(powers) * (powers % 7 > 0)))
    exact(ops, replace(w, scale=3 * torch.exp2(powers)))
    packed, padded_rows = ops._pack("w", [w]), 48
    assert packed.nbytes == padded_rows * (256 // 2 + 256 // 32 + 4)
    for wrong in (1.5, -2.0):
        scale = w.scale.clone()
        scale[20, 3] *= wrong
        with pytest.raises(ValueError, match="expected powers of two in groups of 32 of MXFP4"):
            ops._pack("wrong", [replace(w, scale=scale)])


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 12, 13, 40])
@pytest.mark.parametrize("name", [*GROUPS, *UNITS, *SCALED])
def test_products(ops: CpuOps, name: str, tokens: int) -> None:
    for n in (16, 33, 100):
        w, x = weight(name, n, 512), torch.randn(tokens, 512) * torch.rand(512) * 3
        x[0, :2] = torch.tensor([30.0, -30.0])
        y = ops.linear(x, ops.pack_linear(f"w{n}", lambda w=w: [w]), Norm(norm(512), EPS))  # type: ignore[misc]
        assert y.isfinite().all()
    scale = norm(512)
    y, z = (
        ops.linear(x, ops.pack_linear("w", lambda: [w]), Norm(scale, EPS)),
        REF.linear(x, w.dequantize(), Norm(scale, EPS)),
    )
    assert distance(y, z) < BOUNDS[name]


@pytest.mark.parametrize("name", [*GROUPS, *UNITS])
def test_no_row_depends_on_the_others(ops: CpuOps, name: str) -> None:
    w, x = weight(name, 50, 512), torch.randn(40, 512)
    handle = ops.pack_linear("w", lambda: [w])
    whole = ops.linear(x, handle)
    for rows in (1, 3, 9, 14):
        assert torch.equal(ops.linear(x[:rows], handle), whole[:rows])


@pytest.mark.parametrize("name", [*GROUPS, *UNITS])
@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_mixtures_of_experts(ops: CpuOps, name: str, tokens: int) -> None:
    spec, size = RouterSpec(8, 3), 256 if name in UNITS else 96
    w = experts(spec, name, size, size, size)
    x, scale = torch.randn(tokens, size), norm(size)
    y = ops.moe(x.clone(), ops.pack_moe("m", spec, lambda: w), Norm(scale, EPS))
    z = REF.moe(x, REF.pack_moe("m", spec, lambda: w), Norm(scale, EPS))
    assert distance(y - x, z - x) < 4 * BOUNDS[name]


@pytest.mark.parametrize("name", [*GROUPS, *UNITS])
def test_rounding_while_loading_keeps_integers(name: str) -> None:
    w = weight(name, 32, 256)
    assert plan([w], "int4") == plan([w], "int8") == plan([w], None)


@pytest.mark.parametrize("name", [*GROUPS, *UNITS, "int4_zero"])
@pytest.mark.parametrize(
    "cut",
    [Cut(0, 3, 20), Cut(0, 1, 4, ((9, 12), (20, 24))), Cut(1, 256, 768), Cut(1, 32, 128), Cut(1, 0, 48)],
)
def test_slices(name: str, cut: Cut) -> None:
    w = weight(name, 24, 768)
    found, expected = cut_weight(w, cut), cut.of(w.dequantize())
    assert torch.equal(found.dequantize(), expected)
    whole = 256 if w.format in INTEGERS and INTEGERS[w.format].unit else w.group_size
    kept = cut.dim == 0 or (cut.start % whole == 0 and cut.stop % whole == 0)
    assert found.format == (w.format if kept else "dense")
