"""A.X K1: V3 with one more norm, on what a mixture of experts adds to the residual stream.

Released checkpoints store that norm beside the layer's others, for dense layers too, which do not use it, and
hold no correction bias of the router.
"""

import re

from farthing.model.types.base import Fields, ModelType, Names, dense_prefix

_NORM = re.compile(r"(model\.layers\.\d+)\.mlp\.post_mlp_layernorm")


def _fields(raw: Fields) -> Fields:
    return {"first_k_dense_replace": 1, **raw, **dense_prefix(raw), "post_mlp_norm": True}


TYPE = ModelType(
    "axk1",
    "A.X K1",
    _fields,
    Names(
        lambda name: _NORM.sub(r"\1.post_mlp_layernorm", name),
        skipped=("*.post_mlp_layernorm.weight",),  # of dense layers
    ),
    may_lack_router_bias=True,
)
