"""The native kernels of every available instruction set against the reference, with odd shapes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops.api import Batch, Norm, Place
from farthing.ops.cpu import CpuOps
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import AttentionSpec, RouterSpec
from farthing.ops.weights import Weight
from tests.isas import ISAS, threads_of
from tests.ops.parts import (
    BOUNDS,
    EPS,
    FORMATS,
    ROUTERS,
    SPECS,
    batch_of,
    distance,
    experts,
    norm,
    weight,
    zero_blocks,
)

pytestmark = [pytest.mark.pairs, pytest.mark.usefixtures("exact_on_amx")]


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(threads_of(request.param), isa=request.param)


@pytest.fixture
def ref() -> ReferenceOps:
    return ReferenceOps(torch.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 40])
@pytest.mark.parametrize(("n", "k"), [(48, 64), (100, 192), (33, 96), (576, 256)])
def test_linear(ops: CpuOps, ref: ReferenceOps, name: str, tokens: int, n: int, k: int) -> None:
    w, x, scale, residual = weight(name, n, k), torch.randn(tokens, k), norm(k), torch.randn(tokens, n)
    handle, expected = ops.pack_linear("w", lambda: [w]), ref.pack_linear("w", lambda: [w])
    y = ops.linear(x, handle, Norm(scale, EPS), residual.clone())
    assert distance(y, ref.linear(x, expected, Norm(scale, EPS), residual)) < BOUNDS[name]


@pytest.mark.parametrize("k", [7, 40, 72, 129])
@pytest.mark.parametrize("name", ["f32", "bf16", "int8"])
def test_any_number_of_columns(ops: CpuOps, ref: ReferenceOps, name: str, k: int) -> None:
    w, x = weight(name, 20, k), torch.randn(9, k)
    y = ops.linear(x, ops.pack_linear("w", lambda: [w]))
    assert distance(y, ref.linear(x, ref.pack_linear("w", lambda: [w]))) < BOUNDS[name]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_row_with_a_number_that_is_not_finite_has_no_finite_output(
    ops: CpuOps, name: str, bad: float
) -> None:
    x = torch.randn(4, 160)
    x[2, 37] = bad
    y = ops.linear(x, ops.pack_linear("w", lambda: [weight(name, 33, 160)]))
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("group", [16, 32, 48, 64, 128, 192])
def test_int4_groups(ops: CpuOps, ref: ReferenceOps, group: int) -> None:
    w, x = weight("int4", 40, 2 * group, group), torch.randn(5, 2 * group)
    y = ops.linear(x, ops.pack_linear("w", lambda: [w]))
    assert distance(y, ref.linear(x, ref.pack_linear("w", lambda: [w]))) < BOUNDS["int4"]


def test_stacked_matrices_and_strided_rows(ops: CpuOps, ref: ReferenceOps) -> None:
    stack = [weight("int8", 24, 64), weight("int8", 40, 64)]
    x = torch.randn(4, 200)[:, 60:124]
    y = ops.linear(x, ops.pack_linear("w", lambda: stack))
    assert distance(y, ref.linear(x, ref.pack_linear("w", lambda: stack))) < BOUNDS["int8"]


def test_rounding_while_packing_equals_the_reference(ops: CpuOps) -> None:
    w, x = Weight("dense", torch.randn(64, 128)), torch.randn(3, 128)
    for quantization in ("int8", "int4"):
        rounded = CpuOps(1, quantization, isa=ops._native.isa)
        expected = ReferenceOps(torch.float32, quantization)
        y = rounded.linear(x, rounded.pack_linear("w", lambda: [w]))
        assert distance(y, expected.linear(x, expected.pack_linear("w", lambda: [w]))) < BOUNDS["int4"]


@pytest.mark.usefixtures("sparse_on_amx")
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_block_sparse(ops: CpuOps, ref: ReferenceOps, name: str, tokens: int, share: float) -> None:
    w, x = zero_blocks(weight(name, 64, 256, 64), share), torch.randn(tokens, 256)
    handle = ops.pack_linear("w", lambda: [w])
    assert handle.packed.sparse
    assert handle.packed.nbytes < (1.25 - share) * (64 * 256 // (1 if name == "int8" else 2)) + 4 * 256
    y = ops.linear(x, handle)
    assert distance(y, ref.linear(x, ref.pack_linear("w", lambda: [w]))) < BOUNDS[name]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 19])
@pytest.mark.parametrize(("hidden", "width"), [(64, 96), (96, 160)])
def test_mlp(ops: CpuOps, ref: ReferenceOps, name: str, tokens: int, hidden: int, width: int) -> None:
    parts = weight(name, width, hidden), weight(name, width, hidden), weight(name, hidden, width)
    x, scale = torch.randn(tokens, hidden), norm(hidden)
    handle, expected = ops.pack_mlp("m", lambda: parts), ref.pack_mlp("m", lambda: parts)
    added = ops.mlp(x.clone(), handle, Norm(scale, EPS), residual=False)
    assert distance(added, ref.mlp(x, expected, Norm(scale, EPS), residual=False)) < 3 * BOUNDS[name]
    assert torch.equal(ops.mlp(x.clone(), handle, Norm(scale, EPS)), x + added)


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("name", ["f32", "bf16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 70])
def test_moe(ops: CpuOps, ref: ReferenceOps, router: str, name: str, tokens: int) -> None:
    spec = ROUTERS[router]
    w = experts(spec, name, 64, 96, 160 if router != "plain" else None)
    x, scale = torch.randn(tokens, 64), norm(64)
    handle, expected = ops.pack_moe("m", spec, lambda: w), ref.pack_moe("m", spec, lambda: w)
    counts, seen = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    y = ops.moe(x.clone(), handle, Norm(scale, EPS), counts)
    z = ref.moe(x, expected, Norm(scale, EPS), seen)
    assert torch.equal(counts, seen)
    assert distance(y - x, z - x) < 3 * BOUNDS[name]
    ids, gates = ops.route(x, handle)
    wanted, weights = ref.route(x, expected)
    by_id, order = ids.sort(-1), wanted.sort(-1)
    assert torch.equal(by_id.values, order.values)
    torch.testing.assert_close(gates.gather(1, by_id.indices), weights.gather(1, order.indices))


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_groups_are_chosen_by_biased_scores_of_any_sign(ops: CpuOps, ref: ReferenceOps, shift: float) -> None:
    spec = ROUTERS["v3"]
    w = experts(spec, "f32", 64, 32, None)
    assert w.bias is not None
    w = replace(w, bias=w.bias + shift)
    x = torch.randn(40, 64)
    ids, _ = ops.route(x, ops.pack_moe("m", spec, lambda: w))
    wanted, _ = ref.route(x, ref.pack_moe("m", spec, lambda: w))
    assert torch.equal(ids.sort(-1).values, wanted.sort(-1).values)


@pytest.mark.parametrize(("mass", "least"), [(0.0, 2), (0.3, 3), (0.5, 1)])
def test_fewest_experts_of_a_mass_are_those_of_the_reference(
    ops: CpuOps, ref: ReferenceOps, mass: float, least: int
) -> None:
    spec = RouterSpec(8, 5, mass=mass, min_experts=least)
    w, x = experts(spec, "f32", 64, 32, None), torch.randn(40, 64)
    ids, gates = ops.route(x, ops.pack_moe("m", spec, lambda: w))
    wanted, weights = ref.route(x, ref.pack_moe("m", spec, lambda: w))
    assert torch.equal(ids, wanted) and int((ids >= 0).sum(-1).min()) >= least
    torch.testing.assert_close(gates, weights)


@pytest.mark.parametrize(("name", "tokens"), [("bf16", 1), ("int4", 40)])
def test_identity_experts(ops: CpuOps, ref: ReferenceOps, name: str, tokens: int) -> None:
    """Identity experts have no weights, and return the normed input."""
    spec = RouterSpec(11, 4, scoring="softmax", normalize=False, scale=6.0, identities=3)
    w = experts(spec, name, 96, 96, None)
    w = replace(w, experts=[*w.experts[:8], None, None, None])
    x, scale = torch.randn(tokens, 96), norm(96)
    handle, expected = ops.pack_moe("m", spec, lambda: w), ref.pack_moe("m", spec, lambda: w)
    y, z = ops.moe(x.clone(), handle, Norm(scale, EPS)), ref.moe(x, expected, Norm(scale, EPS))
    assert distance(y - x, z - x) < 3 * BOUNDS[name]
    n = ref.rms_norm(x, Norm(scale, EPS))
    ids, gates = ref.route(n, expected)
    elsewhere = replace(spec, identities=0)
    for backend, packed in ((ops, handle), (ref, expected)):
        whole = backend.moe(x.clone(), packed, Norm(scale, EPS), residual=False)
        backend.reroute(packed, elsewhere)
        rest = backend.moe(x.clone(), packed, Norm(scale, EPS), residual=False)
        torch.testing.assert_close(whole - rest, n * (gates * (ids >= 8)).sum(-1, True), atol=1e-4, rtol=1e-4)
    packed_experts = {key.split(".")[2] for key in ops._blobs if ".experts." in key}
    assert packed_experts == set("01234567")


def test_unselected_expert(ops: CpuOps, ref: ReferenceOps) -> None:
    spec = RouterSpec(8, 2)
    w = experts(spec, "int4", 64, 64, None)
    w.gate[3] = 0
    w.bias[3] = -10  # type: ignore[index]
    x, counts = torch.randn(30, 64), torch.zeros(8, dtype=torch.int64)
    y = ops.moe(x.clone(), ops.pack_moe("m", spec, lambda: w), Norm(norm(64) * 0 + 1, EPS), counts)
    assert counts[3] == 0 and counts.sum() == 60
    z = ref.moe(x, ref.pack_moe("m", spec, lambda: w), Norm(torch.ones(64), EPS))
    assert distance(y - x, z - x) < 3 * BOUNDS["int4"]


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("here", [{1, 4, 5}, {7}])
def test_experts_of_another_rank_add_nothing(
    ops: CpuOps, ref: ReferenceOps, name: str, tokens: int, here: set[int]
) -> None:
    """The sum over ranks equals the full result."""
    spec = RouterSpec(8, 3)
    w = experts(spec, name, 64, 96, None)
    x, scale = torch.randn(tokens, 64), norm(64)
    whole = ref.moe(x, ref.pack_moe("m", spec, lambda: w), Norm(scale, EPS))
    total, counts = torch.zeros_like(x), torch.zeros(2, 8, dtype=torch.int64)
    for i, kept in enumerate((here, set(range(8)) - here)):
        part = replace(w, experts=[load if e in kept else None for e, load in enumerate(w.experts)])
        if i:
            part = replace(part, shared=None)
        handle = ops.pack_moe(f"m{i}", spec, lambda part=part: part)  # type: ignore[misc]
        total += ops.moe(x.clone(), handle, Norm(scale, EPS), counts[i]) - x
    assert distance(total, whole - x) < 3 * BOUNDS[name]
    assert torch.equal(*counts) and counts.sum() == 2 * 3 * tokens  # regardless of the expert's rank


def test_rank_without_experts_is_rejected(ops: CpuOps) -> None:
    w = replace(experts(RouterSpec(8, 3), "bf16", 64, 96, None), experts=[None] * 8)
    with pytest.raises(ValueError, match="no expert of 'm' is on this rank"):
        ops.pack_moe("m", RouterSpec(8, 3), lambda: w)


@pytest.mark.parametrize("name", ["bf16", "int4"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_moe_with_given_routing(ops: CpuOps, ref: ReferenceOps, name: str, tokens: int) -> None:
    spec = RouterSpec(8, 3)
    w = experts(spec, name, 64, 96, None)
    handle, expected = ops.pack_moe("m", spec, lambda: w), ref.pack_moe("m", spec, lambda: w)
    x, scale, gates = torch.randn(tokens, 64), norm(64), torch.rand(tokens, 3)
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)])
    ids[torch.rand(ids.shape) < 0.4] = -1
    y = ops.moe_chosen(x.clone(), handle, Norm(scale, EPS), ids, gates)
    assert distance(y - x, ref.moe_chosen(x, expected, Norm(scale, EPS), ids, gates) - x) < 3 * BOUNDS[name]
    assert torch.equal(ops.moe_chosen(x.clone(), handle, Norm(scale, EPS), ids * 0 - 1, gates), x)
    with pytest.raises(ValueError, match=r"expected \[\d+, 3\]"):
        ops.moe_chosen(x, handle, Norm(scale, EPS), ids[:, :2], gates)


@pytest.mark.parametrize("tokens", [1, 5])
def test_chosen_experts_that_do_not_exist(ops: CpuOps, tokens: int) -> None:
    """Native code reads nothing of them; tables of files that have such numbers are refused at load."""
    spec = RouterSpec(8, 3)
    handle = ops.pack_moe("m", spec, lambda: experts(spec, "bf16", 64, 96, None))
    x, scale, gates = torch.randn(tokens, 64), Norm(norm(64), EPS), torch.rand(tokens, 3)
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)])
    bad, none, clamped = ids.clone(), ids.clone(), ids.clone()
    for column, (number, nearest) in enumerate(((-1, 0), (8, 7), (1 << 40, 7))):
        bad[:, column], none[:, column], clamped[:, column] = number, -1, nearest
    y = ops.moe_chosen(x.clone(), handle, scale, bad, gates)
    assert torch.equal(y, ops.moe_chosen(x.clone(), handle, scale, none, gates)) and torch.equal(y, x)
    counts = torch.zeros(8, dtype=torch.int64)
    among = ops.moe(x.clone(), handle, scale, counts, False, bad)
    assert torch.equal(among, ops.moe(x.clone(), handle, scale, None, False, clamped))
    assert counts.tolist() == [tokens, 0, 0, 0, 0, 0, 0, 2 * tokens]


def test_reroute(ops: CpuOps, ref: ReferenceOps) -> None:
    w = experts(ROUTERS["v3"], "int8", 64, 64, None)
    handle, expected = (
        ops.pack_moe("m", ROUTERS["v3"], lambda: w),
        ref.pack_moe("m", ROUTERS["v3"], lambda: w),
    )
    narrow = RouterSpec(8, 1)
    ops.reroute(handle, narrow)
    ref.reroute(expected, narrow)
    x = torch.randn(5, 64)
    y, z = (
        ops.moe(x.clone(), handle, Norm(torch.ones(64), EPS)),
        ref.moe(x, expected, Norm(torch.ones(64), EPS)),
    )
    assert distance(y - x, z - x) < 3 * BOUNDS["int8"]


MLA_BOUNDS = {"float32": 1e-9, "bfloat16": 1e-4, "fp8": 4e-3, "int8": 1e-4}


def run_mla(
    ops: Any, spec: AttentionSpec, w: Weight, steps: list[Any], cache_dtype: str, block_size: int
) -> list[Tensor]:
    """The steps' outputs; each also attends to the cache that the previous ones filled."""
    rope = steps[0]["rope"]
    handle = ops.pack_attention("a", spec, lambda: (w, steps[0]["norm"]), rope)
    cache = ops.new_cache(2, 80, block_size, spec.latent_dim + spec.rope_dim, cache_dtype)
    outs = [ops.mla(step["q"], step["kv"], handle, Place(cache, 1, step["batch"])) for step in steps]
    assert not cache.data[0].float().any()  # layer 0 is not written
    return outs


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("cache_dtype", list(MLA_BOUNDS))
@pytest.mark.parametrize("block_size", [16, 64])
def test_mla(ops: CpuOps, ref: ReferenceOps, name: str, cache_dtype: str, block_size: int) -> None:
    spec, max_len = SPECS[name], 400
    w = Weight(
        "dense",
        (
            torch.randn(spec.num_heads * (spec.nope_dim + spec.value_dim), spec.latent_dim)
            / spec.latent_dim**0.5
        ).bfloat16(),
    )
    angles = torch.rand(max_len, spec.rope_dim // 2) * 6
    shared = {"rope": torch.stack((angles.cos(), angles.sin())), "norm": norm(spec.latent_dim)}
    table: Tensor | None = None
    steps = []
    for lengths in ([(0, 5), (0, 330), (0, 1)], [(5, 1), (330, 3), (1, 7)], [(6, 1), (333, 1), (8, 1)]):
        batch = batch_of(lengths, block_size, max_len)
        if table is None:
            table = batch.block_table
        slots = torch.tensor([
            int(table[b, p // block_size]) * block_size + p % block_size
            for b, (cached, new) in enumerate(lengths) for p in range(cached, cached + new)
        ])  # fmt: skip
        batch = Batch(batch.positions, slots, batch.query_start, batch.context_lens, table)
        tokens = len(slots)
        q = torch.randn(tokens, spec.num_heads * (spec.nope_dim + spec.rope_dim))
        kv = torch.randn(tokens, spec.latent_dim + spec.rope_dim)
        steps.append({"q": q, "kv": kv, "batch": batch, **shared})
    ours = run_mla(ops_again(ops), spec, w, steps, cache_dtype, block_size)
    theirs = run_mla(ref, spec, w, steps, cache_dtype, block_size)
    for y, z in zip(ours, theirs, strict=True):
        assert distance(y, z) < MLA_BOUNDS[cache_dtype]


@pytest.mark.parametrize("keys", [255, 257, 3839, 3841, 3900, 4096, 4097, 4352, 4353, 5400])
def test_mla_where_chunks_of_keys_meet(ops: CpuOps, ref: ReferenceOps, keys: int) -> None:
    """Contexts that end within, at and after the boundaries of `native/attention/chunks.h`."""
    spec = SPECS["small"]
    rows = spec.num_heads * (spec.nope_dim + spec.value_dim)
    w = Weight("dense", (torch.randn(rows, spec.latent_dim) / spec.latent_dim**0.5).bfloat16())
    angles = torch.rand(keys, spec.rope_dim // 2) * 6
    rope, scale = torch.stack((angles.cos(), angles.sin())), norm(spec.latent_dim)
    blocks = -(-keys // 16)
    filled = torch.randn(1, blocks, 16, spec.latent_dim + spec.rope_dim)
    for new in (1, 20):
        batch = batch_of([(keys - new, new)], 16, keys)
        q = torch.randn(new, spec.num_heads * (spec.nope_dim + spec.rope_dim))
        kv = torch.randn(new, spec.latent_dim + spec.rope_dim)
        found = []
        for backend in (ops_again(ops), ref):
            handle = backend.pack_attention("a", spec, lambda: (w, scale), rope)
            cache = backend.new_cache(1, blocks, 16, spec.latent_dim + spec.rope_dim, "float32")
            cache.data.copy_(filled)
            found.append(backend.mla(q, kv, handle, Place(cache, 0, batch)))
        assert distance(found[0], found[1]) < MLA_BOUNDS["float32"]


def ops_again(ops: CpuOps) -> CpuOps:
    """A backend with the same kernels and no packed weights."""
    return CpuOps(threads_of(ops._native.isa), isa=ops._native.isa)


@pytest.mark.parametrize("k", [7, 8, 64, 65])
def test_top_logits_of_a_vocabulary_smaller_than_k(ops: CpuOps, ref: ReferenceOps, k: int) -> None:
    w, x, scale = weight("bf16", 7, 64), torch.randn(3, 64), norm(64)
    handle, expected = ops.pack_linear("h", lambda: [w]), ref.pack_linear("h", lambda: [w])
    found, wanted = (o.top_logits(x, h, Norm(scale, EPS), k) for o, h in ((ops, handle), (ref, expected)))
    assert found[1].shape == (3, 7) and torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_top_logits(ops: CpuOps, ref: ReferenceOps, k: int, tokens: int) -> None:
    w, x, scale = weight("bf16", 1237, 64), torch.randn(tokens, 64), norm(64)
    handle, expected = ops.pack_linear("h", lambda: [w]), ref.pack_linear("h", lambda: [w])
    values, ids, total = ops.top_logits(x, handle, Norm(scale, EPS), k)
    wanted_values, wanted_ids, wanted_total = ref.top_logits(x, expected, Norm(scale, EPS), k)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(values, wanted_values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(total, wanted_total, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        ops.logits(x, handle, Norm(scale, EPS)),
        ref.logits(x, expected, Norm(scale, EPS)),
        atol=1e-4,
        rtol=1e-4,
    )


def test_equal_logits_are_ordered_by_id(ops: CpuOps) -> None:
    w = Weight("dense", torch.ones(1100, 32))
    head = ops.pack_linear("h", lambda: [w])
    for k in (1, 4):
        _, ids, _ = ops.top_logits(torch.ones(2, 32), head, Norm(torch.ones(32), EPS), k)
        assert ids.tolist() == [list(range(k))] * 2
    assert ops.greedy(torch.ones(2, 32), head, Norm(torch.ones(32), EPS)) == [0, 0]


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_greedy_and_embedding(ops: CpuOps, ref: ReferenceOps, tokens: int) -> None:
    w, x, scale = weight("bf16", 1237, 64), torch.randn(tokens, 64), norm(64)
    handle = ops.pack_linear("h", lambda: [w])
    assert (
        ops.greedy(x, handle, Norm(scale, EPS))
        == ops.top_logits(x, handle, Norm(scale, EPS), 1)[1][:, 0].tolist()
    )
    ids = torch.randint(0, 100, (tokens, 2))[:, 0]  # not contiguous
    for table in (torch.randn(100, 33).bfloat16(), torch.randn(100, 48)[:, :33], torch.randn(100, 33).half()):
        torch.testing.assert_close(ops.embed(ids, table), ref.embed(ids, table), atol=0, rtol=0)
    with pytest.raises(IndexError, match=r"token id 100 is not in the vocabulary of 100|out of bounds|range"):
        ops.embed(torch.full((tokens,), 100), torch.randn(100, 33))


@pytest.mark.parametrize("n", [1, 15, 16, 33, 1000])
def test_norm(ops: CpuOps, ref: ReferenceOps, n: int) -> None:
    x = torch.randn(7, n) * 8
    scale = norm(n)
    torch.testing.assert_close(
        ops.rms_norm(x, Norm(scale, EPS)), ref.rms_norm(x, Norm(scale, EPS)), atol=2e-5, rtol=1e-5
    )
    table = torch.randn(5, n).bfloat16()
    ids = torch.tensor([4, 0, 4])
    assert torch.equal(ops.embed(ids, table), ref.embed(ids, table))


def test_wrong_width_is_rejected(ops: CpuOps) -> None:
    w = ops.pack_linear("w", lambda: [weight("int8", 16, 64)])
    with pytest.raises(ValueError, match="x has 65 columns; expected 64"):
        ops.linear(torch.randn(1, 65), w)
    with pytest.raises(ValueError, match="'w' was packed twice"):
        ops.pack_linear("w", lambda: [weight("int8", 16, 64)])
