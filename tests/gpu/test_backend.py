"""`GpuOps` op by op against the reference: local and remote experts, shared ones, heads, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from farthing.ops.api import Norm
from farthing.ops.cut import Cut, cut_weight
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import MoEWeights, RouterSpec
from farthing.ops.weights import Weight
from farthing_gpu import GpuOps
from tests.gpu.parts import BOUNDS, DEVICE, EPS, norm
from tests.ops.parts import distance, ordered_experts, weight

V3 = RouterSpec(8, 3, num_groups=4, top_k_groups=2, scale=2.5)


@pytest.fixture
def ops() -> GpuOps:
    return GpuOps(torch.float32, DEVICE)


@pytest.fixture
def ref() -> ReferenceOps:
    return ReferenceOps(torch.float32)


def experts(spec: RouterSpec, name: str, shared: int | None, here: range | None = None) -> MoEWeights:
    """Experts of 64 x 32; those outside `here` are on another rank."""

    def mlp(inner: int) -> tuple[Weight, Weight, Weight]:
        return weight(name, inner, 64), weight(name, inner, 64), weight(name, 64, inner)

    parts = [mlp(32) for _ in range(spec.num_experts)]
    common = None if shared is None else mlp(shared)
    return MoEWeights(
        torch.randn(spec.num_experts, 64) / 8,
        torch.randn(spec.num_experts) * 0.1,
        [(lambda p=p: p) if here is None or e in here else None for e, p in enumerate(parts)],
        None if common is None else lambda: common,
    )


@pytest.mark.parametrize(
    ("name", "shared", "here"),
    [("fp8", 96, None), ("int4", None, range(2, 5)), ("bf16", 32, range(5)), ("int8", 64, None)],
)
def test_moe(ops: GpuOps, ref: ReferenceOps, name: str, shared: int | None, here: range | None) -> None:
    w = experts(V3, name, shared, here)
    tokens = 1 if name == "bf16" else 11
    x, scale = torch.randn(tokens, 64), norm(64)
    handle, expected = ops.pack_moe("m", V3, lambda: w), ref.pack_moe("m", V3, lambda: w)
    counts, seen = torch.zeros(8, dtype=torch.int64, device=DEVICE), torch.zeros(8, dtype=torch.int64)
    y = ops.moe(x.to(DEVICE), handle, Norm(scale, EPS), counts).cpu()
    z = ref.moe(x, expected, Norm(scale, EPS), seen)
    assert torch.equal(counts.cpu(), seen)
    assert distance(y - x, z - x) < 3 * BOUNDS[name] or not (z - x).any()
    ids, gates = ops.route(x.to(DEVICE), handle)
    wanted, weights = ref.route(x, expected)
    assert torch.equal(ids.cpu(), wanted)
    torch.testing.assert_close(gates.cpu(), weights)


def test_identity_experts(ops: GpuOps, ref: ReferenceOps) -> None:
    spec = RouterSpec(8, 4, scoring="softmax", normalize=False, scale=6.0, identities=3)
    w = experts(spec, "f32", None, range(5))
    handle, expected = ops.pack_moe("m", spec, lambda: w), ref.pack_moe("m", spec, lambda: w)
    x = torch.randn(5, 64)
    y, z = (
        ops.moe(x.to(DEVICE), handle, Norm(torch.ones(64), EPS)),
        ref.moe(x, expected, Norm(torch.ones(64), EPS)),
    )
    assert distance(y.cpu() - x, z - x) < 1e-9


def test_reroute(ops: GpuOps, ref: ReferenceOps) -> None:
    w = experts(V3, "f32", None)
    handle, expected = ops.pack_moe("m", V3, lambda: w), ref.pack_moe("m", V3, lambda: w)
    graphs = ops._graphs
    narrow = RouterSpec(8, 1)
    ops.reroute(handle, narrow)
    ref.reroute(expected, narrow)
    assert ops._graphs is not graphs  # graphs captured with the old rule are dropped
    x = torch.randn(5, 64)
    y, z = (
        ops.moe(x.to(DEVICE), handle, Norm(torch.ones(64), EPS)),
        ref.moe(x, expected, Norm(torch.ones(64), EPS)),
    )
    assert distance(y.cpu() - x, z - x) < 1e-9


@pytest.mark.parametrize("name", ["f32", "fp8", "int4"])
def test_mlp(ops: GpuOps, ref: ReferenceOps, name: str) -> None:
    parts = weight(name, 96, 64), weight(name, 96, 64), weight(name, 64, 96)
    x, scale = torch.randn(3, 64), norm(64)
    handle, expected = ops.pack_mlp("m", lambda: parts), ref.pack_mlp("m", lambda: parts)
    y = ops.mlp(x.to(DEVICE), handle, Norm(scale, EPS)).cpu()
    added = ops.mlp(x.to(DEVICE), handle, Norm(scale, EPS), residual=False).cpu()
    assert distance(added, ref.mlp(x, expected, Norm(scale, EPS), residual=False)) < 3 * BOUNDS[name]
    assert distance(y, x + added) < 1e-12


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounding_while_packing_equals_the_reference(quantization: str) -> None:
    w, x = Weight("dense", torch.randn(48, 96)), torch.randn(3, 96)
    ours, ref = GpuOps(torch.float32, DEVICE, quantization), ReferenceOps(torch.float32, quantization)
    y = ours.linear(x.to(DEVICE), ours.pack_linear("w", lambda: [w])).cpu()
    assert distance(y, ref.linear(x, ref.pack_linear("w", lambda: [w]))) < 1e-9


@pytest.mark.parametrize("k", [1, 5])
def test_top_logits(ops: GpuOps, ref: ReferenceOps, k: int) -> None:
    w, x, scale = weight("bf16", 137, 64), torch.randn(3, 64), norm(64)
    handle, expected = ops.pack_linear("h", lambda: [w]), ref.pack_linear("h", lambda: [w])
    ours = ops.top_logits(x.to(DEVICE), handle, Norm(scale, EPS), k)
    theirs = ref.top_logits(x, expected, Norm(scale, EPS), k)
    assert torch.equal(ours[1].cpu(), theirs[1])
    for y, z in zip(ours[::2], theirs[::2], strict=True):
        torch.testing.assert_close(y.cpu(), z, atol=1e-4, rtol=1e-4)
    same = ops.pack_linear("h", lambda: [Weight("dense", torch.ones(40, 32))])
    # Without eps the normed row is exactly 1, so the logits are equal in any order of summation.
    _, ids, _ = ops.top_logits(torch.ones(2, 32, device=DEVICE), same, Norm(torch.ones(32), 0.0), k)
    assert ids.tolist() == [list(range(k))] * 2  # equal logits in order of their ids


def test_unsupported_arguments_are_rejected(ops: GpuOps) -> None:
    w = ops.pack_linear("w", lambda: [weight("int8", 16, 64)])
    with pytest.raises(ValueError, match="x has 65 columns; expected 64"):
        ops.linear(torch.randn(1, 65, device=DEVICE), w)
    with pytest.raises(ValueError, match="no expert of 'm' is on this rank"):
        ops.pack_moe("m", V3, lambda: experts(V3, "f32", None, range(0)))


KINDS = ["int4", "int8", "bf16", "fp8", "mxfp4", "q4_1"]


@pytest.mark.parametrize("here", [None, range(1, 6)])
def test_experts_of_different_formats(ops: GpuOps, ref: ReferenceOps, here: range | None) -> None:
    """Each in its own, in a stack of those that share it; down projections differ too."""
    w = experts(V3, "int4", 32, here)
    kinds = [KINDS[e % 6] for e in range(8)]  # two formats have two experts

    def of(e: int) -> tuple[Weight, Weight, Weight]:
        return weight(kinds[e], 32, 64), weight(kinds[e], 32, 64), weight(kinds[(e + 2) % 6], 64, 32)

    parts = [of(e) for e in range(8)]
    loads = [(lambda p=p: p) if here is None or e in here else None for e, p in enumerate(parts)]
    w = replace(w, experts=loads)
    x, scale = torch.randn(11, 64), norm(64)
    handle, expected = ops.pack_moe("m", V3, lambda: w), ref.pack_moe("m", V3, lambda: w)
    held = [e for stack in handle.routed for e in range(8) if stack.local is not None and stack.local[e] >= 0]
    assert sorted(held) == list(here or range(8)) and len(handle.routed) == (6 if here is None else 5)
    y, z = ops.moe(x.to(DEVICE), handle, Norm(scale, EPS)).cpu(), ref.moe(x, expected, Norm(scale, EPS))
    assert distance(y - x, z - x) < 3 * BOUNDS["fp8"]


@pytest.mark.parametrize(
    ("gate", "up"), [("int4", "int8_groups"), ("int4_zero", "int4"), ("q4_1", "int4"), ("bf16", "int4")]
)
def test_gate_and_up_of_different_formats(ops: GpuOps, ref: ReferenceOps, gate: str, up: str) -> None:
    mlp = weight(gate, 32, 64), weight(up, 32, 64, 16), weight("int4", 64, 32)
    x, scale = torch.randn(5, 64), norm(64)
    y = ops.mlp(x.to(DEVICE), ops.pack_mlp("m", lambda: mlp), Norm(scale, EPS), residual=False).cpu()
    z = ref.mlp(x, ref.pack_mlp("m", lambda: mlp), Norm(scale, EPS), residual=False)
    assert distance(y, z) < (1e-4 if gate in ("q4_1", "bf16") else 1e-9)


@pytest.mark.parametrize("name", ["int4", "int4_zero", "int8_groups"])
def test_orders(ops: GpuOps, ref: ReferenceOps, name: str) -> None:
    """Of projections, of parts of their columns, and of experts; matrices of one order are merged."""
    w, x = replace(weight(name, 48, 256), order=torch.randperm(256)), torch.randn(5, 256)
    part = cut_weight(w, Cut(1, 96, 256))
    for each, y in ((w, x), (part, x[:, 96:].contiguous())):
        handle = ops.pack_linear("w", lambda w=each: [w, w])  # type: ignore[misc]
        assert len(handle) == 1
        product = ops.linear(y.to(DEVICE), handle).cpu()
        assert distance(product, (y @ each.dequantize().t()).repeat(1, 2)) < 1e-10
    with pytest.raises(ValueError, match="x has 256 columns; expected 160"):
        ops.linear(x.to(DEVICE), ops.pack_linear("w", lambda: [part]))
    spec, size = RouterSpec(8, 3), 64
    moe = ordered_experts(spec, name, size, 32)
    x, scale = torch.randn(7, size), Norm(norm(size), EPS)
    y, z = (o.moe(x.to(DEVICE), o.pack_moe("m", spec, lambda: moe), scale).cpu() for o in (ops, ref))
    assert distance(y - x, z - x) < 1e-9
