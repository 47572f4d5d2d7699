"""GLM-4.7-Flash: V3's layers and MTP layer with other sizes and one expert group."""

from farthing.model.types.base import Fields, ModelType, dense_prefix


def _fields(raw: Fields) -> Fields:
    return {"first_k_dense_replace": 1, **raw, **dense_prefix(raw)}


TYPE = ModelType("glm4_moe_lite", "GLM-4.7-Flash", _fields)
