"""Mistral Small 4: a softmax router without correction bias, and queries scaled by their position.

Also used inside `mistral3`, the multimodal wrapper it is released in: its fields are under `text_config`, its
tensors under `language_model.`, and the vision tower is skipped.
"""

from typing import Any

from farthing.model.fields import section, wrong
from farthing.model.types.base import Fields, ModelType, Names, tied

_DEFAULTS: dict[str, Any] = {"q_lora_rank": 1024, "n_shared_experts": 1}
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _fields(raw: Fields) -> Fields:
    if not raw.get("rope_parameters") and not raw.get("rope_scaling"):
        raw = {**raw, "rope_parameters": _ROPE}
    fixed = {"scoring_func": "softmax", "topk_method": "noaux_tc", "router_bias": False}
    return {**raw, **fixed}


def _nested(raw: Fields) -> Fields:
    text = section(raw, "text_config")
    if text.get("model_type") != "mistral4":
        raise wrong("text_config.model_type", text.get("model_type"), "'mistral4'")
    return _fields({**_DEFAULTS, **text, **tied(raw, text, default=True)})


TYPE = ModelType("mistral4", "Mistral Small 4 (text part)", _fields, defaults=_DEFAULTS)
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
