"""DeepSeek-V3.2: V3 with a lightning indexer in every layer that selects the keys for attention.

The indexer rotates by halves; attention's own rotation stays interleaved.
"""

from farthing.model.fields import integer
from farthing.model.types.base import INTERLEAVED, Fields, ModelType, dense_prefix


def _fields(raw: Fields) -> Fields:
    fixed = {"index_rope_interleaved": False, "index_topk": integer(raw, "index_topk"), **INTERLEAVED}
    return {"first_k_dense_replace": 3, **raw, **dense_prefix(raw), **fixed}


TYPE = ModelType("deepseek_v32", "DeepSeek-V3.2, V3.2-Exp, V3.2-Speciale", _fields)
