"""Matrices whose groups are not of adjacent columns (act-order): the input is brought into their order."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("farthing._native")

from farthing.ops import cut
from farthing.ops import weights as stored
from farthing.ops.api import Norm
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.formats import PackedFormat
from farthing.ops.cut import Cut, columns_of, cut_weight
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import RouterSpec
from farthing.ops.weights import Weight, folded
from tests.isas import ISAS
from tests.ops.parts import BOUNDS, EPS, distance, norm, ordered_experts, weight
from tests.ops.test_groups import values
from tests.ops.test_packed_file import never

pytestmark = [pytest.mark.pairs, pytest.mark.usefixtures("exact_on_amx")]

REF = ReferenceOps(torch.float32)
NAMES = ["int4", "int4_zero", "int8_groups", "int8_zero", "q4_k"]


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(2, isa=request.param)


def shuffled(w: Weight) -> Weight:
    return replace(w, order=torch.randperm(w.shape[1]))


@pytest.mark.parametrize("name", NAMES)
def test_values(ops: CpuOps, name: str) -> None:
    for n, k in ((1, 256), (50, 768)):
        w = weight(name, n, k)
        ordered = shuffled(w)
        assert ordered.order is not None
        assert torch.equal(ordered.dequantize()[:, ordered.order], w.dequantize())
        packed = ops._pack(f"w{n}", [ordered])
        rtol = 6e-4 if "int4" in name else 3e-7
        torch.testing.assert_close(values(packed, n, k), ordered.dequantize(), rtol=rtol, atol=0)


@pytest.mark.parametrize("tokens", [1, 2, 13, 40])
@pytest.mark.parametrize("name", NAMES)
def test_products(ops: CpuOps, name: str, tokens: int) -> None:
    """The bits of the product with stored columns and the input in their order, with a norm and without."""
    w, x, scale = weight(name, 100, 512), torch.randn(tokens, 512), norm(512)
    ordered = shuffled(w)
    order = ordered.order
    assert order is not None
    plain, turned = (ops.pack_linear(n, lambda v=v: [v]) for n, v in (("a", w), ("b", ordered)))  # type: ignore[misc]
    assert torch.equal(ops.linear(x, turned), ops.linear(x[:, order].contiguous(), plain))
    y = ops.linear(x, turned, Norm(scale, EPS))
    assert distance(y, REF.linear(x, ordered.dequantize(), Norm(scale, EPS))) < BOUNDS[name]
    assert torch.equal(ops.linear(x[-1:], turned, Norm(scale, EPS)), y[-1:])


def test_rows_of_several_orders_follow_each_other(ops: CpuOps) -> None:
    parts = [weight("int4", n, 128) for n in (32, 48, 20)]
    parts = [shuffled(parts[0]), parts[1], shuffled(parts[2])]
    x, handle = torch.randn(5, 128), ops.pack_linear("w", lambda: parts)
    expected = torch.cat([x @ w.dequantize().t() for w in parts], 1)
    assert handle.shape == (100, 128) and distance(ops.linear(x, handle), expected) < BOUNDS["int4"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_mixtures_of_experts(ops: CpuOps, name: str, tokens: int) -> None:
    spec, size = RouterSpec(8, 3), 256 if name == "q4_k" else 96
    w, x, scale = ordered_experts(spec, name, size, size), torch.randn(tokens, size), Norm(norm(size), EPS)
    handle = ops.pack_moe("m", spec, lambda: w)
    y, z = ops.moe(x.clone(), handle, scale), REF.moe(x, REF.pack_moe("m", spec, lambda: w), scale)
    assert distance(y - x, z - x) < 4 * BOUNDS[name]
    assert torch.equal(ops.moe(x[:1].clone(), handle, scale), y[:1])


def test_a_packed_file_has_the_orders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec, x, scale, packed = RouterSpec(4, 2), torch.randn(3, 64), Norm(norm(64), EPS), CpuOps(1)
    w, moe = shuffled(weight("int4", 48, 64)), ordered_experts(spec, "int4", 64, 32)
    handles = packed.pack_linear("w", lambda: [w]), packed.pack_moe("m", spec, lambda: moe)
    packed.save_packed(str(tmp_path / "p"))
    mapped = CpuOps(1, packed=str(tmp_path / "p"))
    found = mapped.pack_linear("w", never), mapped.pack_moe("m", spec, never)  # type: ignore[arg-type]
    assert torch.equal(mapped.linear(x, found[0]), packed.linear(x, handles[0]))
    assert torch.equal(mapped.moe(x.clone(), found[1], scale), packed.moe(x.clone(), handles[1], scale))


def test_an_order_that_is_none() -> None:
    packed = CpuOps(1)._pack("w", [weight("int4", 16, 32)])
    for at, column, columns in ((3, 4, 32), (0, 32, 32), (31, -2, 32), (5, -1, 31)):
        order = np.arange(32)
        order[at] = column
        with pytest.raises(ValueError, match=rf"order: got column .* expected each of {columns} once"):
            packed.reorder(order.ctypes.data)


def test_gate_and_up_of_different_orders_become_8_bits(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    ops, x, scale = CpuOps(1), torch.randn(4, 64), Norm(norm(64), EPS)
    mlp = (
        shuffled(weight("int4", 32, 64)),
        shuffled(weight("int4", 32, 64)),
        shuffled(weight("int4", 64, 32)),
    )
    stored._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        y = ops.mlp(x, ops.pack_mlp("m", lambda: folded(*mlp)), scale)
    z = REF.mlp(x, REF.pack_mlp("m", lambda: mlp), scale)
    assert ops._blobs["m.gate_up"].format == PackedFormat.Q8_GROUPS and distance(y, z) < BOUNDS["int4"]
    assert [r.getMessage() for r in caplog.records if "together" in r.getMessage()] == [
        "matrices that are read together are stored in int4 in groups of 32 with an order and int4 in groups "
        "of 32 with an order: they are rounded to 8 bits in groups of 32, 8.5 bits a weight instead of 5"
    ]


@pytest.mark.parametrize("name", ["int4", "int8", "fp8", "bf16", "q4_k"])
def test_folding_keeps_the_function(name: str) -> None:
    """Whatever the formats of gate and up are, and with biases."""
    torch.manual_seed(0)
    gate, up = (replace(weight(name, 256, 256), bias=torch.randn(256)) for _ in range(2))
    down = shuffled(weight("int4", 64, 256))
    g, u, d = folded(gate, up, down)
    order = down.order
    assert order is not None and d.order is None
    for before, after in ((gate, g), (up, u)):
        assert before.bias is not None and after.bias is not None
        assert torch.equal(after.dequantize(), before.dequantize()[order])
        assert torch.equal(after.bias, before.bias[order])
    assert torch.equal(d.dequantize(), down.dequantize()[:, order])
    assert folded(gate, up, replace(down, order=None)) == (gate, up, replace(down, order=None))


DIVIDED = ["int4", "int4_zero", "int8_groups", "int8_zero", "q5_0"]


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("name", DIVIDED)
def test_divided_columns_keep_their_values(ops: CpuOps, name: str, group: int) -> None:
    """And bits: ranks divide the columns of o_proj, each of which has some of every group."""
    w = shuffled(weight(name, 48, 512, group))
    value = w.dequantize()
    for start, stop in ((0, 256), (256, 512), (128, 256), (100, 333)):
        part = cut_weight(w, Cut(1, start, stop))
        assert part.format == w.format and part.shape == (48, stop - start)
        assert torch.equal(part.dequantize(), value[:, start:stop])
        assert torch.equal(cut_weight(part, Cut(1, 10, 90)).dequantize(), value[:, start + 10 : start + 90])
        packed = ops._pack(f"{start}", [part])
        assert packed.shape == part.shape
        rtol = 6e-4 if "int4" in name else 3e-7
        torch.testing.assert_close(values(packed, *part.shape), part.dequantize(), rtol=rtol, atol=0)
        x = torch.randn(5, stop - start)
        handle = ops.pack_linear(f"{start}.", lambda p=part: [p])  # type: ignore[misc]
        assert distance(ops.linear(x, handle), x @ part.dequantize().t()) < BOUNDS[name]
        ops.forget("")
    assert torch.equal(cut_weight(w, Cut(0, 5, 21)).dequantize(), value[5:21])


@given(st.integers(0, 7), st.integers(1, 8), st.sampled_from(DIVIDED), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_any_part_of_the_columns_keeps_its_values(first: int, count: int, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    w, start = shuffled(weight(name, 4, 256, 64)), 32 * first
    stop = min(256, start + 32 * count - seed)
    part = cut_weight(w, Cut(1, start, stop))
    assert torch.equal(part.dequantize(), w.dequantize()[:, start:stop])


def test_bytes_of_divided_columns() -> None:
    """Less than 8 bits, in which they were held: 4 bits in groups of 128, on two ranks and on four."""
    torch.manual_seed(0)
    w = shuffled(weight("int4", 64, 4096, 128))
    for ranks, most in ((2, 6.3), (4, 7.1)):
        size = 4096 // ranks
        part = cut_weight(w, Cut(1, size, 2 * size))
        packed = CpuOps(1)._pack("w", [part])
        assert 8 * packed.nbytes / (64 * size) < most


def test_units_of_divided_columns_become_floats(caplog: pytest.LogCaptureFixture) -> None:
    w = shuffled(weight("q4_k", 16, 512))
    cut._say_floats.cache_clear()
    with caplog.at_level(logging.WARNING):
        parts = [cut_weight(w, Cut(1, start, start + 256)) for start in (0, 256)]
    for part, start in zip(parts, (0, 256), strict=True):
        assert part.format == "dense" and torch.equal(part.data, w.dequantize()[:, start : start + 256])
    assert [r.getMessage() for r in caplog.records] == [
        "columns of matrices in q4_k with an order are divided: the parts are held in float32, 32 bits a "
        "weight instead of 6, because units do not fit them"
    ]


def test_halves_of_one_rank_have_orders_of_their_own() -> None:
    """As of two ranks: products of halves are summed."""
    torch.manual_seed(0)
    w, x = shuffled(weight("int4", 48, 512, 64)), torch.randn(7, 512)
    both = CpuOps(2, parts=2)
    whole = both.pack_linear("o", lambda: [w], 8)
    halves = columns_of(w, 256)
    one = CpuOps(2)
    expected = sum(
        one.linear(x[:, 256 * i : 256 * (i + 1)].contiguous(), one.pack_linear(f"{i}", lambda p=p: [p]))  # type: ignore[misc]
        for i, p in enumerate(halves)
    )
    for rows in (slice(0, 1), slice(0, 7)):
        assert torch.equal(both.linear(x[rows], whole), expected[rows])


def test_a_packed_file_has_padded_orders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    part, x, packed = (
        cut_weight(shuffled(weight("int4", 48, 512, 64)), Cut(1, 0, 256)),
        torch.randn(3, 256),
        CpuOps(1),
    )
    handle = packed.pack_linear("w", lambda: [part])
    packed.save_packed(str(tmp_path / "p"))
    mapped = CpuOps(1, packed=str(tmp_path / "p"))
    found = mapped.pack_linear("w", never)  # type: ignore[arg-type]
    assert found.shape == (48, 256) and torch.equal(mapped.linear(x, found), packed.linear(x, handle))
