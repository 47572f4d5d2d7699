"""A layer's packed parts, as a backend takes them that computes whole layers in one call."""

from __future__ import annotations

from farthing.model.attention import Attention
from farthing.model.moe import FeedForward
from farthing.ops.api import LayerHandles


def handles(attention: Attention, feed: FeedForward) -> LayerHandles:
    """The handles of one layer, for `Ops.stack`."""
    a = attention
    return LayerHandles(a.norm, a.qkv_a, a.q_width, a.q_norm, a.q_b, a.heads, a.o, feed.norm, feed.packed)
