"""The model types this engine serves, one file each (docs/design/adding-a-model.md)."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from farthing.model.error import ConfigError
from farthing.model.types import (
    axk1,
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_k2,
    kimi_k25,
    longcat_flash,
    mistral4,
    mistral_large_3,
    sarvam_mla,
)
from farthing.model.types.base import ModelType, Names

__all__ = ["TYPES", "ModelType", "Names", "type_named", "type_of"]

TYPES: Mapping[str, ModelType] = {
    kind.name: kind
    for kind in (
        deepseek_v3.TYPE,
        deepseek_v2.TYPE,
        deepseek_v32.TYPE,
        kimi_k2.TYPE,
        kimi_k25.TYPE,
        glm4_moe_lite.TYPE,
        mistral4.TYPE,
        mistral4.WRAPPED,
        mistral_large_3.TYPE,
        glm_moe_dsa.TYPE,
        axk1.TYPE,
        sarvam_mla.TYPE,
        longcat_flash.TYPE,
    )
}


def type_of(raw: Mapping[str, Any]) -> ModelType:
    """The type of a config.json. Raises ConfigError with the known types and the closest match."""
    return type_named(raw.get("model_type"))


def type_named(name: object) -> ModelType:
    """The type of that name; raises ConfigError as `type_of` does."""
    if isinstance(name, str) and name in TYPES:
        return TYPES[name]
    close = get_close_matches(str(name), TYPES, n=1, cutoff=0.5)
    hint = f"; the closest is {close[0]!r}" if close else ""
    raise ConfigError(f"model_type: got {name!r}; expected one of {', '.join(sorted(TYPES))}{hint}")
