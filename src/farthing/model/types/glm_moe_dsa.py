"""GLM-5, V3.2 with an interleaved indexer rotation and layers that reuse an earlier layer's selection, and
GLM-4.7-Flash, V3 with other sizes and one expert group."""

from farthing.model.fields import integer
from farthing.model.types.base import INTERLEAVED, Fields, ModelType, dense_prefix, layer_count, per_layer


def _indexer_types(raw: Fields) -> list[str]:
    """Indexer type per layer: from a list, a pattern such as "FFSS", or every index_topk_freq-th "full"."""
    if listed := per_layer(raw, "indexer_types", ("full", "shared")):
        return listed
    if pattern := per_layer(raw, "index_topk_pattern", ("F", "S")):
        return [{"F": "full", "S": "shared"}[kind] for kind in pattern]
    every = 1 if raw.get("index_topk_freq") is None else integer(raw, "index_topk_freq")
    first = (
        2 if raw.get("index_skip_topk_offset") is None else integer(raw, "index_skip_topk_offset", least=0)
    )
    layers = range(layer_count(raw))
    return ["shared" if max(i - first + 1, 0) % every else "full" for i in layers]


def _fields(raw: Fields) -> Fields:
    fixed = {
        "index_rope_interleaved": True,
        "indexer_types": _indexer_types(raw),
        "index_topk": integer(raw, "index_topk"),
        **INTERLEAVED,
    }
    return {**raw, **dense_prefix(raw), **fixed}


def _flash(raw: Fields) -> Fields:
    return {**raw, **dense_prefix(raw)}


_DSA = {
    "q_lora_rank": 2048,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "rms_norm_eps": 1e-5,
}
_FLASH = {
    "q_lora_rank": 768,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.8,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5,
}
TYPES = (
    ModelType("glm_moe_dsa", "GLM-5", _fields, defaults=_DSA),
    ModelType("glm4_moe_lite", "GLM-4.7-Flash", _flash, defaults=_FLASH),
)
