"""4-bit rounding while loading: least squared error per group, the same in torch and in native code."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing import _native
from farthing.config import Quantization
from farthing.ops.api import Norm
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.formats import Plan, choose, pack
from farthing.ops.reference import ReferenceOps
from farthing.ops.select import select
from farthing.ops.weights import (
    CODES,
    INTEGERS,
    Weight,
    loaded_as,
    nearest_of,
    pack_int4,
    quantize_int4,
    quantize_int8,
    rounded,
    to_codes,
)
from tests.isas import ISAS
from tests.ops.parts import BOUNDS, distance

pytestmark = pytest.mark.pairs


def errors(w: torch.Tensor, value: torch.Tensor, group: int) -> torch.Tensor:
    return (w.double() - value.double()).view(len(w), -1, group).square().sum(-1)


def value(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (q.view(*scale.shape, -1) * scale.unsqueeze(-1)).flatten(1)


def random_rows(n: int, k: int, kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    w = torch.randn(n, k)
    return {
        "normal": w, "outliers": torch.where(torch.rand_like(w) < 0.02, 20 * w, w), "one sign": w.abs(),
        "tiny": w * 1e-30, "huge": w * 1e30, "zeros": w * 0, "pruned": w * (torch.rand_like(w) < 0.7),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(("stored", "packed"), [("float32", "F32"), ("bfloat16", "BF16"), ("fp8", "FP8")])
def test_matrices_without_whole_groups_keep_their_format(stored: str, packed: str) -> None:
    assert choose(stored, 40, 128, "int4").format.name == packed
    assert choose(stored, 96, 128, "int4").format.name == "NL4"


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("kind", ["normal", "outliers", "one sign", "tiny", "huge", "zeros"])
def test_no_group_has_more_error_than_with_its_full_range(group: int, kind: str) -> None:
    w = random_rows(40, 4 * group, kind)
    found = quantize_int4(w, group).dequantize()
    scale = (w.view(40, -1, group).abs().amax(-1, keepdim=True) / 7.5).clamp_min(torch.finfo().tiny)
    plain = ((w.view(40, -1, group) / scale).round().clamp(-8, 7) * scale).view_as(w)
    assert bool(found.isfinite().all())
    assert bool((errors(w, found, group) <= errors(w, plain, group) * (1 + 1e-5) + 1e-70).all())
    if kind in ("normal", "outliers", "one sign"):
        assert float(errors(w, found, group).sum()) < 0.9 * float(errors(w, plain, group).sum())


def test_range_is_nearly_optimal() -> None:
    torch.manual_seed(1)
    w = torch.randn(16, 64)
    found = errors(w, quantize_int4(w, 64).dequantize(), 64)
    best = torch.full_like(found, torch.inf)
    for share in torch.linspace(0.3, 1.2, 400):
        for sign in (1, -1):
            scale = sign * share * w.abs().amax(-1, keepdim=True) / 7.5
            value = (w / scale).round().clamp(-8, 7) * scale
            best = torch.minimum(best, errors(w, value, 64))
    assert float((found / best).mean()) < 1.05


def test_only_feed_forwards_get_4_bits() -> None:
    assert [loaded_as("int4", mlp) for mlp in (True, False)] == ["int4", "int8"]
    assert [loaded_as(q, False) for q in ("int8", None)] == ["int8", None]
    w = torch.randn(32, 64)
    ops = select("reference", quantization="int4")
    assert torch.equal(
        ops.pack_linear("o", lambda: [Weight("dense", w)]), quantize_int8(w).dequantize(ops.dtype)
    )
    gate = ops.pack_mlp("m", lambda: (Weight("dense", w),) * 3).parts[0]
    assert torch.equal(gate, rounded(Weight("dense", w), "int4", mlp=True).dequantize(ops.dtype))


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("kind", ["normal", "outliers", "one sign", "tiny", "huge", "zeros", "pruned"])
def test_codes_are_never_worse_than_their_full_range(group: int, kind: str) -> None:
    w = random_rows(40, 4 * group, kind)
    q, scale = to_codes(w, group)
    assert set(q.unique().tolist()) <= set(CODES)
    found = value(q, scale)
    full = (w.view(40, -1, group).abs().amax(-1) / CODES[-1]).clamp_min(torch.finfo().tiny)
    codes = torch.tensor(CODES, dtype=torch.float32)
    plain = codes[((w.view(40, -1, group) / full.unsqueeze(-1)).unsqueeze(-1) - codes).abs().argmin(-1)]
    bound = errors(w, (plain * full.unsqueeze(-1)).view_as(w), group)
    assert bool(found.isfinite().all())
    assert bool((errors(w, found, group) <= bound * (1 + 1e-5) + 1e-70).all())
    assert bool((found[w == 0] == 0).all())  # pruned weights stay zero


@pytest.mark.parametrize("stored", [name for name, stored in INTEGERS.items() if stored.codes])
def test_the_nearest_code(stored: str) -> None:
    """Of two at the same distance the lower one, and the last ones beyond the ends."""
    codes = sorted(set(INTEGERS[stored].codes))
    between = (torch.tensor(codes[1:]) + torch.tensor(codes[:-1])) / 2
    edges = torch.cat([between, torch.tensor(codes).float(), torch.linspace(-1e6, 1e6, 99)])
    inf = torch.tensor(float("inf"))
    x = torch.cat([edges, edges.nextafter(inf), edges.nextafter(-inf), 300 * torch.randn(2000)])
    expected = torch.tensor(codes)[torch.bucketize(x, between)].float()
    assert torch.equal(nearest_of(codes)(x), expected)


def test_codes_beat_even_spacing() -> None:
    w = random_rows(200, 640, "normal")
    even = errors(w, quantize_int4(w).dequantize(), 64).sum()
    assert float(errors(w, value(*to_codes(w)), 64).sum() / even) < 0.85


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 19, 40])
@pytest.mark.parametrize(("hidden", "width"), [(64, 96), (96, 160), (256, 64)])
def test_products_with_codes(isa: str, tokens: int, hidden: int, width: int) -> None:
    torch.manual_seed(3)
    shapes = (width, hidden), (width, hidden), (hidden, width)
    parts = [Weight("dense", torch.randn(n, k) / k**0.5) for n, k in shapes]
    parts[0].data[:16, :64] = 0  # a zero block in the record of a panel
    x, scale = torch.randn(tokens, hidden), torch.rand(hidden) + 0.5
    x[0, :2] = torch.tensor([1e4, -1e4])
    ops, ref = CpuOps(1, "int4", isa=isa), ReferenceOps(torch.float32, "int4")
    handle, expected = (o.pack_mlp("m", lambda: tuple(parts)) for o in (ops, ref))  # type: ignore[attr-defined]
    packed = ops._pack("w", parts[:1], mlp=True)
    assert packed.format == _native.Format.NL4
    found = ops.mlp(x.clone(), handle, Norm(scale, 1e-6), residual=False)
    assert distance(found, ref.mlp(x, expected, Norm(scale, 1e-6), residual=False)) < 3 * BOUNDS["int4"]


@pytest.mark.parametrize("isa", ISAS)
def test_stored_codes_are_kept(isa: str) -> None:
    q, scale = to_codes(random_rows(48, 256, "normal"))
    scale = scale.bfloat16().float()
    q[:16, :128] = 0  # blocks of zeros, which may be left out
    stored = Weight("nl4", pack_int4(torch.searchsorted(torch.tensor(CODES, dtype=torch.int8), q) - 8), scale)
    assert torch.equal(stored.quantized(), q)
    ops = CpuOps(1, isa=isa)
    packed = ops._pack("w", [stored], mlp=True)
    assert packed.format == _native.Format.NL4
    whole = pack(ops._native, [stored], Plan(packed.format, 64), blocks=False)
    rows, found = torch.arange(48), torch.empty(48, 256)
    whole.read_rows(rows.data_ptr(), 48, found.data_ptr())
    assert torch.equal(found, stored.dequantize())
    x = torch.randn(7, 256)
    product = ops.linear(x, ops.pack_linear("v", lambda: [stored]))
    assert distance(product, x @ stored.dequantize().t()) < BOUNDS["int4"]


@pytest.mark.usefixtures("sparse_on_amx")
@pytest.mark.parametrize("isa", ISAS)
def test_blocks_of_zeros_are_left_out_of_codes(isa: str) -> None:
    w = random_rows(64, 256, "normal")
    w *= (torch.rand(4, 16) > 0.6).repeat_interleave(16, 0).repeat_interleave(16, 1)
    parts = Weight("dense", w), Weight("dense", w), Weight("dense", w.t().contiguous())
    ops, ref = CpuOps(1, "int4", isa=isa), ReferenceOps(torch.float32, "int4")
    handle, expected = ops.pack_mlp("m", lambda: parts), ref.pack_mlp("m", lambda: parts)
    assert ops._pack("w", parts[:1], mlp=True).sparse
    x, ones = torch.randn(5, 256), torch.ones(256)
    found = ops.mlp(x.clone(), handle, Norm(ones, 1e-6), residual=False)
    assert distance(found, ref.mlp(x, expected, Norm(ones, 1e-6), residual=False)) < 3 * BOUNDS["int4"]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_values_that_are_not_finite_are_not_rounded(
    dtype: torch.dtype, value: float, quantization: str
) -> None:
    data = random_rows(16, 128, "normal").to(dtype)
    data[3, 5] = value if dtype.itemsize > 1 else float("nan")  # E4M3 has no infinity
    broken = Weight("dense", data) if dtype.itemsize > 1 else Weight("fp8", data, torch.ones(1, 1))
    with pytest.raises(ValueError, match="w: got NaN or infinity; expected finite values"):
        CpuOps(1, quantization)._pack("w", [broken], mlp=True)


def test_finite_values_with_an_infinite_sum_are_rounded() -> None:
    w = Weight("dense", torch.full((16, 128), 1e38))
    assert CpuOps(1, "int4")._pack("w", [w], mlp=True).format == _native.Format.NL4


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_a_tied_embedding_is_read_from_the_head_of_8_bits(stored: Quantization) -> None:
    ops, table = select("cpu", quantization=stored), torch.randn(70, 64).bfloat16()
    head = ops.pack_head("lm_head", lambda: Weight("dense", table))
    assert ops.pack_table("model.embed_tokens", lambda: Weight("dense", table), head) is head
    assert torch.equal(ops.embed(torch.arange(70), head), quantize_int8(table.float()).dequantize())
    exact = select("cpu")
    head = exact.pack_head("lm_head", lambda: Weight("dense", table))
    assert exact.pack_table("model.embed_tokens", lambda: Weight("dense", table), head) is not head
