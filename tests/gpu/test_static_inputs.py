"""Calibrated input ranges in Triton: the same integers as the reference and the CPU kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from farthing.ops.api import Norm
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import MoEWeights, RouterSpec
from farthing.ops.weights import InputRounding, Weight, quantize_int8
from farthing_gpu import GpuOps
from tests.gpu.parts import BOUNDS, DEVICE, EPS, norm
from tests.ops.parts import distance

SPEC = RouterSpec(4, 2)


def ranged(n: int, k: int, scale: float) -> Weight:
    return replace(quantize_int8(torch.randn(n, k) / k**0.5), inputs=InputRounding(8, scale=scale))


def mlp(inner: int, scale: float) -> tuple[Weight, Weight, Weight]:
    return ranged(inner, 64, 0.01), ranged(inner, 64, 0.01), ranged(64, inner, scale)


def experts() -> MoEWeights:
    """One range for gate and up, and one for each down projection; some clip."""
    parts = [mlp(32, 0.001 * 4**e) for e in range(SPEC.num_experts)]
    shared = mlp(48, 0.004)
    return MoEWeights(torch.randn(4, 64) / 8, None, [lambda p=p: p for p in parts], lambda: shared)


@pytest.fixture
def both() -> tuple[GpuOps, ReferenceOps]:
    torch.manual_seed(0)
    return GpuOps(torch.float32, DEVICE), ReferenceOps(torch.float32)


@pytest.mark.parametrize("scale", [0.003, 0.03, 3.0])
def test_linear(both: tuple[GpuOps, ReferenceOps], scale: float) -> None:
    """Stacked matrices take the wider range; one without a range leaves the input as it is."""
    ops, ref = both
    stack = [ranged(48, 80, scale), ranged(32, 80, scale / 2)]
    x, weight = torch.randn(5, 80), norm(80)
    y = ops.linear(x.to(DEVICE), ops.pack_linear("w", lambda: stack), Norm(weight, EPS)).cpu()
    assert distance(y, ref.linear(x, ref.pack_linear("w", lambda: stack), Norm(weight, EPS))) < BOUNDS["int8"]
    mixed = [stack[0], quantize_int8(torch.randn(16, 80))]
    y = ops.linear(x.to(DEVICE), ops.pack_linear("m", lambda: mixed)).cpu()
    expected = x @ torch.cat([w.dequantize() for w in mixed]).t()
    assert distance(y, expected) < BOUNDS["int8"]


def test_experts(both: tuple[GpuOps, ReferenceOps]) -> None:
    ops, ref = both
    w, x, weight = experts(), torch.randn(7, 64), norm(64)
    y = ops.moe(x.to(DEVICE), ops.pack_moe("m", SPEC, lambda: w), Norm(weight, EPS)).cpu()
    z = ref.moe(x, ref.pack_moe("m", SPEC, lambda: w), Norm(weight, EPS))
    # A value next to a tie may round to the other integer.
    assert distance(y - x, z - x) < 1e-6
    plain = MoEWeights(w.gate, None, [_plain(e) for e in w.experts], None)
    assert distance(ref.moe(x, ref.pack_moe("p", SPEC, lambda: plain), Norm(weight, EPS)) - x, z - x) > 1e-4


def _plain(load):  # type: ignore[no-untyped-def]
    return lambda: tuple(replace(m, inputs=None) for m in load())
