"""Kimi K2.5 and K2.6: Kimi K2 under `text_config` and `language_model.`, with a vision tower.

Only the language model is served; the experts of released checkpoints are INT4 (compressed-tensors).
"""

from farthing.model.fields import section, wrong
from farthing.model.types.base import Fields, ModelType, Names, tied
from farthing.model.types.deepseek_v3 import V3

_PREFIX = "language_model."


def _fields(raw: Fields) -> Fields:
    text = section(raw, "text_config")
    if (kind := text.get("model_type")) not in (None, "kimi_k2", "deepseek_v3"):
        raise wrong("text_config.model_type", kind, "'kimi_k2' or 'deepseek_v3'")
    ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id")}
    return {**V3, **ids, **text, **tied(raw, text, default=True)}


def _saved(name: str) -> str:
    """As transformers 5.24 saves a model: its renaming of the vision tower's layers hits all layers."""
    return _PREFIX + name.replace("model.layers.", "model.blocks.", 1)


TYPE = ModelType(
    "kimi_k25",
    "Kimi K2.5, K2.6 (text)",
    _fields,
    Names(
        lambda name: _PREFIX + name,
        skipped=("vision_tower.*", "mm_projector.*", "*.vision_tower.*", "*.mm_projector.*"),
        skipped_because="the vision tower is not served; this model answers text only",
        variants=(_saved,),
    ),
)
