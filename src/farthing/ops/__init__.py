"""The arithmetic: one signature an op, one implementation a device."""

from farthing.ops.api import AttentionSpec, Batch, LatentCache, MoEWeights, Ops, RouterSpec
from farthing.ops.select import select
from farthing.ops.weights import Weight

__all__ = ["AttentionSpec", "Batch", "LatentCache", "MoEWeights", "Ops", "RouterSpec", "Weight", "select"]
