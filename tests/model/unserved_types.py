"""Writes the list of model types that transformers has and Farthing does not serve:

python -m tests.model.unserved_types
"""

from __future__ import annotations

import json
from typing import Any

from farthing.model.types import TYPES
from farthing.model.types.unserved import FILE

STATES = ("mamba", "ssm", "state_size", "rwkv", "lru")


def needs_of(name: str) -> str:
    """What a type needs, by its default configuration."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[name]().get_text_config().to_dict()
    except Exception:  # some have no defaults
        config = {}
    layers = {str(kind) for key in ("layer_types", "layers_block_type") for kind in config.get(key) or ()}
    if any(word in key for key in config for word in STATES):
        return "state-space layers are"
    if "linear_attention" in layers:
        return "linear attention is"
    if "conv_L_cache" in config:
        return "short convolutions are"
    return "form of layers with experts is" if _has_experts(config) else "form of layers is"


def _has_experts(config: dict[str, Any]) -> bool:
    return any("experts" in key and type(value) is int and value > 1 for key, value in config.items())


def listed() -> dict[str, list[str]]:
    """What a type needs -> the causal types of the installed transformers that need it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found: dict[str, list[str]] = {}
    for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(TYPES)):
        found.setdefault(needs_of(name), []).append(name)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    rows = (f"{json.dumps(needs)}: {json.dumps(names)}" for needs, names in listed().items())
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
