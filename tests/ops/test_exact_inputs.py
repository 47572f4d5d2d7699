"""Inputs of integer matrices as two integers (`--compute exact`), against float64 on all instruction sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops.api import Norm
from farthing.ops.cpu import CpuOps, formats
from farthing.ops.cpu.weights import Linear
from farthing.ops.reference import ReferenceOps
from farthing.ops.select import select
from farthing.ops.specs import RouterSpec
from farthing.ops.weights import InputRounding, Weight
from tests.isas import ALL, ISAS, threads_of
from tests.ops.parts import EPS, GROUPS, ROUTERS, SCALED, SPECS, UNITS, batch_of, experts, norm, weight
from tests.ops.test_cpu import run_mla

pytestmark = pytest.mark.pairs

INTEGERS = ["int8", "int4", "int4_zero", *GROUPS, *UNITS, *(n for n in SCALED if not n.startswith("fp8"))]
BOUND = 1e-4  # of the exact mode, relative to the output's length
ROUGH = 2e-3  # what rounding to 8 bits exceeds


def backend(isa: str, exact: bool = True, **options: Any) -> CpuOps:
    return CpuOps(threads_of(isa), isa=isa, exact=exact, **options)


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return backend(request.param)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def values(ops: CpuOps, handle: Linear) -> Tensor:
    """The numbers that kernels multiply by, in float64."""
    return ops.embed(torch.arange(handle.n), handle).double()


def packed(ops: CpuOps, w: Weight, sparse: bool = False) -> Linear:
    native = formats.pack(ops._native, [w], formats.plan([w], None), blocks=sparse)
    return Linear(native, *w.shape)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 64])
@pytest.mark.parametrize(("n", "k"), [(100, 256), (33, 512)])
def test_products_are_those_of_float64(ops: CpuOps, name: str, tokens: int, n: int, k: int) -> None:
    w = weight(name, n, k)
    x = torch.randn(tokens, k) * torch.tensor([1.0, 0.1, 1.0, 4.0]).repeat(k // 4)
    rough = backend(ops._native.isa, exact=False)
    found, by_8_bits = (o.linear(x, packed(o, w)) for o in (ops, rough))
    expected = x.double() @ values(ops, packed(ops, w)).t()
    assert relative(found, expected) < BOUND
    assert relative(by_8_bits, expected) > ROUGH


@pytest.mark.parametrize("k", [16, 40, 100, 200])
def test_columns_that_fill_no_group(ops: CpuOps, k: int) -> None:
    handle, x = packed(ops, weight("int8", 40, k)), torch.randn(3, k)
    assert relative(ops.linear(x, handle), x.double() @ values(ops, handle).t()) < BOUND


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
def test_products_without_blocks_of_zeros(ops: CpuOps, name: str, tokens: int) -> None:
    """tokens: below and from `kManyFrom`, where AVX-512 takes another loop."""
    w = weight(name, 96, 512)
    keep = (torch.rand(6, 32) > 0.5).repeat_interleave(16, 0).repeat_interleave(16, 1)
    data = (
        w.data * keep if name == "int8" else torch.where(keep[:, ::2], w.data, torch.full_like(w.data, 0x88))
    )
    w, x = replace(w, data=data), torch.randn(tokens, 512)
    sparse, dense = packed(ops, w, sparse=True), packed(ops, w)
    assert sparse.packed.sparse and not dense.packed.sparse
    assert relative(ops.linear(x, sparse), x.double() @ values(ops, dense).t()) < BOUND


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_row_does_not_depend_on_others_nor_on_the_instruction_set(name: str, sparse: bool) -> None:
    if sparse and name not in ("int8", "int4"):
        return
    torch.manual_seed(0)
    w, x = weight(name, 100, 256), torch.randn(70, 256)
    outputs = []
    for isa in ALL:
        ops = backend(isa)
        handle = packed(ops, w, sparse)
        outputs.append(together := ops.linear(x, handle))
        for rows in (*range(1, 18), 24, 33, 64):
            assert torch.equal(ops.linear(x[:rows], handle), together[:rows])
            assert torch.equal(ops.linear(x[70 - rows :], handle), together[70 - rows :])
    # The portable kernels have no fused products and sums.
    fused = [y for isa, y in zip(ALL, outputs, strict=True) if isa != "portable"]
    assert all(torch.equal(fused[0], other) for other in fused[1:])


@given(
    scale=st.floats(-30, 30), outlier=st.floats(1, 1e4), columns=st.sampled_from([64, 128, 192]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@example(scale=-29.0, outlier=1.0, columns=64, seed=0)  # what is left over is in units of 1e-33
def test_error_is_bounded_by_the_largest_input_of_a_group(
    scale: float, outlier: float, columns: int, seed: int
) -> None:
    ops = _first()
    generator = torch.Generator().manual_seed(seed)
    w = Weight("int8", torch.randint(-127, 128, (32, columns), generator=generator, dtype=torch.int8),
               torch.rand(32, 1, generator=generator) + 0.1)  # fmt: skip
    x = torch.randn(3, columns, generator=generator) * 10.0**scale
    x[:, int(torch.randint(columns, (1,), generator=generator))] *= outlier
    handle = packed(ops, w)
    matrix = values(ops, handle)
    error = (ops.linear(x, handle).double() - x.double() @ matrix.t()).abs()
    largest = torch.cat([g.abs().amax(1, keepdim=True).expand_as(g) for g in x.double().split(128, 1)], 1)
    # Half a unit of what is kept, and float32 sums of products that are larger than their sum.
    bound = (largest / (127 * 254) * 0.51 + x.double().abs() * 2e-6) @ matrix.abs().t()
    assert (error <= bound).all()


_kept: list[CpuOps] = []


def _first() -> CpuOps:
    if not _kept:
        _kept.append(backend(ISAS[0]))
    return _kept[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_with_a_number_that_is_not_finite_has_no_finite_output(ops: CpuOps, bad: float) -> None:
    x = torch.randn(3, 128)
    x[1, 7] = bad
    y = ops.linear(x, packed(ops, weight("int4", 48, 128)))
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "inputs", [InputRounding(8, scale=0.03), InputRounding(4), InputRounding(8, clip=0.8)]
)
def test_rounding_that_a_checkpoint_specifies_stays(ops: CpuOps, inputs: InputRounding) -> None:
    w, x = replace(weight("int8", 48, 128), inputs=inputs), torch.randn(5, 128)
    found, expected = (
        o.linear(x, o.pack_linear("w", lambda: [w])) for o in (ops, backend(ops._native.isa, exact=False))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["int8", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("shared", [None, 96])
def test_mixture_of_experts(ops: CpuOps, name: str, tokens: int, shared: int | None) -> None:
    spec, x, scale = ROUTERS["v3"], torch.randn(tokens, 64), norm(64)
    weights = experts(spec, name, 64, 96, shared)
    found, expected = (
        o.moe(x.clone(), o.pack_moe("m", spec, lambda: weights), Norm(scale, EPS), residual=False)
        for o in (ops, ReferenceOps(torch.float32))
    )
    assert relative(found, expected) < BOUND
    handle = ops.pack_moe("again", spec, lambda: weights)
    few = (
        ops.moe(x[:rows].clone(), handle, Norm(scale, EPS), residual=False) for rows in (1, tokens // 2 + 1)
    )
    assert all(torch.equal(rows, found[: len(rows)]) for rows in few)


def test_experts_of_several_formats(ops: CpuOps) -> None:
    """Rows in the form that each expert reads."""
    spec, x, scale = RouterSpec(4, 2), torch.randn(9, 64), norm(64)
    kinds = [experts(spec, name, 64, 96, None) for name in ("int8", "mxfp4")]
    mixed = replace(kinds[0], experts=[kinds[e % 2].experts[e] for e in range(4)])
    found, expected = (
        o.moe(x.clone(), o.pack_moe("m", spec, lambda: mixed), Norm(scale, EPS), residual=False)
        for o in (ops, ReferenceOps(torch.float32))
    )
    assert relative(found, expected) < BOUND


def test_latent_attention(ops: CpuOps) -> None:
    """W_UK and W_UV of a quantized model are in 8 bits; with a float32 cache nothing else is rounded."""
    spec = SPECS["small"]
    heads = torch.randint(
        -127, 128, (spec.num_heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
    ).float()
    heads[:, 0], heads[:, spec.nope_dim :, 0] = 127, 127  # so that rows of both have the scale 1 / 1024
    w = Weight("dense", heads.flatten(0, 1) / 1024)
    angles = torch.rand(64, spec.rope_dim // 2) * 6
    step = {
        "q": torch.randn(20, spec.num_heads * (spec.nope_dim + spec.rope_dim)),
        "kv": torch.randn(20, spec.latent_dim + spec.rope_dim),
        "rope": torch.stack((angles.cos(), angles.sin())),
        "norm": norm(spec.latent_dim),
        "batch": batch_of([(0, 20)], 16, 64),
    }
    kinds = [backend(ops._native.isa, exact, quantization="int8") for exact in (True, False)]
    (found,), (by_8_bits,), (expected,) = (
        run_mla(o, spec, w, [step], "float32", 16) for o in (*kinds, ReferenceOps(torch.float32))
    )
    assert relative(found, expected) < BOUND
    assert relative(by_8_bits, expected) > ROUGH


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_head_in_planes(ops: CpuOps, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that high nibbles find first is the likeliest one of exact logits."""
    monkeypatch.setattr(formats, "PLANES_FROM", 0)
    w, x, scale = weight("int8", 3001, 320), torch.randn(tokens, 320), norm(320)
    head, plain = ops.pack_head("planes", lambda: w), packed(ops, w)
    assert head.packed.format != plain.packed.format
    logits = ops.logits(x, plain, Norm(scale, EPS))
    assert torch.equal(ops.logits(x, head, Norm(scale, EPS)), logits)
    for active in (ops._native.active, 1):  # threads that rest have found nothing
        ops._native.set_active(active)
        assert ops.greedy(x, head, Norm(scale, EPS)) == logits.argmax(-1).tolist()


def test_packed_file_serves_both(tmp_path: Path) -> None:
    """How inputs are rounded is the server's choice, not the file's."""
    torch.manual_seed(0)
    w, x, file = weight("int4", 64, 128), torch.randn(4, 128), str(tmp_path / "w.packed")
    written = [CpuOps(1), CpuOps(1, exact=True)]
    outputs = [o.linear(x, o.pack_linear("w", lambda: [w])) for o in written]
    written[0].save_packed(file)
    for exact, expected in zip((False, True), outputs, strict=True):
        ops = CpuOps(1, packed=file, exact=exact)
        assert torch.equal(ops.linear(x, ops.pack_linear("w", lambda: [w])), expected)


@pytest.mark.parametrize(
    ("dtype", "compute", "exact"),
    [
        (None, "auto", False),
        ("bfloat16", "auto", False),
        ("float32", "auto", True),
        ("float32", "int8", False),
        ("bfloat16", "exact", True),
    ],
)
def test_float32_is_exact_unless_said_otherwise(dtype: Any, compute: Any, exact: bool) -> None:
    ops: Any = select("cpu", dtype, 1, compute=compute)
    assert (ops._native.input_terms == 2) == exact
    assert ("exact" in ops.name) == exact


def test_other_backends_have_no_choice() -> None:
    with pytest.raises(
        ValueError, match=r"^compute: got 'exact' with backend 'reference'; expected backend 'cpu'$"
    ):
        select("reference", compute="exact")


def test_an_input_is_one_integer_or_two() -> None:
    with pytest.raises(ValueError, match="one integer or two"):
        CpuOps(1)._native.input_terms = 3
