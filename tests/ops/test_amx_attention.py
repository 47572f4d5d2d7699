"""Attention on AMX tiles: any number of rows, keys and tokens per block of the cache, against float64.

`make test-isa` emulates tiles on processors without them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing import _native
from farthing.ops.api import Place
from farthing.ops.cpu import CpuOps
from farthing.ops.specs import AttentionSpec, GroupedSpec
from farthing.ops.torch_util import make_batch
from tests.ops.parts import distance, norm, weight
from tests.ops.test_cpu import MLA_BOUNDS
from tests.ops.test_gqa import Case, Step, error

pytestmark = pytest.mark.skipif(
    not {"amx", "avx512_bf16"} <= set(_native.instruction_sets().split()),
    reason="needs AMX and AVX-512 BF16; make test-isa emulates the former",
)

# Query heads that share keys: fewer than a tile has rows, as many, one more, and so on up to two units.
HEADS = [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 128]
LENGTHS = [1, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 160, 255, 257, 400]
CACHES = ["bfloat16", "fp8", "int8"]


def tiles(threads: int = 1) -> CpuOps:
    return CpuOps(threads, isa="amx", invariant=True)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_grouped_attention_of_any_shape(data: st.DataObject) -> None:
    heads, groups = data.draw(st.sampled_from(HEADS)), data.draw(st.integers(1, 2))
    width = data.draw(st.sampled_from([16, 20, 32, 64, 96]))
    window = data.draw(st.sampled_from([None, None, 1, 16, 33, 130]))
    spec = GroupedSpec(heads * groups, groups, width, width, width**-0.5, window=window)
    lengths = data.draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3))
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in lengths]
    longest = max(map(len, cuts))
    padded = [c + [c[-1]] * (longest - len(c)) for c in cuts]
    steps: list[Step] = [
        [(a, b - a) for a, b in spans] for spans in zip(*(pairwise(c) for c in padded), strict=True)
    ]
    cache_dtype = data.draw(st.sampled_from(CACHES))
    case = Case.random(spec, lengths, sinks=data.draw(st.booleans()))
    block = data.draw(st.sampled_from([1, 8, 16, 24, 32, 128]))
    found = case.run(tiles(), steps, cache_dtype, block)
    assert error(found, case.exact()) < MLA_BOUNDS[cache_dtype]


class Latents:
    """One layer of latent attention with random weights."""

    def __init__(self, heads: int, length: int, latent: int = 64, rope: int = 32) -> None:
        torch.manual_seed(heads)
        self.spec, self.length = AttentionSpec(heads, 16, rope, 16, latent, 0.3), length
        self.w, self.norm = weight("f32", heads * 32, latent), norm(latent)
        angles = torch.rand(length, rope // 2) * 6
        self.rope = torch.stack((angles.cos(), angles.sin()))
        self.q, self.kv = torch.randn(length, heads * (16 + rope)), torch.randn(length, latent + rope)

    def run(self, ops: CpuOps, at: int, block: int = 16, empty: float = 0.0) -> Tensor:
        """The tokens from `at` on, in one step; unused memory of the cache has the value `empty`."""
        handle = ops.pack_attention("a", self.spec, lambda: (self.w, self.norm), self.rope)
        blocks = -(-self.length // block)
        cache = ops.new_cache(1, blocks + 1, block, self.spec.latent_dim + self.spec.rope_dim, "bfloat16")
        cache.data.fill_(empty)
        table = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
        out = torch.empty(0)
        for first, last in ((0, at), (at, self.length)):
            if first == last:
                continue
            place = Place(cache, 0, make_batch([last - first], [first], [table], block))
            out = ops.mla(self.q[first:last].clone(), self.kv[first:last].clone(), handle, place)
        return out


@pytest.mark.parametrize("heads", [1, 8, 16, 17, 40, 64, 100])
def test_queries_and_weights_are_rounded_once_as_on_avx512_bf16(heads: int) -> None:
    layer = Latents(heads, 60)  # in one block of keys on both
    found, expected = (layer.run(CpuOps(1, isa=isa, invariant=True), 57) for isa in ("amx", "avx512_bf16"))
    assert distance(found, expected) < 1e-8  # rounding alone is 1e-6


@pytest.mark.parametrize("length", [1, 13, 16, 18, 130, 300])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_memory_after_the_last_key_is_not_read(length: int, block: int) -> None:
    layer = Latents(20, length)
    found, expected = (layer.run(tiles(), length - 1, block, empty) for empty in (float("nan"), 0.0))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("heads", [16, 40, 128])
@pytest.mark.parametrize("new", [1, 3, 30])
def test_bits_do_not_depend_on_the_rows_of_a_unit(heads: int, new: int) -> None:
    """Many threads divide rows further than one does."""
    layer = Latents(heads, 300)
    first, *others = (layer.run(tiles(threads), 300 - new) for threads in (1, 3, 9))
    assert all(torch.equal(first, other) for other in others)
    whole = layer.run(tiles(), 0)
    assert torch.equal(first, whole[300 - new :])
