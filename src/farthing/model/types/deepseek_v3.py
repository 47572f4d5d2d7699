"""DeepSeek-V3, the base that other types are described against, and types that are nearly the same."""

from typing import Any

from farthing.model.fields import integer
from farthing.model.types.base import INTERLEAVED, Fields, ModelType, dense_prefix

V3: dict[str, Any] = {
    "q_lora_rank": 1536,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
}
_V2 = {"q_lora_rank": 1536, "n_shared_experts": 2}


def _v2(raw: Fields) -> Fields:
    """A softmax router without correction bias (V2 section 2.1.3)."""
    defaults = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}
    return defaults | {k: v for k, v in raw.items() if v is not None} | INTERLEAVED


def _v32(raw: Fields) -> Fields:
    """A lightning indexer in every layer selects keys for attention. It rotates by halves; attention's own
    rotation stays interleaved."""
    fixed = {"index_rope_interleaved": False, "index_topk": integer(raw, "index_topk"), **INTERLEAVED}
    return {**raw, **dense_prefix(raw), **fixed}


TYPES = (
    ModelType("deepseek_v3", "DeepSeek-V3, V3.1, R1; Moonlight", defaults=V3),
    ModelType("deepseek_v2", "DeepSeek-V2, V2-Lite", _v2, defaults=_V2),
    ModelType("deepseek_v32", "DeepSeek-V3.2, V3.2-Exp, V3.2-Speciale", _v32, defaults=V3),
    ModelType("kimi_k2", "Kimi K2", defaults=V3),  # only sizes differ
)
