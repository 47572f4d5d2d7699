"""A.X K1: V3 with an extra norm on the MoE output before the residual add.

Released checkpoints also store that norm for dense layers, which do not use it, and have no router correction
bias.
"""

import re

from farthing.model.types.base import Fields, ModelType, Names, dense_prefix
from farthing.model.types.deepseek_v3 import V3

_NORM = re.compile(r"(model\.layers\.\d+)\.mlp\.post_mlp_layernorm")


def _fields(raw: Fields) -> Fields:
    return {**raw, **dense_prefix(raw), "post_mlp_norm": True}


TYPE = ModelType(
    "axk1",
    "A.X K1",
    _fields,
    Names(
        lambda name: _NORM.sub(r"\1.post_mlp_layernorm", name),
        skipped=("*.post_mlp_layernorm.weight",),  # unused in dense layers
    ),
    may_lack_router_bias=True,
    defaults={**V3, "first_k_dense_replace": 1},
)
