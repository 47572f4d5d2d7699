"""4-bit rounding while loading: least squared error per group, the same in torch and in native code."""

from __future__ import annotations

import pytest
import torch

from farthing.ops import select
from farthing.ops.weights import Weight, loaded_as, quantize_int4, quantize_int8


def errors(w: torch.Tensor, value: torch.Tensor, group: int) -> torch.Tensor:
    return (w.double() - value.double()).view(len(w), -1, group).square().sum(-1)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("kind", ["normal", "outliers", "one sign", "tiny", "huge", "zeros"])
def test_no_group_has_more_error_than_with_its_full_range(group: int, kind: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(40, 4 * group)
    w = {
        "normal": w, "outliers": torch.where(torch.rand_like(w) < 0.02, 20 * w, w), "one sign": w.abs(),
        "tiny": w * 1e-30, "huge": w * 1e30, "zeros": w * 0,
    }[kind]  # fmt: skip
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


def test_native_code_rounds_the_same() -> None:
    """Unit vectors times the packed matrix yield every weight."""
    torch.manual_seed(2)
    w = torch.randn(48, 128)
    ops = select("cpu", quantization="int4")
    expected = quantize_int4(w, 64)
    stored = ops._pack("w", [Weight("dense", w)], mlp=True)  # type: ignore[attr-defined]
    given = ops._pack("q", [expected])  # type: ignore[attr-defined]
    size = stored.serialized_bytes
    first, second = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    stored.serialize(first.data_ptr(), 0)
    given.serialize(second.data_ptr(), 0)
    assert torch.equal(first, second)


def test_only_feed_forwards_get_4_bits() -> None:
    assert [loaded_as("int4", mlp) for mlp in (True, False)] == ["int4", "int8"]
    assert [loaded_as(q, False) for q in ("int8", None)] == ["int8", None]
    w = torch.randn(32, 64)
    ops = select("reference", quantization="int4")
    assert torch.equal(
        ops.pack_linear("o", lambda: [Weight("dense", w)]), quantize_int8(w).dequantize(ops.dtype)
    )
    gate = ops.pack_mlp("m", lambda: (Weight("dense", w),) * 3)[0]
    assert torch.equal(gate, quantize_int4(w).dequantize(ops.dtype))
