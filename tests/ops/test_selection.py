"""Attention to selected positions: equal on every backend, and dense if all positions are selected."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farthing.ops.api import Batch, CacheDtype, LatentCache, Ops, Place
from farthing.ops.cpu import CpuOps
from farthing.ops.reference import ReferenceOps
from farthing.ops.selection import chosen, pieces, visible
from farthing.ops.specs import AttentionSpec
from farthing.ops.torch_backend import TorchOps
from farthing.ops.torch_util import make_batch, read_cache, rotate
from farthing.ops.weights import Weight
from tests.isas import ISAS

SPEC = AttentionSpec(num_heads=3, nope_dim=16, rope_dim=8, value_dim=12, latent_dim=32, scale=0.2)
BLOCK = 4


def backend(name: str) -> Ops:
    if name == "torch":
        return TorchOps(torch.device("cpu"), torch.float32)
    return ReferenceOps(torch.float32) if name == "reference" else CpuOps(2, isa=name)


def step(
    ops: Ops, dtype: CacheDtype, seed: int = 0
) -> tuple[object, LatentCache, Batch, torch.Tensor, torch.Tensor]:
    """Two sequences with 9 and 5 cached tokens, of which a step adds 6 and 1."""
    g = torch.Generator().manual_seed(seed)
    s = SPEC
    kv_b = torch.randn(s.num_heads * (s.nope_dim + s.value_dim), s.latent_dim, generator=g) * 0.2
    angles = torch.rand(32, s.rope_dim // 2, generator=g)
    rope = torch.stack((angles.cos(), angles.sin()))
    handle = ops.pack_attention("a", s, lambda: (Weight("dense", kv_b), torch.ones(s.latent_dim)), rope)
    cache = ops.new_cache(2, 9, BLOCK, s.latent_dim + s.rope_dim, dtype)
    tables = [[7, 2, 5, 0], [3, 1]]
    width = s.num_heads * (s.nope_dim + s.rope_dim), s.latent_dim + s.rope_dim
    for new, cached in (([9, 5], [0, 0]), ([6, 1], [9, 5])):
        batch = make_batch(new, cached, tables, BLOCK)
        q, kv = (torch.randn(sum(new), w, generator=g) for w in width)
        if cached == [0, 0]:
            ops.mla(q, kv, handle, Place(cache, 1, batch))
    return handle, cache, batch, q, kv


def positions(batch: Batch, k: int | None, seed: int = 1) -> torch.Tensor:
    """k random positions per token (or fewer if it has fewer), or all."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for p in batch.positions.tolist():
        pick = torch.randperm(p + 1, generator=g)[: k or p + 1].sort().values
        rows.append(torch.cat((pick, torch.full((20 - len(pick),), -1))))
    return torch.stack(rows).to(torch.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("name", ["reference", "torch", *ISAS])
def test_all_positions_equal_dense_attention(name: str, dtype: CacheDtype) -> None:
    ops = backend(name)
    handle, cache, batch, q, kv = step(ops, dtype)
    dense = ops.mla(q, kv, handle, Place(cache, 1, batch))
    sparse = ops.mla(q, kv, handle, Place(cache, 1, batch), positions(batch, None))
    assert torch.allclose(sparse, dense, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("name", ["torch", *ISAS])
def test_selected_positions_match_the_reference(name: str, dtype: CacheDtype, k: int) -> None:
    outs = []
    for each in (backend("reference"), backend(name)):
        handle, cache, batch, q, kv = step(each, dtype)
        outs.append(each.mla(q, kv, handle, Place(cache, 1, batch), positions(batch, k)))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert torch.allclose(*outs, atol=tolerance)


def test_reference_is_softmax_over_the_selected_keys() -> None:
    ops = ReferenceOps(torch.float32)
    handle, cache, batch, q, kv = step(ops, "float32")
    select = positions(batch, 4)
    out = ops.mla(q, kv, handle, Place(cache, 1, batch), select)
    s, t = SPEC, 2
    keys = read_cache(cache, 1, batch.block_table[0], 15, s.latent_dim)[select[t][select[t] >= 0].long()]
    cos, sin = handle.rope[:, batch.positions[t].long()]
    for h in range(s.num_heads):
        nope, pe = q.view(-1, s.num_heads, s.nope_dim + s.rope_dim)[t, h].split((s.nope_dim, s.rope_dim))
        query = torch.cat((nope @ handle.w_uk[h], rotate(pe, cos, sin, True)))
        expected = (keys @ query * s.scale).softmax(0) @ keys[:, : s.latent_dim] @ handle.w_uv[h].t()
        assert torch.allclose(out[t].view(s.num_heads, -1)[h], expected, atol=1e-5)


def test_slots_follow_each_sequences_blocks() -> None:
    batch = make_batch([2, 1], [3, 5], [[7, 2], [3, 1]], BLOCK)
    found = chosen(torch.tensor([[0, 3], [4, -1], [1, 5]], dtype=torch.int32), batch, BLOCK)
    assert found.counts.tolist() == [2, 1, 2]
    assert found.slots[0].tolist() == [28, 31]
    assert found.slots[1, 0].item() == 8
    assert found.slots[2].tolist() == [13, 5]
    assert found.starts.tolist() == [0, 1, 2, 3]


@given(
    start=st.integers(0, 50),
    tokens=st.integers(1, 300),
    position=st.integers(0, 300),
    window=st.none() | st.integers(1, 200),
)
def test_runs_have_every_token_once_and_no_other_keys_than_theirs(
    start: int, tokens: int, position: int, window: int | None
) -> None:
    cached, covered = torch.arange(position + tokens), list[int]()
    for run, keys in pieces(start, start + tokens, position, window):
        own = torch.arange(run.start, run.stop)
        covered += own.tolist()
        seen = visible(cached, (own - start + position).unsqueeze(1), window).any(0)
        assert cached[seen].tolist() == list(keys)
    assert covered == list(range(start, start + tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("name", ["reference", "torch", *ISAS])
def test_a_token_without_keys_attends_to_nothing(name: str, dtype: CacheDtype) -> None:
    """As where all scores of its keys are NaN. It had what an earlier step left in memory."""
    ops = backend(name)
    handle, cache, batch, q, kv = step(ops, dtype)
    select = positions(batch, 3)
    expected = ops.mla(q, kv, handle, Place(cache, 1, batch), select)
    for lost in ([1], [0, len(q) - 1], [*range(len(q))]):
        none = select.clone()
        none[lost] = -1
        out = ops.mla(q, kv, handle, Place(cache, 1, batch), none)
        assert not out[lost].any()
        kept = [t for t in range(len(q)) if t not in lost]
        assert torch.equal(out[kept], expected[kept])
