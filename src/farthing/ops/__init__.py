"""The model's arithmetic: one signature per op, one implementation per device."""

from farthing.ops.api import (
    AttentionSpec,
    Batch,
    GroupedParts,
    GroupedSpec,
    IndexerSpec,
    LatentCache,
    MoEWeights,
    Ops,
    RouterSpec,
)
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing.ops.weights import Weight

__all__ = [
    "AttentionSpec",
    "Batch",
    "GroupedParts",
    "GroupedSpec",
    "IndexerSpec",
    "LatentCache",
    "MoEWeights",
    "Ops",
    "RouterSpec",
    "Weight",
    "make_batch",
    "select",
]
