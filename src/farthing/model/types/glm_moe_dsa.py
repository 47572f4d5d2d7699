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
    return {"first_k_dense_replace": 3, **raw, **dense_prefix(raw), **fixed}


def _flash(raw: Fields) -> Fields:
    return {"first_k_dense_replace": 1, **raw, **dense_prefix(raw)}


TYPES = (
    ModelType("glm_moe_dsa", "GLM-5", _fields),
    ModelType("glm4_moe_lite", "GLM-4.7-Flash", _flash),
)
