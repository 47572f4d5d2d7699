"""Every layer of a model in one native call: Python's share of a step no longer grows with the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from farthing import _native
from farthing.ops.api import Batch, LatentCache, LayerHandles, PeerLost

CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.int8: 3}


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers for `run_layers`; `alive` holds what the native side points into."""

    native: Any
    alive: tuple[Any, ...]


def pack_stack(layers: Sequence[LayerHandles]) -> Stack:
    """Gather what the layers packed already; no weight is copied."""
    native = _native.Layers()
    alive: list[Any] = []
    for layer in layers:
        norms = [
            None if w is None else w.float().contiguous() for w in (layer.norm, layer.q_norm, layer.feed_norm)
        ]
        norm, q_norm, feed_norm = (0 if w is None else w.data_ptr() for w in norms)
        q_b = None if layer.q_b is None else layer.q_b.packed
        sums = [s and _native.SharedSum(*astuple(s)) for s in (layer.attention_sum, layer.feed_sum)]
        native.add(
            norm, layer.qkv_a.packed, layer.q_width, q_norm, q_b, layer.heads.native, layer.o.packed,
            feed_norm, layer.feed.native, *sums,
        )  # fmt: skip
        alive += [*norms, layer.heads, layer.feed]
    return Stack(native, tuple(alive))


def run_layers(
    native: Any,
    h: Tensor,
    stack: Stack,
    batch: Batch,
    cache: LatentCache,
    eps: float,
    counts: Tensor | None,
) -> Tensor:
    """h [T, D] float32 with unit column stride -> [T, D], a new tensor."""
    tokens, hidden = h.shape
    out = torch.empty(tokens, hidden)
    data, scale = cache.data, cache.scale
    try:
        native.layers(
            stack.native, h.data_ptr(), h.stride(0), tokens, CACHE_TYPES[data.dtype], data.data_ptr(),
            data.stride(0) * data.element_size(), 0 if scale is None else scale.data_ptr(),
            0 if scale is None else scale.stride(0), data.shape[2], batch.positions.data_ptr(),
            batch.slots.data_ptr(), batch.query_start.data_ptr(), batch.context_lens.data_ptr(),
            batch.block_table.data_ptr(), batch.block_table.shape[0], batch.block_table.shape[1], eps,
            0 if counts is None else counts.data_ptr(), 0 if counts is None else counts.stride(0),
            out.data_ptr(), hidden,
        )  # fmt: skip
    except _native.PeerLost as error:
        raise PeerLost(*error.args) from error
    return out
