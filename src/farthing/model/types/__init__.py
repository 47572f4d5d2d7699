"""The model types this engine serves, one file each (docs/design/adding-a-model.md)."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from farthing.model.fields import ConfigError
from farthing.model.types import (
    axk1,
    deepseek_v3,
    deepseek_v4,
    gemma,
    glm_moe_dsa,
    gpt_oss,
    kimi_k25,
    llama,
    longcat_flash,
    mistral4,
    mistral_large_3,
    mixtral,
    qwen3_moe,
    qwen3_next,
    sarvam_mla,
)
from farthing.model.types.base import ModelType, Names
from farthing.model.types.unserved import why_unserved

__all__ = ["TYPES", "ModelType", "Names", "type_named", "type_of"]

TYPES: Mapping[str, ModelType] = {
    kind.name: kind
    for kind in (
        *deepseek_v3.TYPES,
        deepseek_v4.TYPE,
        kimi_k25.TYPE,
        mistral4.TYPE,
        mistral4.WRAPPED,
        mistral_large_3.TYPE,
        *glm_moe_dsa.TYPES,
        axk1.TYPE,
        sarvam_mla.TYPE,
        longcat_flash.TYPE,
        *qwen3_moe.TYPES,
        *qwen3_next.TYPES,
        *mixtral.TYPES,
        gpt_oss.TYPE,
        *llama.TYPES,
        *gemma.TYPES,
    )
}

_SIMILAR = 0.85  # of 1: a slip of the keyboard, not another family's name


def type_of(raw: Mapping[str, Any]) -> ModelType:
    """The type of a config.json. Raises ConfigError with the known types, and why a popular type is not one
    of them or else the name that is most likely meant."""
    return type_named(raw.get("model_type"))


def type_named(name: object) -> ModelType:
    """The type of that name; raises ConfigError as `type_of` does."""
    if isinstance(name, str) and name in TYPES:
        return TYPES[name]
    names = ", ".join(sorted(TYPES))
    if reason := why_unserved(name):
        raise ConfigError(f"model_type: got {name!r}, whose {reason} not served yet; expected one of {names}")
    close = get_close_matches(str(name), TYPES, n=1, cutoff=_SIMILAR)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"model_type: got {name!r}; expected one of {names}{hint}")
