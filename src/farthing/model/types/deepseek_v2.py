"""DeepSeek-V2 and V2-Lite: a softmax router without correction bias (V2 section 2.1.3)."""

from farthing.model.types.base import INTERLEAVED, Fields, ModelType


def _fields(raw: Fields) -> Fields:
    defaults = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}
    return defaults | {k: v for k, v in raw.items() if v is not None} | INTERLEAVED


TYPE = ModelType("deepseek_v2", "DeepSeek-V2, V2-Lite", _fields)
