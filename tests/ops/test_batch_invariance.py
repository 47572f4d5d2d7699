"""A token's result is bitwise independent of the batch and of prompt chunking, without expanded attention
(test_expanded.py) also in long prompts. On AMX only `--deterministic` promises it (test_amx.py)."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops.api import LatentCache, Norm, Place
from farthing.ops.cpu import CpuOps
from farthing.ops.cut import columns_of, halves_of
from farthing.ops.specs import RouterSpec
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight
from tests.isas import ISAS, threads_of
from tests.ops.parts import EPS, FORMATS, SPECS, experts, norm, weight

pytestmark = [pytest.mark.pairs, pytest.mark.usefixtures("exact_on_amx")]

BLOCK = 16
LENGTH = 600  # several chunks of keys


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(threads_of(request.param), isa=request.param)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(100, 192), (576, 256)])
def test_projection(ops: CpuOps, name: str, n: int, k: int) -> None:
    handle, x, scale = (
        ops.pack_linear("w", lambda: [weight(name, n, k)]),
        torch.randn(70, k),
        Norm(norm(k), EPS),
    )
    together, residual = ops.linear(x, handle, scale), torch.randn(70, n)
    for rows in (*range(1, 18), 24, 33, 64):
        assert torch.equal(ops.linear(x[:rows], handle, scale), together[:rows])
        assert torch.equal(ops.linear(x[70 - rows :], handle, scale), together[70 - rows :])
    assert torch.equal(ops.linear(x, handle, scale, residual), residual + together)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shared", [None, 96])
def test_mixture_of_experts(ops: CpuOps, name: str, shared: int | None) -> None:
    spec = RouterSpec(8, 3, num_groups=4, top_k_groups=2)
    handle = ops.pack_moe("m", spec, lambda: experts(spec, name, 64, 96, shared))
    x, scale = torch.randn(90, 64), norm(64)
    together = ops.moe(x.clone(), handle, Norm(scale, EPS))
    for rows in (1, 2, 7, 16, 17, 40, 65):
        assert torch.equal(ops.moe(x[:rows].clone(), handle, Norm(scale, EPS)), together[:rows])
        assert torch.equal(ops.moe(x[90 - rows :].clone(), handle, Norm(scale, EPS)), together[90 - rows :])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shared", [None, 96])
def test_experts_of_two_ranks(ops: CpuOps, name: str, shared: int | None) -> None:
    """Two ranks with half of the experts each give bit-identical sums to one rank with all of them."""
    spec = RouterSpec(8, 3, num_groups=4, top_k_groups=2)
    whole = experts(spec, name, 64, 96, shared)
    x, scale = torch.randn(40, 64), norm(64)
    handles = [
        ops.pack_moe(f"rank{r}", spec, lambda part=part: part)  # type: ignore[misc]
        for r, part in enumerate(
            replace(
                whole,
                experts=[load if e // 4 == r else None for e, load in enumerate(whole.experts)],
                shared=whole.shared if r == 0 else None,
            )
            for r in range(2)
        )
    ]
    one = ops.pack_moe("m", spec, lambda: whole)
    for rows in (1, 2, 16, 17, 40):
        a, b = (ops.moe(x[:rows].clone(), h, Norm(scale, EPS), residual=False) for h in handles)
        assert torch.equal(ops.moe(x[:rows].clone(), one, Norm(scale, EPS)), x[:rows] + (a + b))


@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_two_ranks(ops: CpuOps, name: str) -> None:
    """Two tensor-parallel ranks give bit-identical sums to one rank that computes both halves."""
    isa = ops._native.isa
    one = CpuOps(threads_of(isa), isa=isa, parts=2)
    spec, x, scale = RouterSpec(8, 3, num_groups=4, top_k_groups=2), torch.randn(40, 64), norm(64)
    whole = experts(spec, name, 64, 256, 512)
    halves = [
        replace(
            whole,
            experts=[lambda load=load, r=r: halves_of(load())[r] for load in whole.experts if load],
            shared=lambda r=r: halves_of(whole.shared())[r] if whole.shared else None,  # type: ignore[misc]
        )
        for r in range(2)
    ]
    moe = one.pack_moe("m", spec, lambda: whole)
    mlp = one.pack_mlp("d", whole.experts[0])  # type: ignore[arg-type]
    ranks = [ops.pack_moe(f"rank{r}", spec, lambda r=r: halves[r]) for r in range(2)]  # type: ignore[misc]
    dense = [ops.pack_mlp(f"dense{r}", halves[r].experts[0]) for r in range(2)]  # type: ignore[arg-type]
    output = weight(name, 100, 512)
    o = one.pack_linear("o", lambda: [output], 4)
    columns = columns_of(output, 256)
    parts = [ops.pack_linear(f"o{r}", lambda r=r: [columns[r]]) for r in range(2)]  # type: ignore[misc]
    heads, h = torch.randn(40, 512), torch.randn(40, 100)
    for rows in (1, 2, 16, 17, 40):
        n = x[:rows]
        a, b = (ops.moe(n, handle, Norm(scale, EPS), residual=False) for handle in ranks)
        assert torch.equal(one.moe(n.clone(), moe, Norm(scale, EPS)), n + (a + b))
        a, b = (ops.mlp(n, handle, Norm(scale, EPS), residual=False) for handle in dense)
        assert torch.equal(one.mlp(n.clone(), mlp, Norm(scale, EPS)), n + (a + b))
        a, b = (ops.linear(heads[:rows, 256 * r :][:, :256], parts[r]) for r in range(2))
        assert torch.equal(one.linear(heads[:rows], o, residual=h[:rows].clone()), h[:rows] + (a + b))


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_output_head(ops: CpuOps, name: str) -> None:
    head, x, scale = ops.pack_linear("h", lambda: [weight(name, 1237, 64)]), torch.randn(20, 64), norm(64)
    logits = ops.logits(x, head, Norm(scale, EPS))
    for k in (1, 5):
        together = ops.top_logits(x, head, Norm(scale, EPS), k)
        assert torch.equal(together[0], logits.gather(1, together[1]))
        for rows in (1, 3, 16):
            for one, all_ in zip(ops.top_logits(x[:rows], head, Norm(scale, EPS), k), together, strict=True):
                assert torch.equal(one, all_[:rows])


class Attention:
    """One layer with random weights, and a prompt's inputs."""

    def __init__(self, ops: CpuOps, name: str, cache_dtype: str, rounded: bool) -> None:
        self.spec = s = SPECS[name]
        self.ops, self.cache_dtype = ops, cache_dtype
        rows = s.num_heads * (s.nope_dim + s.value_dim)
        w: Weight = weight("int8" if rounded else "bf16", rows, s.latent_dim)
        angles = torch.rand(LENGTH, s.rope_dim // 2) * 6
        rope, scale = torch.stack((angles.cos(), angles.sin())), norm(s.latent_dim)
        self.handle = ops.pack_attention("a", s, lambda: (w, scale), rope)
        self.q = torch.randn(LENGTH, s.num_heads * (s.nope_dim + s.rope_dim)) * 2
        self.kv = torch.randn(LENGTH, s.latent_dim + s.rope_dim)

    def new_cache(self) -> LatentCache:
        width = self.spec.latent_dim + self.spec.rope_dim
        return self.ops.new_cache(1, 100, BLOCK, width, self.cache_dtype)  # type: ignore[arg-type]

    def step(self, cache: LatentCache, chunks: list[tuple[int, int, list[int]]]) -> Tensor:
        """Tokens [start, stop) of the prompt for every (start, stop, blocks), in one call."""
        batch = make_batch(
            [stop - start for start, stop, _ in chunks], [start for start, _, _ in chunks],
            [blocks for _, _, blocks in chunks], BLOCK,
        )  # fmt: skip
        q = torch.cat([self.q[start:stop] for start, stop, _ in chunks])
        kv = torch.cat([self.kv[start:stop] for start, stop, _ in chunks])
        return self.ops.mla(q, kv, self.handle, Place(cache, 0, batch))


def cuts(rng: random.Random, sizes: tuple[int, ...], start: int = 0) -> list[tuple[int, int]]:
    out = []
    while start < LENGTH:
        stop = min(LENGTH, start + rng.choice(sizes))
        out.append((start, stop))
        start = stop
    return out


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize(
    ("cache_dtype", "rounded"),
    [("float32", False), ("bfloat16", False), ("bfloat16", True), ("fp8", True), ("int8", True)],
)
def test_attention_of_a_prompt_in_any_chunks(ops: CpuOps, name: str, cache_dtype: str, rounded: bool) -> None:
    rng = random.Random(1)
    layer = Attention(ops, name, cache_dtype, rounded)
    blocks = list(range(-(-LENGTH // BLOCK)))
    whole = layer.step(layer.new_cache(), [(0, LENGTH, blocks)])
    for sizes in ((1, 2, 3, 9, 64), (100, 13), (512,)):
        cache = layer.new_cache()
        scattered = rng.sample(range(100), len(blocks))
        parts = [layer.step(cache, [(start, stop, scattered)]) for start, stop in cuts(rng, sizes)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_attention_in_a_batch_with_other_sequences(ops: CpuOps, cache_dtype: str) -> None:
    layer = Attention(ops, "small", cache_dtype, True)
    first, second = list(range(38)), list(range(40, 78))
    whole = layer.step(layer.new_cache(), [(0, LENGTH, first)])
    cache = layer.new_cache()
    layer.step(cache, [(0, 580, first)])
    for at in range(580, 590):  # one token of this sequence, a piece of the other
        piece = ((at - 580) * 50, (at - 579) * 50, second)
        out = layer.step(cache, [(at, at + 1, first), piece])
        assert torch.equal(out[0], whole[at])
        assert torch.equal(out[1:], whole[piece[0] : piece[1]])


def test_threads_and_long_sequences() -> None:
    """Chunks of every length, on one thread and on three."""
    from farthing.ops.specs import AttentionSpec

    spec, length = AttentionSpec(2, 8, 8, 8, 32, 0.3), 6000
    torch.manual_seed(0)
    w, q, kv = weight("bf16", 32, 32), torch.randn(length, 32), torch.randn(length, 40)
    angles = torch.rand(length, 4)
    rope, blocks = torch.stack((angles.cos(), angles.sin())), list(range(-(-length // BLOCK)))
    results = []
    for threads, isa in ((1, "auto"), (3, "auto")):
        ops = CpuOps(threads, isa=isa, invariant=True)
        handle = ops.pack_attention("a", spec, lambda: (w, torch.ones(32)), rope)
        cache = ops.new_cache(1, len(blocks), BLOCK, 40, "bfloat16")
        whole = ops.mla(q, kv, handle, Place(cache, 0, make_batch([length], [0], [blocks], BLOCK)))
        for at in (63, 64, 255, 256, 257, 4095, 4096, 5120, 5999):
            alone = make_batch([1], [at], [blocks], BLOCK)
            assert torch.equal(
                ops.mla(q[at : at + 1], kv[at : at + 1], handle, Place(cache, 0, alone))[0], whole[at]
            )
        results.append(whole)
    assert torch.equal(*results)
