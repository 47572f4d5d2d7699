"""Numbers that are not finite in rows of the cache change no bit of a token that does not see them: rows of
later tokens of its chunk, of those before its window, and unused memory of its blocks. Kernels multiply whole
blocks of rows, and 0 times NaN is NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops.api import GroupedParts, GroupedSpec, Place
from farthing.ops.cpu import CpuOps
from farthing.ops.torch_util import make_batch
from tests.isas import ISAS
from tests.ops.parts import SPECS
from tests.ops.test_expanded import Layer, random_weight

pytestmark = pytest.mark.pairs

CACHES = ["float32", "bfloat16", "fp8", "int8"]
GROUPED = {
    "one head": GroupedSpec(1, 1, 64, 64, 0.125),  # 16 or more tokens share a unit
    "gpt_oss": GroupedSpec(16, 2, 64, 64, 0.125),
    "odd": GroupedSpec(6, 3, 20, 20, 0.2),
    "wide": GroupedSpec(4, 2, 192, 192, 0.07),
    "K = V": GroupedSpec(4, 2, 64, 64, 0.1, turning=16),
}
KINDS = {"value": float("nan"), "value ": float("inf"), "key": float("nan"), "key ": -float("inf")}


def native(isa: str, threads: int, least: int) -> CpuOps:
    ops = CpuOps(threads, isa=isa, invariant=True)
    ops._native.expand_tokens = least
    return ops


def inputs(spec: GroupedSpec, n: int) -> Tensor:
    x = torch.randn(n, spec.num_heads + 2 * spec.kv_heads, spec.head_dim)
    if spec.turning is not None:  # K = V
        x[:, -spec.kv_heads :] = x[:, -2 * spec.kv_heads : -spec.kv_heads]
    return x.flatten(1)


def grouped(ops: CpuOps, spec: GroupedSpec, cached: int, x: Tensor, cache_dtype: Any, empty: float) -> Tensor:
    """Outputs of the tokens from `cached` on, in one step, by token, group, and number."""
    n, groups = len(x), spec.kv_heads
    angles = torch.arange(n)[:, None] * torch.rand(spec.rope_dim // 2, generator=torch.manual_seed(5))
    angles[:, (spec.turning or spec.rope_dim) // 2 :] = 0
    rope = torch.stack((angles.cos(), angles.sin()))
    norm = torch.ones(spec.head_dim) if spec.turning is not None else None
    handle = ops.pack_grouped(spec, GroupedParts(k_norm=norm, v_norm=norm), rope)
    blocks = torch.randperm(-(-n // 16), generator=torch.manual_seed(0)).tolist()
    width = spec.head_dim + (spec.turning or spec.head_dim)
    cache = ops.new_cache(groups, len(blocks), 16, width, cache_dtype)
    cache.data.fill_(empty if cache.data.dtype.is_floating_point else 127)
    if cache.scale is not None:
        cache.scale.fill_(empty)
    out = torch.empty(0)
    for first, last in ((0, cached), (cached, n)):
        if first < last:
            place = Place(cache, 0, make_batch([last - first], [first], [blocks], 16))
            out = ops.gqa(x[first:last].clone(), handle, place)
    return out.view(len(out), groups, -1)


def damaged(spec: GroupedSpec, x: Tensor, at: int, kind: str) -> Tensor:
    """The same inputs with a number of the first group's key or value at a position that is not finite."""
    x, width = x.clone(), spec.head_dim
    keys = spec.num_heads * width
    columns = [keys + 3] if "key" in kind else [keys + spec.kv_heads * width + 3]
    if spec.turning is not None:  # K = V
        columns = [keys + 3, keys + spec.kv_heads * width + 3]
    x[at, columns] = KINDS[kind]
    return x


def check(found: Tensor, clean: Tensor, sees: Tensor, kind: str) -> None:
    """By token, group and number; the first group is damaged where a token `sees` the row."""
    assert torch.equal(found[:, 1:], clean[:, 1:])
    assert torch.equal(found[~sees], clean[~sees])
    if KINDS[kind] != KINDS[kind]:
        assert not found[sees, 0].isfinite().all(-1).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("name", list(GROUPED))
@pytest.mark.parametrize("window", [None, 1, 30])
def test_grouped_attention(isa: str, cache_dtype: str, name: str, window: int | None) -> None:
    """Tokens that share units, in chunks that begin within a block of keys."""
    spec = replace(GROUPED[name], window=window)
    torch.manual_seed(1)
    x = inputs(spec, 171)
    cached, ops = 37, native(isa, 1, 0)
    clean = grouped(ops, spec, cached, x, cache_dtype, 0.0)
    assert clean.isfinite().all()
    assert torch.equal(grouped(ops, spec, cached, x, cache_dtype, float("nan")), clean)
    for at, kind in zip((38, 64, 130, 170), KINDS, strict=True):
        tokens = torch.arange(cached, len(x))
        sees = (tokens >= at) & (tokens < at + (window or len(x)))
        check(grouped(ops, spec, cached, damaged(spec, x, at, kind), cache_dtype, 0.0), clean, sees, kind)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("window", [None, 70])
def test_few_new_tokens(isa: str, cache_dtype: str, window: int | None) -> None:
    """Their keys are divided among threads, as where drafts are verified."""
    spec = replace(GROUPED["gpt_oss"], window=window)
    torch.manual_seed(2)
    x = inputs(spec, 700)
    ops, tokens = native(isa, 3, 0), torch.arange(695, 700)
    clean = grouped(ops, spec, 695, x, cache_dtype, 0.0)
    for at, kind in zip((696, 697, 698, 699), KINDS, strict=True):
        found = grouped(ops, spec, 695, damaged(spec, x, at, kind), cache_dtype, 0.0)
        check(found, clean, tokens >= at, kind)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("name", ["one head", "odd", "K = V"])
@pytest.mark.parametrize("window", [None, 100])
def test_expanded_grouped_attention(isa: str, cache_dtype: str, name: str, window: int | None) -> None:
    spec = replace(GROUPED[name], window=window)
    torch.manual_seed(3)
    x = inputs(spec, 1300)
    ops, cached = native(isa, 2, 40), 1100
    clean = grouped(ops, spec, cached, x, cache_dtype, 0.0)
    for at, kind in zip((1101, 1150, 1189, 1299), KINDS, strict=True):
        tokens = torch.arange(cached, len(x))
        sees = (tokens >= at) & (tokens < at + (window or len(x)))
        check(grouped(ops, spec, cached, damaged(spec, x, at, kind), cache_dtype, 0.0), clean, sees, kind)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("name", ["small", "halves", "v3"])
@pytest.mark.parametrize("first", [0, 1100])
def test_latent_attention(isa: str, cache_dtype: str, name: str, first: int) -> None:
    """In absorbed form, and behind long prompts expanded."""
    spec, new, blocks = SPECS[name], 130, 100
    torch.manual_seed(4)
    layer = Layer(spec, random_weight(spec, "bf16"), cache_dtype, blocks)
    q, kv = layer.inputs(new)
    order = torch.randperm(blocks).tolist()[: -(-(first + new) // 16)]
    batch = make_batch([new], [first], [order], 16)
    clean = layer.run(native(isa, 2, 40), q, kv, batch)
    assert clean.isfinite().all()
    used = torch.tensor([order[p // 16] * 16 + p % 16 for p in range(first)], dtype=torch.long)
    for part in layer.filled:
        kept = part[used].clone()
        part.fill_(float("nan"))
        part[used] = kept
    for at, column in ((1, 3), (40, -2), (new - 1, 0), (new, 0)):
        changed = torch.cat((kv, kv[:1]))
        changed[at, column] = float("nan")
        found = layer.run(native(isa, 2, 40), q, changed[:new], batch)
        assert torch.equal(found[:at], clean[:at])
        assert not found[at:].isfinite().any()
