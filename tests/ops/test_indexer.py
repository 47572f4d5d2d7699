"""The lightning indexer: selection, ties, and every backend against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing import _native
from farthing.ops.api import Batch, CacheDtype, IndexCache, LatentCache, Ops, Place
from farthing.ops.cpu import CpuOps
from farthing.ops.indexer import read_keys, top_positions
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import IndexerSpec
from farthing.ops.torch_util import make_batch
from tests.isas import ISAS, threads_of

BLOCK = 4


def backend(name: str) -> Ops:
    return ReferenceOps(torch.float32) if name == "reference" else CpuOps(threads_of(name), isa=name)


def by_sorting(scores: list[float], k: int) -> list[int]:
    """The k largest by a stable sort, in ascending order of position."""
    seen = [i for i, s in enumerate(scores) if s > float("-inf")]
    return sorted(sorted(seen, key=lambda i: -scores[i])[:k])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, float("-inf"), 3e38, 1e-40]), min_size=1, max_size=70
    ),
    st.integers(1, 80),
)
def test_top_positions_against_a_stable_sort(scores: list[float], k: int) -> None:
    row = top_positions(torch.tensor([scores]), k)[0].tolist()
    expected = by_sorting(scores, k)
    assert row[: len(expected)] == expected
    assert set(row[len(expected) :]) <= {-1}
    data, out = torch.tensor(scores), torch.empty(k, dtype=torch.int32)
    _native.top_positions(data.data_ptr(), len(scores), k, out.data_ptr())
    assert out.tolist() == expected + [-1] * (k - len(expected))


def test_native_top_positions_of_many_close_scores() -> None:
    g = torch.Generator().manual_seed(0)
    for n, k in ((5000, 2048), (2049, 2048), (4096, 1), (3000, 2999)):
        for scores in (1 + 1e-6 * torch.randn(n, generator=g), torch.randn(n, generator=g).round(decimals=2)):
            out = torch.empty(k, dtype=torch.int32)
            _native.top_positions(scores.data_ptr(), n, k, out.data_ptr())
            assert torch.equal(out, top_positions(scores[None], k)[0])


class Step:
    """Index keys of two sequences in scattered blocks, and the step that scores them."""

    def __init__(
        self, ops: Ops, dtype: CacheDtype, spec: IndexerSpec, new: list[int], cached: list[int], seed: int = 0
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        total = [n + c for n, c in zip(new, cached, strict=True)]
        blocks = [-(-t // BLOCK) for t in total]
        order = torch.randperm(sum(blocks), generator=g).tolist()
        tables = [order[: blocks[0]], order[blocks[0] :]]
        angles = torch.rand(max(total), spec.rope_dim // 2, generator=g)
        rope = torch.stack((angles.cos(), angles.sin()))
        norm = (
            1 + 0.1 * torch.randn(spec.head_dim, generator=g),
            0.1 * torch.randn(spec.head_dim, generator=g),
        )
        self.handle = ops.pack_indexer("i", spec, lambda: norm, rope)
        self.cache = ops.new_cache(1, sum(blocks), BLOCK, 8, dtype)
        self.cache.index = IndexCache.new(ops, self.cache, 2, spec.head_dim)
        for count, before in ((cached, [0, 0]), (new, cached)):
            if not all(count):
                continue
            self.batch: Batch = make_batch(count, before, tables, BLOCK)
            widths = spec.num_heads * spec.head_dim, spec.head_dim, spec.num_heads
            q, k, w = (torch.randn(sum(count), n, generator=g) for n in widths)
            self.chosen = ops.index(q, k, w, self.handle, Place(self.cache, 1, self.batch))


SPECS = [
    IndexerSpec(num_heads=24, head_dim=16, rope_dim=8, top_k=5),
    IndexerSpec(num_heads=64, head_dim=128, rope_dim=64, top_k=32),
    IndexerSpec(num_heads=3, head_dim=10, rope_dim=4, top_k=7, interleaved=True),
]


def keys_of(step: Step) -> list[torch.Tensor]:
    assert step.cache.index is not None
    lengths = step.batch.context_lens.tolist()
    return [read_keys(step.cache.index, 1, step.batch.block_table[b], n) for b, n in enumerate(lengths)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.num_heads}x{s.head_dim}")
@pytest.mark.parametrize("name", ISAS)
def test_cpu_against_the_reference(name: str, spec: IndexerSpec, dtype: CacheDtype) -> None:
    args = (dtype, spec, [3, 70], [90, 11])
    ours, reference = Step(backend(name), *args), Step(backend("reference"), *args)
    for mine, theirs in zip(keys_of(ours), keys_of(reference), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5 if dtype == "float32" else 0.1)
    assert ours.chosen is not None and reference.chosen is not None
    assert ours.chosen.shape == reference.chosen.shape
    same = total = 0
    for a, b in zip(ours.chosen.tolist(), reference.chosen.tolist(), strict=True):
        mine, theirs = [p for p in a if p >= 0], {p for p in b if p >= 0}
        assert mine == sorted(mine) and len(mine) == len(theirs)
        same, total = same + len(theirs & set(mine)), total + len(theirs)
    # Rounded queries and keys move scores near the k-th across it.
    assert same / total > (0.999 if dtype == "float32" else 0.97)


@pytest.mark.parametrize("name", ["reference", *ISAS])
def test_nothing_is_scored_if_the_context_fits(name: str) -> None:
    step = Step(backend(name), "float32", SPECS[1], [3, 20], [20, 11])
    assert step.chosen is None
    assert keys_of(step)[1].abs().sum() > 0


@pytest.mark.parametrize("name", ["reference", *ISAS])
def test_ties_select_the_earlier_position(name: str) -> None:
    """All weights 0: every score is 0, or -0 for negative weights."""
    ops, spec = backend(name), SPECS[0]
    step = Step(ops, "float32", spec, [1, 1], [40, 30])
    q, k = torch.randn(2, spec.num_heads * spec.head_dim), torch.randn(2, spec.head_dim)
    for w in (torch.zeros(2, spec.num_heads), -torch.zeros(2, spec.num_heads)):
        chosen = ops.index(q, k, w, step.handle, Place(step.cache, 1, step.batch))
        assert chosen is not None
        assert chosen.tolist() == [list(range(spec.top_k))] * 2


def test_cache_lists_all_tensors_of_a_block() -> None:
    cache: LatentCache = Step(backend("reference"), "int8", SPECS[0], [1, 1], [40, 30]).cache
    assert [t.shape[1] for t in cache.tensors()] == [cache.num_blocks] * 4
