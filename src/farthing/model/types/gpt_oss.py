"""gpt-oss: attention with sinks, within a window in every other layer, and experts with biases."""

from __future__ import annotations

import re
from typing import Any

from farthing.model.fields import integer, number
from farthing.model.forms.grouped import grouped_layers
from farthing.model.types.base import Fields, ModelType, Names, half_split, present, sliding
from farthing.model.types.qwen3_moe import SOFTMAX, experts
from farthing.ops.specs import Gate

_GATE = re.compile(r"(model\.layers\.\d+\.mlp)\.gate\.(weight|bias)")
_DEFAULTS: dict[str, Any] = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _fields(raw: Fields) -> Fields:
    """A softmax over the chosen experts' logits is one over all of them, normalized over the chosen."""
    alpha = number("swiglu_alpha", raw.get("swiglu_alpha", 1.702))
    limit = number("swiglu_limit", raw.get("swiglu_limit", 7.0), above=0.0)
    fixed: dict[str, Any] = {
        "sinks": True,
        "expert_bias": True,
        "gate": Gate(alpha=alpha, limit=limit, shift=1.0),
        "norm_topk_prob": True,
        "moe_intermediate_size": integer(raw, "intermediate_size"),
        **experts(raw, "num_local_experts"),
        **sliding({**_DEFAULTS, **raw}, layers=lambda i: i % 2 == 0),
    }
    if not raw.get("rope_parameters") and not raw.get("rope_scaling"):
        fixed["rope_scaling"] = _YARN
    return {**_DEFAULTS, **present(raw), **SOFTMAX, **half_split(raw, 150000.0), **fixed}


def _stored(name: str) -> str:
    return _GATE.sub(r"\1.router.\2", name)


TYPE = ModelType("gpt_oss", "gpt-oss-20b, gpt-oss-120b", _fields, Names(_stored), mixers=grouped_layers)
