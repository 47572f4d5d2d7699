"""Expanded attention of large prompt chunks, compared with the reference and with absorbed attention."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops.api import Batch, LatentCache, Place
from farthing.ops.cpu import CpuOps, create
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import AttentionSpec
from farthing.ops.torch_util import write_cache
from farthing.ops.weights import Weight
from tests.isas import ISAS
from tests.ops.parts import SPECS, batch_of, distance, norm, weight
from tests.ops.test_cpu import MLA_BOUNDS

pytestmark = pytest.mark.pairs

FROM = 1024  # kExpandFrom in native/attention/expanded.h
LEAST = 40  # tokens of a chunk that is expanded in these tests
LONGEST = 1400


class Layer:
    """Random weights and a cache in which every slot holds a key."""

    def __init__(self, spec: AttentionSpec, w: Weight, cache_dtype: str, blocks: int, block_size: int = 16):
        self.spec, self.w, self.cache_dtype = spec, w, cache_dtype
        angles = torch.rand(LONGEST, spec.rope_dim // 2) * 6
        self.rope, self.norm = torch.stack((angles.cos(), angles.sin())), norm(spec.latent_dim)
        self.shape = blocks, block_size
        slots = blocks * block_size
        self.filled = torch.randn(slots, spec.latent_dim), torch.randn(slots, spec.rope_dim)

    def run(self, ops: CpuOps | ReferenceOps, q: Tensor, kv: Tensor, *steps: Batch) -> Tensor:
        """Outputs of consecutive steps on a new cache."""
        s = self.spec
        handle = ops.pack_attention("a", s, lambda: (self.w, self.norm), self.rope)
        cache: LatentCache = ops.new_cache(1, *self.shape, s.latent_dim + s.rope_dim, self.cache_dtype)  # type: ignore[arg-type]
        write_cache(cache, 0, torch.arange(len(self.filled[0])), *self.filled)
        out, at = [], 0
        for batch in steps:
            part = slice(at, at := at + len(batch.positions))
            out.append(ops.mla(q[part], kv[part], handle, Place(cache, 0, batch)))
        return torch.cat(out)

    def inputs(self, tokens: int, gain: float = 2.0) -> tuple[Tensor, Tensor]:
        s = self.spec
        q = torch.randn(tokens, s.num_heads * (s.nope_dim + s.rope_dim)) * gain
        return q, torch.randn(tokens, s.latent_dim + s.rope_dim)


def native(isa: str, least: int = LEAST, threads: int = 2) -> CpuOps:
    ops = CpuOps(threads, isa=isa)
    ops._native.expand_tokens = least
    return ops


def random_weight(spec: AttentionSpec, name: str) -> Weight:
    return weight(name, spec.num_heads * (spec.nope_dim + spec.value_dim), spec.latent_dim)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


MIXED = [(1010, 133), (1300, 1), (0, 30), (1100, 49), (1200, LEAST - 1), (1023, LEAST), (1399, 1)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "cache_dtype", "weights"),
    [
        ("v3", "float32", "f32"), ("v3", "bfloat16", "int8"),
        ("small", "bfloat16", "bf16"), ("small", "fp8", "bf16"),
        ("halves", "bfloat16", "int8"), ("halves", "int8", "bf16"), ("halves", "float32", "bf16"),
        ("many_heads", "bfloat16", "bf16"), ("many_heads", "float32", "int8"),
    ],
)  # fmt: skip
def test_like_the_reference(isa: str, name: str, cache_dtype: str, weights: str) -> None:
    """Sequences that take expanded attention in part, entirely, and not at all, in scattered blocks."""
    spec = SPECS[name]
    batch = batch_of(MIXED, 16, LONGEST)
    layer = Layer(spec, random_weight(spec, weights), cache_dtype, int(batch.block_table.numel()))
    q, kv = layer.inputs(len(batch.positions))
    got = layer.run(native(isa), q, kv, batch)
    expected = layer.run(ReferenceOps(torch.float32), q, kv, batch)
    absorbed = layer.run(native(isa, 0), q, kv, batch)
    bound = max(MLA_BOUNDS[cache_dtype], 1e-4 if weights == "int8" else 0)
    wide = slice(14, 133)
    assert distance(got, expected) < bound
    assert distance(got[wide], expected[wide]) < bound
    assert not torch.equal(got[wide], absorbed[wide])
    assert torch.equal(got[:14], absorbed[:14])  # before FROM
    assert torch.equal(got[133:164], absorbed[133:164])  # a decoding sequence and a short prompt


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gain", [0.0, -2.0, 60.0])
def test_extreme_scores(isa: str, cache_dtype: str, gain: float) -> None:
    spec = SPECS["v3"]
    batch = batch_of([(1060, 100)], 16, LONGEST)
    layer = Layer(spec, random_weight(spec, "bf16"), cache_dtype, int(batch.block_table.numel()))
    q, kv = layer.inputs(100, gain)
    got = layer.run(native(isa), q, kv, batch)
    assert torch.isfinite(got).all()
    # Scores of several hundreds round to bfloat16 by units: the largest weight may go to another key.
    bound = 0.02 if gain == 60.0 and cache_dtype == "bfloat16" else MLA_BOUNDS[cache_dtype]
    assert distance(got, layer.run(ReferenceOps(torch.float32), q, kv, batch)) < bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int8"])
def test_large_chunks_of_any_size(isa: str, cache_dtype: str) -> None:
    """Bits depend neither on the sizes of the chunks that are expanded nor on threads or other sequences."""
    spec, rng = SPECS["small"], random.Random(1)
    blocks = rng.sample(range(100), LONGEST // 16 + 1)
    layer = Layer(spec, random_weight(spec, "bf16"), cache_dtype, 200)
    q, kv = layer.inputs(LONGEST - FROM)

    def chunk(first: int, last: int) -> Batch:
        batch = batch_of([(first, last - first)], 16, LONGEST)
        table = torch.tensor([blocks], dtype=torch.int32)
        slots = torch.tensor([blocks[p // 16] * 16 + p % 16 for p in range(first, last)])
        return Batch(batch.positions, slots, batch.query_start, batch.context_lens, table)

    whole = layer.run(native(isa), q, kv, chunk(FROM, LONGEST))
    for threads in (1, 5):  # more threads than heads
        assert torch.equal(layer.run(native(isa, threads=threads), q, kv, chunk(FROM, LONGEST)), whole)
    cuts = [FROM, 1064, 1164, 1217, 1313, LONGEST]
    steps = [chunk(a, b) for a, b in pairwise(cuts)]
    assert torch.equal(layer.run(native(isa), q, kv, *steps), whole)


def test_deterministic_backends_do_not_expand() -> None:
    assert create(None, 1, None, None)._native.expand_tokens > 0
    assert create(None, 1, None, None, parts=2)._native.expand_tokens == 0
