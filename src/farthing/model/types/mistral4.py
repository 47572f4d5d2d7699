"""Mistral Small 4: a softmax router without correction bias, and queries scaled by their position.

Also used inside `mistral3`, the multimodal wrapper it is released in: its fields are under `text_config`, its
tensors under `language_model.`, and the vision tower is skipped.
"""

from farthing.model.fields import section, wrong
from farthing.model.types.base import Fields, ModelType, Names, tied


def _fields(raw: Fields) -> Fields:
    fixed = {"scoring_func": "softmax", "topk_method": "noaux_tc", "router_bias": False}
    return {**raw, **fixed}


def _nested(raw: Fields) -> Fields:
    text = section(raw, "text_config")
    if text.get("model_type") != "mistral4":
        raise wrong("text_config.model_type", text.get("model_type"), "'mistral4'")
    return _fields({**text, **tied(raw)})


TYPE = ModelType("mistral4", "Mistral Small 4 (text part)", _fields)
WRAPPED = ModelType(
    "mistral3",
    "Mistral Small 4",
    _nested,
    Names.under(
        "language_model.",
        skipped=("vision_tower.*", "multi_modal_projector.*"),
        because="the vision tower is not served; this model answers text only",
    ),
)
