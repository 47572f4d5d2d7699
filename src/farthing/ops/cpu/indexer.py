"""The native lightning indexer. Legend: see `farthing.ops.indexer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farthing import _native
from farthing.ops.api import Batch, IndexCache, IndexerSpec
from farthing.ops.cpu.stack import CACHE_TYPES
from farthing.ops.selection import sequences_of

MOST_SCORES = 1 << 22  # scores in memory at once; larger steps are scored in parts


@dataclass(frozen=True, slots=True)
class Indexer:
    """A packed indexer; owns the tensors that native code points to."""

    native: Any
    spec: IndexerSpec
    alive: tuple[Tensor, ...]


def pack(spec: IndexerSpec, norm: Tensor, bias: Tensor, rope: Tensor) -> Indexer:
    """norm, bias [d] and rope [2, max_len, r/2], float32 and contiguous."""
    native = _native.Indexer(
        spec.num_heads, spec.head_dim, spec.rope_dim, spec.top_k, spec.norm_eps, spec.interleaved,
        norm.data_ptr(), bias.data_ptr(), rope[0].data_ptr(), rope[1].data_ptr(),
    )  # fmt: skip
    return Indexer(native, spec, (norm, bias, rope))


def index(
    native: Any, q: Tensor, k: Tensor, w: Tensor, indexer: Indexer, cache: IndexCache, row: int, batch: Batch
) -> Tensor | None:
    """`Ops.index` of float32 rows with unit column stride."""
    tokens, data, scale = q.shape[0], cache.data, cache.scale
    longest = int(batch.context_lens.max())
    scored = longest > indexer.spec.top_k
    out = torch.empty(tokens, indexer.spec.top_k, dtype=torch.int32) if scored else None
    sequences = sequences_of(batch).to(torch.int32)
    step = max(1, MOST_SCORES // longest) if scored else tokens
    for at in range(0, tokens, step):
        part = slice(at, at + step)
        _native.index(
            native, indexer.native, q[part].data_ptr(), q.stride(0), k[part].data_ptr(), k.stride(0),
            w[part].data_ptr(), w.stride(0), min(step, tokens - at), CACHE_TYPES[data.dtype],
            data.data_ptr() + row * data.stride(0) * data.element_size(),
            0 if scale is None else scale.data_ptr() + row * scale.stride(0) * 4, data.shape[2],
            batch.positions[part].data_ptr(), batch.slots[part].data_ptr(), sequences[part].data_ptr(),
            batch.block_table.data_ptr(), batch.block_table.shape[1],
            0 if out is None else out[part].data_ptr(),
        )  # fmt: skip
    return out
