"""The indexer kernel with every cache dtype, and attention to its selection, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from farthing.ops.api import CacheDtype, IndexCache, Ops, Place
from farthing.ops.reference import ReferenceOps
from farthing.ops.specs import AttentionSpec, IndexerSpec
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight
from farthing_gpu import GpuOps
from tests.gpu.parts import DEVICE
from tests.gpu.test_attention import moved

BLOCK = 16
SPECS = [
    IndexerSpec(num_heads=24, head_dim=16, rope_dim=8, top_k=5),
    IndexerSpec(num_heads=5, head_dim=24, rope_dim=4, top_k=20, interleaved=True),
]
LAYOUT = AttentionSpec(4, 8, 8, 8, 32, 0.2)
# (cached tokens, tokens of this step) per sequence: prompts, then chunks mixed with single tokens.
STEPS = [[(0, 40), (0, 3)], [(40, 1), (3, 2)], [(41, 9), (5, 1)]]


def run(ops: Ops, spec: IndexerSpec, dtype: CacheDtype) -> tuple[list[Tensor], list[Tensor]]:
    """(positions, attention outputs) per step."""
    g = torch.Generator().manual_seed(0)
    angles = (
        torch.rand(64, spec.rope_dim // 2, generator=g),
        torch.rand(64, LAYOUT.rope_dim // 2, generator=g),
    )
    ropes = [torch.stack((a.cos(), a.sin())) for a in angles]
    norm = torch.rand(spec.head_dim, generator=g) + 0.5, torch.randn(spec.head_dim, generator=g)
    indexer = ops.pack_indexer("i", spec, lambda: norm, ropes[0])
    kv_b = Weight("dense", torch.randn(4 * 16, 32, generator=g) * 0.2)
    heads = ops.pack_attention("a", LAYOUT, lambda: (kv_b, torch.ones(32)), ropes[1])
    cache = ops.new_cache(1, 8, BLOCK, 40, dtype)
    cache.index = IndexCache.new(ops, cache, 2, spec.head_dim)
    widths = spec.num_heads * spec.head_dim, spec.head_dim, spec.num_heads, 4 * 16, 40
    found, outs = [], []
    for step in STEPS:
        batch = make_batch([n for _, n in step], [c for c, _ in step], [[3, 1, 6, 0], [5, 2]], BLOCK)
        batch = moved(batch) if ops.device.type == "cuda" else batch
        total = sum(n for _, n in step)
        q, k, w, qa, kv = (torch.randn(total, n, generator=g).to(ops.device, ops.dtype) for n in widths)
        select = ops.index(q, k, w, indexer, Place(cache, 1, batch))
        assert select is not None
        found.append(select.cpu())
        outs.append(ops.mla(qa, kv, heads, Place(cache, 0, batch), select).cpu().float())
    return found, outs


DTYPES: list[CacheDtype] = ["float32", "bfloat16", "fp8", "int8"]


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [  # quickly: every dtype once, every layout twice
        pytest.param(
            spec,
            dtype,
            id=f"{spec.num_heads}x{spec.head_dim}-{dtype}",
            marks=() if (i + j) % 2 else pytest.mark.slow,
        )
        for i, spec in enumerate(SPECS)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_positions_and_attention(spec: IndexerSpec, dtype: CacheDtype) -> None:
    found, outs = run(GpuOps(torch.float32, DEVICE), spec, dtype)
    expected, theirs = run(ReferenceOps(torch.float32), spec, dtype)
    for mine, reference, out, other in zip(found, expected, outs, theirs, strict=True):
        assert torch.equal(mine, reference)
        torch.testing.assert_close(out, other, atol=1e-3, rtol=1e-3)
