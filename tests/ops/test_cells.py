"""Block-sparse matrices (native/linear/cells.h) on every instruction set, compared with float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops import weights
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.formats import pack, plan
from farthing.ops.cpu.weights import Linear
from farthing.ops.weights import NEVER, Weight, blocks_per_cell, costs_of, measured_for, saves_time
from tests.isas import ALL, ISAS
from tests.ops.parts import BOUNDS, distance, weight

pytestmark = [pytest.mark.pairs, pytest.mark.usefixtures("exact_on_amx")]


def pattern(n: int, k: int, block: tuple[int, int], zeros: float) -> Tensor:
    r, c = block
    keep = torch.rand(-(-n // r), -(-k // c)) >= zeros
    return keep.repeat_interleave(r, 0)[:n].repeat_interleave(c, 1)[:, :k]


def cut(w: Weight, keep: Tensor) -> Weight:
    """The weight without what is not kept."""
    if w.format == "int8":
        return Weight("int8", w.data * keep, w.scale)
    return Weight("int4", torch.where(keep[:, ::2], w.data, torch.full_like(w.data, 0x88)), w.scale)


def packed(ops: CpuOps, w: Weight, sparse: bool | None = True) -> Linear:
    native: Any = pack(ops._native, [w], plan([w], None), blocks=sparse)
    return Linear(native, *w.shape)


def exact(w: Weight, x: Tensor) -> Tensor:
    return x.double() @ w.dequantize().double().t()


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(1, isa=request.param)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("block", [(16, 16), (16, 64)])
@pytest.mark.parametrize(("n", "k", "group"), [(33, 64, 64), (100, 192, 32), (64, 1024, 128), (16, 320, 64)])
def test_products(ops: CpuOps, name: str, block: tuple[int, int], n: int, k: int, group: int) -> None:
    keep = pattern(n, k, block, 0.4)
    keep[16:32] = False  # a panel without blocks
    w = cut(weight(name, n, k, group), keep)
    handle = packed(ops, w)
    assert handle.packed.sparse
    for tokens in (1, 2, 7, 19, 45):  # many rows have loops of their own
        x = torch.randn(tokens, k)
        y = ops.linear(x, handle)
        assert distance(y, exact(w, x)) < BOUNDS[name]
        assert not y[:, 16:32].any()
        # Rounding of the activations apart, the sums are those of the dense form.
        assert distance(y, ops.linear(x, packed(ops, w, False))) < 1e-12


@pytest.mark.parametrize("name", ["int8", "int4", "nl4"])
@pytest.mark.parametrize(("k", "group"), [(512, 64), (512, 32), (66_048, 64)])  # the last: very many cells
def test_a_row_does_not_depend_on_the_others(ops: CpuOps, name: str, k: int, group: int) -> None:
    keep = pattern(32, k, (16, 16), 0.5)
    if name == "nl4":
        w = Weight("dense", torch.randn(32, k) * keep)
        handle = Linear(pack(ops._native, [w], plan([w], "int4"), blocks=True), 32, k)
    else:
        handle = packed(ops, cut(weight(name, 32, k, group), keep))
    assert handle.packed.sparse
    x = torch.randn(41, k)
    y = ops.linear(x, handle)
    for tokens in (1, 8, 17, 33):
        assert torch.equal(ops.linear(x[-tokens:].clone(), handle), y[-tokens:])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_nothing_but_zeros(ops: CpuOps, name: str) -> None:
    handle = packed(ops, cut(weight(name, 48, 128, 64), torch.zeros(48, 128, dtype=torch.bool)))
    assert handle.packed.sparse
    assert handle.packed.nbytes == 3 * 128
    assert not ops.linear(torch.randn(5, 128), handle).any()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_chosen_where_the_measured_costs_say_so(
    ops: CpuOps, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    isa = weights.measured_for(ops._native.isa)
    monkeypatch.setitem(weights.COSTS[isa], name, (0.5, 0.75, 1.0, 1.1))
    torch.manual_seed(1)
    for zeros, block in (
        (0.02, (16, 64)),
        (0.05, (16, 64)),
        (0.15, (16, 64)),
        (0.2, (16, 16)),
        (0.6, (16, 16)),
    ):
        keep = pattern(256, 512, block, zeros)
        w = cut(weight(name, 256, 512, 64), keep)
        counts = blocks_per_cell(keep, 64)
        costs = (counts == 1) * 0.5 + (counts == 2) * 0.75 + (counts == 3) * 1.0 + (counts == 4) * 1.1
        assert saves_time(counts, name, 64, isa) == bool(costs.mean() < 1)
        assert packed(ops, w, None).packed.sparse == saves_time(counts, name, 64, isa)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_dense_matrix_stays_dense(ops: CpuOps, group: int) -> None:
    """Also where a cell is as narrow as a group of scales."""
    w = weight("int4", 64, 256, group)
    counts = blocks_per_cell(torch.ones(64, 256, dtype=torch.bool), group)
    assert not saves_time(counts, "int4", group, ops._native.isa)
    assert not packed(ops, w, None).packed.sparse


def test_every_instruction_set_has_costs() -> None:
    for isa in (*ALL, "amx"):
        assert isa == "amx" or measured_for(isa) in isa
        for kind in ("int8", "int4", "nl4"):
            costs = costs_of(kind, isa)
            assert costs == NEVER if isa == "amx" else 0 < costs[0] < costs[3]
        assert costs_of("fp8", isa) == NEVER
    assert costs_of("int8", "avx2") != costs_of("int8", "avx512_vnni")


@pytest.mark.parametrize("zeros", [0.9, 1.0])
def test_unmeasured_instruction_set_takes_the_dense_form(ops: CpuOps, zeros: float) -> None:
    keep = pattern(256, 512, (16, 64), zeros)
    counts = blocks_per_cell(keep, 64)
    assert saves_time(counts, "int8", 64, "avx512_bf16")
    assert not saves_time(counts, "int8", 64, "amx")
    assert not packed(ops, cut(weight("int8", 256, 512), keep), False).packed.sparse


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_packed_file_is_smaller(name: str) -> None:
    w = weight(name, 512, 2048, 64)
    keep = torch.ones(32 * 32, dtype=torch.bool)
    keep[torch.randperm(len(keep))[: int(0.4 * len(keep))]] = False
    w = cut(w, keep.view(32, 32).repeat_interleave(16, 0).repeat_interleave(64, 1))
    sparse, dense = (packed(CpuOps(1), w, s).packed.serialized_bytes for s in (True, False))
    assert sparse < 0.62 * dense
