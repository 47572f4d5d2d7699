"""Matrices whose groups are not of adjacent columns (act-order): the input is brought into their order."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops import weights as stored
from farthing.ops.api import MoEWeights, Norm, RouterSpec
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.weights import PackedFormat
from farthing.ops.reference import ReferenceOps
from farthing.ops.weights import Cut, Weight, cut_weight, folded, in_stored_order
from tests.ops.parts import BOUNDS, EPS, distance, experts, norm, weight
from tests.ops.test_cpu import ISAS
from tests.ops.test_groups import values
from tests.ops.test_packed_file import never

REF = ReferenceOps(torch.float32)
NAMES = ["int4", "int4_zero", "int8_groups", "int8_zero", "q4_k"]


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(2, isa=request.param)


def shuffled(w: Weight) -> Weight:
    return replace(w, order=torch.randperm(w.shape[1]))


def mixture(spec: RouterSpec, name: str, hidden: int, width: int) -> MoEWeights:
    """Gate and up of an expert share an order; those of experts, and of their down projections, differ."""
    w = experts(spec, name, hidden, width, width)

    def of(load: object) -> object:
        gate, up, down = load()  # type: ignore[operator]
        order = torch.randperm(hidden)
        mlp = folded(replace(gate, order=order), replace(up, order=order), shuffled(down))
        return lambda: mlp

    loads = [of(load) for load in w.experts]
    return replace(w, experts=loads, shared=of(w.shared))  # type: ignore[arg-type]


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
    w, x, scale = mixture(spec, name, size, size), torch.randn(tokens, size), Norm(norm(size), EPS)
    handle = ops.pack_moe("m", spec, lambda: w)
    y, z = ops.moe(x.clone(), handle, scale), REF.moe(x, REF.pack_moe("m", spec, lambda: w), scale)
    assert distance(y - x, z - x) < 4 * BOUNDS[name]
    assert torch.equal(ops.moe(x[:1].clone(), handle, scale), y[:1])


def test_a_packed_file_has_the_orders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec, x, scale, packed = RouterSpec(4, 2), torch.randn(3, 64), Norm(norm(64), EPS), CpuOps(1)
    w, moe = shuffled(weight("int4", 48, 64)), mixture(spec, "int4", 64, 32)
    handles = packed.pack_linear("w", lambda: [w]), packed.pack_moe("m", spec, lambda: moe)
    packed.save_packed(str(tmp_path / "p"))
    mapped = CpuOps(1, packed=str(tmp_path / "p"))
    found = mapped.pack_linear("w", never), mapped.pack_moe("m", spec, never)  # type: ignore[arg-type]
    assert torch.equal(mapped.linear(x, found[0]), packed.linear(x, handles[0]))
    assert torch.equal(mapped.moe(x.clone(), found[1], scale), packed.moe(x.clone(), handles[1], scale))


def test_an_order_that_is_none() -> None:
    packed = CpuOps(1)._pack("w", [weight("int4", 16, 32)])
    for at, column in ((3, 4), (0, 32), (31, -1)):
        order = np.arange(32)
        order[at] = column
        with pytest.raises(ValueError, match=r"order: got column .* expected each of 32 once"):
            packed.reorder(order.ctypes.data)


def test_gate_and_up_of_different_orders_become_floats() -> None:
    torch.manual_seed(0)
    ops, x, scale = CpuOps(1), torch.randn(4, 64), Norm(norm(64), EPS)
    mlp = (
        shuffled(weight("int4", 32, 64)),
        shuffled(weight("int4", 32, 64)),
        shuffled(weight("int4", 64, 32)),
    )
    y = ops.mlp(x, ops.pack_mlp("m", lambda: folded(*mlp)), scale)
    z = REF.mlp(x, REF.pack_mlp("m", lambda: mlp), scale)
    assert ops._blobs["m.gate_up"].format == PackedFormat.F32 and distance(y, z) < BOUNDS["int4"]


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


def test_divided_columns_are_rounded_to_8_bits(caplog: pytest.LogCaptureFixture) -> None:
    """Rows are not."""
    torch.manual_seed(0)
    w = shuffled(weight("int4", 48, 128))
    stored._say_wider.cache_clear()
    with caplog.at_level(logging.WARNING):
        part = cut_weight(w, Cut(1, 32, 96))
        cut_weight(w, Cut(1, 0, 64))
    assert [r.getMessage() for r in caplog.records if "adjacent" in r.getMessage()] == [
        "groups of 4-bit weights are not of adjacent columns, and ranks divide them or a GPU reads them: "
        "rounded to 8 bits in groups of 32"
    ]
    expected: Tensor = w.dequantize()[:, 32:96]
    assert part.format == "int8_groups"
    assert float((part.dequantize() - expected).norm() / expected.norm()) < 0.006
    assert torch.equal(cut_weight(w, Cut(0, 5, 21)).dequantize(), w.dequantize()[5:21])
    assert in_stored_order(shuffled(weight("int4", 8, 48, 16))).format == "dense"
