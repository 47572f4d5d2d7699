"""The native lightning indexer. Legend: see `farthing.ops.indexer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farthing import _native
from farthing.lazy import torch
from farthing.ops.api import Batch, IndexCache, IndexerSpec
from farthing.ops.arrays import address
from farthing.ops.cpu.stack import native_cache, native_rows
from farthing.ops.selection import sequences_of

if TYPE_CHECKING:
    from torch import Tensor

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
        address(norm), address(bias), address(rope[0]), address(rope[1]),
    )  # fmt: skip
    return Indexer(native, spec, (norm, bias, rope))


def index(
    native: Any, q: Tensor, k: Tensor, w: Tensor, indexer: Indexer, cache: IndexCache, row: int, batch: Batch
) -> Tensor | None:
    """`Ops.index` of float32 rows with unit column stride."""
    tokens, longest = q.shape[0], int(batch.context_lens.max())
    scored = longest > indexer.spec.top_k
    out = torch.empty(tokens, indexer.spec.top_k, dtype=torch.int32) if scored else None
    sequences, keys = sequences_of(batch).to(torch.int32), native_cache(cache, row)
    step = max(1, MOST_SCORES // longest) if scored else tokens
    for at in range(0, tokens, step):
        part = slice(at, at + step)
        rows = _native.IndexBatch(
            batch.positions[part].data_ptr(),
            batch.slots[part].data_ptr(),
            sequences[part].data_ptr(),
            batch.block_table.data_ptr(),
            batch.block_table.shape[1],
        )
        inputs = (native_rows(x[part]) for x in (q, k, w))
        to = 0 if out is None else out[part].data_ptr()
        _native.index(native, indexer.native, *inputs, min(step, tokens - at), keys, rows, to)
    return out
