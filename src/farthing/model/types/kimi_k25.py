"""Kimi K2.5 and K2.6: Kimi K2 under `text_config` and `language_model.`, with a vision tower.

Only the language model is served; the experts of released checkpoints are INT4 (compressed-tensors).
"""

from farthing.model.types.base import Fields, ModelType, Names, tied


def _fields(raw: Fields) -> Fields:
    text: Fields = raw["text_config"]
    return {**{key: raw.get(key) for key in ("bos_token_id", "eos_token_id")}, **text, **tied(raw)}


TYPE = ModelType(
    "kimi_k25",
    "Kimi K2.5, K2.6 (text)",
    _fields,
    Names.under(
        "language_model.",
        skipped=("vision_tower.*", "mm_projector.*", "*.vision_tower.*", "*.mm_projector.*"),
        because="the vision tower is not served; this model answers text only",
    ),
)
