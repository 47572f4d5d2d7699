"""What AMX tiles promise. `--deterministic` gives integers the bits of the AVX-512 kernels, for any number of
rows; otherwise steps of many tokens are computed in blocks of columns, within the rounding that this causes.

`make test-isa` emulates tiles on processors without them. `test_batch_invariance.py` covers bfloat16.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing import _native
from farthing.ops.api import Norm
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.formats import pack, plan
from farthing.ops.cpu.weights import Linear
from farthing.ops.specs import RouterSpec
from farthing.ops.weights import InputRounding, Weight, quantize_int8
from tests.ops.parts import EPS, GROUPS, ROUTERS, UNITS, distance, experts, norm, ordered_experts, weight

SETS = _native.instruction_sets().split()
pytestmark = pytest.mark.skipif(
    not {"amx", "avx512_vnni"} <= set(SETS), reason="needs AMX and AVX-512; make test-isa emulates the former"
)

INTEGERS = ["int8", "int4", "int4_zero", "nl4"]
ROWS = 100
BLOCK = 512  # kBlockColumns in native/pack/matrix.h


@pytest.fixture
def both() -> tuple[CpuOps, CpuOps]:
    torch.manual_seed(0)
    return CpuOps(1, isa="amx", invariant=True), CpuOps(1, isa="avx512_vnni")


def in_blocks(threads: int = 1, least: int = 2, parts: int = 1) -> CpuOps:
    """Tiles from `least` tokens on."""
    torch.manual_seed(0)
    ops = CpuOps(threads, isa="amx", parts=parts)
    ops._native.tile_tokens = least
    return ops


def random_weight(name: str, n: int, k: int, group: int) -> Weight:
    return Weight("dense", torch.randn(n, k)) if name == "nl4" else weight(name, n, k, group)


def packed(ops: CpuOps, name: str, w: Weight) -> Linear:
    n, k = w.shape
    return Linear(pack(ops._native, [w], plan([w], "int4" if name == "nl4" else None)), n, k)


def values(handle: Linear, n: int, k: int) -> Tensor:
    """The numbers that a matrix holds, in float64."""
    rows, out = torch.arange(n), torch.empty(n, k)
    handle.packed.read_rows(rows.data_ptr(), n, out.data_ptr())
    return out.double()


def rounding(x: Tensor, w: Tensor) -> float:
    """The expected squared error of x times w, summed over all outputs, if both are rounded to integers with
    one scale per row and block of columns: a twelfth of a scale's square per factor."""
    k, total = x.shape[1], 0.0
    width = 64 * ceil(ceil(k / ceil(k / BLOCK)) / 64)
    for a, b in zip(x.split(width, 1), w.split(width, 1), strict=True):
        of_a, of_b = ((m.abs().amax(1, keepdim=True) / 127) ** 2 / 12 for m in (a, b))
        total += float(((a * a).sum(1, keepdim=True) @ of_b.T).sum())
        total += float((of_a @ (b * b).sum(1, keepdim=True).T).sum())
    return total


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(("n", "k", "group"), [(100, 192, 32), (48, 512, 64), (33, 256, 128)])
def test_deterministic_products_have_the_bits_of_vectors(
    both: tuple[CpuOps, CpuOps], name: str, n: int, k: int, group: int
) -> None:
    w, x, scale = random_weight(name, n, k, group), torch.randn(ROWS, k), norm(k)

    def product(ops: CpuOps, rows: int) -> Tensor:
        return ops.linear(x[:rows].clone(), packed(ops, name, w), Norm(scale, EPS))

    expected = product(both[1], ROWS)
    for rows in (1, 12, 13, 16, 17, 32, 33, 48, 64, ROWS):
        assert torch.equal(product(both[0], rows), expected[:rows])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_deterministic_experts_have_the_bits_of_vectors(both: tuple[CpuOps, CpuOps], name: str) -> None:
    spec = ROUTERS["v3"]
    parts, x, scale = experts(spec, name, 192, 128, 256), torch.randn(ROWS, 192), norm(192)
    tiles, vectors = (
        ops.moe(x.clone(), ops.pack_moe("m", spec, lambda: parts), Norm(scale, EPS)) for ops in both
    )
    assert torch.equal(tiles, vectors)


@pytest.mark.parametrize("exact", [False, True])
def test_prompts_round_inputs_to_4_bits_as_decoding_does(both: tuple[CpuOps, CpuOps], exact: bool) -> None:
    """A matrix trained for 4-bit inputs (W4A4), whose rounding is that of its groups."""
    ops = both[0] if exact else in_blocks()
    w = replace(weight("int4", 64, 256, 64), inputs=InputRounding(4, clip=0.9))
    x = torch.randn(ROWS, 256)
    tiles, vectors = (o.pack_linear("w", lambda: [w]) for o in (ops, both[1]))
    expected = torch.cat([both[1].linear(row[None].clone(), vectors) for row in x])
    for rows in (1, 32, 33, ROWS):
        assert torch.equal(ops.linear(x[:rows].clone(), tiles), expected[:rows])


@pytest.mark.parametrize("name", [*INTEGERS, *GROUPS, *UNITS, "int8_zero", "nvfp4"])
@pytest.mark.parametrize(("n", "k"), [(100, 192), (33, 576), (16, 1280), (40, 2816)])
def test_blocks_are_within_the_rounding_of_their_factors(name: str, n: int, k: int) -> None:
    if k % 256 and name in UNITS:
        k = 256
    ops = in_blocks()
    handle = packed(ops, name, random_weight(name, n, k, 32))
    w = values(handle, n, k)
    error = expected = 0.0
    for rows in (2, 15, 16, 17, 31, 32, 33, 47, 64, 65):
        x = torch.randn(rows, k) * torch.rand(rows, 1).exp()
        error += float((ops.linear(x, handle).double() - x.double() @ w.T).square().sum())
        expected += rounding(x.double(), w)
    # 8-bit weights are used as they are; the unit of others may be a tenth larger than it need be.
    assert 0.2 < error / expected < 1.3


@given(
    name=st.sampled_from([*INTEGERS, *GROUPS, "int8_zero", "bf16"]),
    n=st.integers(1, 150),
    groups=st.integers(1, 40),
    rows=st.integers(2, 100),
    threads=st.integers(1, 3),
    gain=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_blocks_of_any_shape(name: str, n: int, groups: int, rows: int, threads: int, gain: float) -> None:
    ops, k = in_blocks(threads), 32 * groups
    handle = packed(ops, name, random_weight(name, n, k, 32))
    x, residual = torch.randn(rows, k) * gain, torch.randn(rows, n) * gain
    y = ops.linear(x, handle, residual=residual.clone())
    expected = x.double() @ values(handle, n, k).T + residual.double()
    assert distance(y, expected) < (3e-6 if name == "bf16" else 1e-4)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("name", ["int8", "int4", "nl4", "bf16"])
def test_blocks_hold_extremes(name: str, value: float) -> None:
    """Every product the largest there is: sums of 7,168 columns in every sign, and zeros that stay zero."""
    ops, k = in_blocks(), 7168
    dense = torch.ones(32, k)
    dense[::2] *= -1
    w = quantize_int8(dense) if name == "int8" else Weight("dense", dense.bfloat16())
    handle = Linear(pack(ops._native, [w], plan([w], "int4" if name in ("int4", "nl4") else None)), 32, k)
    y = ops.linear(torch.full((33, k), value), handle)
    torch.testing.assert_close(y, value * k * dense[:, 0].expand(33, -1), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("name", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_input_spoils_its_row_alone(name: str, bad: float) -> None:
    ops, x = in_blocks(), torch.randn(40, 640)
    x[17, 500] = bad
    y = ops.linear(x, packed(ops, name, weight(name, 48, 640)))
    assert not y[17].isfinite().any()
    assert y[torch.arange(40) != 17].isfinite().all()


@pytest.mark.parametrize("columns", [[3], [3, BLOCK + 7], [*range(0, 2 * BLOCK, 128)]])
def test_outliers_do_not_round_their_neighbours_away(columns: list[int]) -> None:
    """Weights of the outliers' columns are 0, so that only the rounding of the others is seen."""
    ops, dense, x = in_blocks(), torch.randn(33, 2 * BLOCK), torch.randn(65, 2 * BLOCK)
    dense[:, columns] = 0.0
    handle = packed(ops, "int8", quantize_int8(dense))
    others = x.double() @ values(handle, *dense.shape).T
    x[::3, columns] = 300.0
    assert distance(ops.linear(x, handle), others) < 1e-4


@pytest.mark.parametrize("name", [*INTEGERS[:3], "bf16", "mxfp4", "q4_1"])
@pytest.mark.parametrize(("width", "shared"), [(96, 96), (600, 160), (96, None)])
def test_experts_in_blocks(name: str, width: int, shared: int | None) -> None:
    spec = RouterSpec(8, 3, num_groups=4, top_k_groups=2)
    ops, exact = in_blocks(2), CpuOps(1, isa="amx", invariant=True)
    width -= width % 32
    parts, scale = experts(spec, name, 96, width, shared), norm(96)
    tiles, vectors = (o.pack_moe("m", spec, lambda: parts) for o in (ops, exact))
    for tokens in (6, 17, 40, ROWS):
        x = torch.randn(tokens, 96)
        found, expected = (
            o.moe(x.clone(), m, Norm(scale, EPS), residual=False) for o, m in ((ops, tiles), (exact, vectors))
        )
        assert not torch.equal(found, expected)
        assert distance(found, expected) < (3e-5 if name == "bf16" else 5e-4)


def test_experts_with_orders_and_parts_in_blocks() -> None:
    spec, scale, x = RouterSpec(8, 3, num_groups=4, top_k_groups=2), norm(128), torch.randn(50, 128)
    ops, exact, halves = in_blocks(2), CpuOps(1, isa="amx", invariant=True), in_blocks(parts=2)
    ordered = ordered_experts(spec, "int4", 128, 128)
    for o, whole in ((ops, ordered), (halves, experts(spec, "int8", 128, 128, 256))):
        found, expected = (
            each.moe(x.clone(), each.pack_moe("m", spec, lambda w=whole: w), Norm(scale, EPS))  # type: ignore[misc]
            for each in (o, exact)
        )
        exact.forget("m")
        assert distance(found - x, expected - x) < 5e-4


def test_experts_take_one_form_by_the_tokens_of_a_step() -> None:
    """Few rows an expert: the exact form for all of them, as its weights' bytes would not pay."""
    spec, scale = RouterSpec(32, 2), norm(64)
    ops, exact = CpuOps(1, isa="amx"), CpuOps(1, isa="amx", invariant=True)
    torch.manual_seed(0)
    parts = experts(spec, "int4", 64, 64, None)
    handles = [o.pack_moe("m", spec, lambda: parts) for o in (ops, exact)]
    for tokens, same in ((1, True), (32, True), (319, True), (320, False)):  # 20 rows an expert
        x = torch.randn(tokens, 64)
        found, expected = (
            o.moe(x.clone(), m, Norm(scale, EPS)) for o, m in zip((ops, exact), handles, strict=True)
        )
        assert torch.equal(found, expected) is same


def test_two_ranks_with_half_of_the_experts_take_the_form_of_one() -> None:
    spec, x, scale = RouterSpec(8, 3, num_groups=4, top_k_groups=2), torch.randn(ROWS, 64), norm(64)
    ops, whole = CpuOps(2, isa="amx"), experts(spec, "int4", 64, 96, 96)
    one = ops.pack_moe("m", spec, lambda: whole)
    ranks = [
        replace(
            whole,
            experts=[load if e // 4 == r else None for e, load in enumerate(whole.experts)],
            shared=whole.shared if r == 0 else None,
        )
        for r in range(2)
    ]
    a, b = (
        ops.moe(
            x.clone(), ops.pack_moe(f"rank{r}", spec, lambda r=r: ranks[r]), Norm(scale, EPS), residual=False
        )  # type: ignore[misc]
        for r in range(2)
    )
    assert torch.equal(ops.moe(x.clone(), one, Norm(scale, EPS)), x + (a + b))


def test_further_columns_in_blocks() -> None:
    ops, exact = in_blocks(parts=2), CpuOps(1, isa="amx", invariant=True, parts=2)
    w, x = weight("int8", 300, 1024), torch.randn(70, 1024)
    y, expected = (o.linear(x, o.pack_linear("o", lambda: [w], 4)) for o in (ops, exact))
    assert 0 < distance(y, expected) < 1e-4


def test_threads_change_no_bit_in_blocks() -> None:
    w, x = random_weight("nl4", 500, 1100, 64), torch.randn(600, 1100)
    w = Weight("dense", w.data[:, :1088])
    found = [o.linear(x[:, :1088].contiguous(), packed(o, "nl4", w)) for o in map(in_blocks, (1, 2, 3))]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_steps_below_the_least_tokens_are_exact() -> None:
    ops, exact = CpuOps(1, isa="amx"), CpuOps(1, isa="amx", invariant=True)
    assert exact._native.tile_tokens == 0 < ops._native.tile_tokens
    w, least = weight("int4", 64, 256), ops._native.tile_tokens
    handles, x = [packed(o, "int4", w) for o in (ops, exact)], torch.randn(least, 256)
    for rows, same in ((1, True), (least - 1, True), (least, False)):
        found, expected = (o.linear(x[:rows], h) for o, h in zip((ops, exact), handles, strict=True))
        assert torch.equal(found, expected) is same
