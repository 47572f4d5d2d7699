"""A layer's packed parts, for backends that compute whole layers in one call."""

from __future__ import annotations

from collections.abc import Sequence

from farthing.model.attention import AnyAttention
from farthing.model.moe import FeedForward
from farthing.ops import Ops
from farthing.ops.api import Handle, LayerHandles


def stacked(ops: Ops, layers: Sequence[tuple[AnyAttention, FeedForward]]) -> Handle | None:
    """`Ops.stack` of these layers; None if the backend has none or does not support one of the layers."""
    found = [handles(*layer) for layer in layers]
    plain = [h for h in found if h is not None]
    return ops.stack(plain) if len(plain) == len(found) else None


def handles(attention: AnyAttention, feed: FeedForward) -> LayerHandles | None:
    """The handles of one layer for `Ops.stack`; None if it cannot represent the layer."""
    if attention.query_scale is not None or attention.sparse:
        return None
    if feed.post_norm is not None or feed.beside is not None:
        return None
    a = attention
    return LayerHandles(
        a.norm, a.qkv_a, a.q_width, a.q_norm, a.q_b, a.heads, a.o, feed.norm, feed.packed,
        o_bias=a.o_bias, rows=a.rows,
    )  # fmt: skip
