"""Gemma 3 and 4: windows in most layers, with a rotation and, in Gemma 4, heads of their own.

Outputs of attention and feed-forward are normed too. Gemma 4's mixtures have a dense MLP next to the experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from farthing.model.fields import flag, integer, number, optional_section, section, wrong
from farthing.model.forms.grouped import grouped_layers
from farthing.model.types.base import Fields, ModelType, Names, half_split, present, sliding, tied
from farthing.model.types.llama import DENSE
from farthing.model.types.qwen3_moe import SOFTMAX, experts
from farthing.ops.specs import Gate

_GELU = Gate(alpha=2 * math.sqrt(2 / math.pi), cubic=0.044715)
_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA = {_FULL: 1e6, _SLIDING: 1e4}


def _common(raw: Fields) -> dict[str, Any]:
    """What both have. Most fields may be absent, because transformers has defaults for all of them."""
    activation = raw.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise wrong("hidden_activation", activation, "'gelu_pytorch_tanh'")
    if raw.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise wrong(
            "use_bidirectional_attention", raw["use_bidirectional_attention"], "false: text is causal"
        )
    if raw.get("attention_bias") not in (None, False):
        raise wrong("attention_bias", raw["attention_bias"], "false: matrices have no bias")
    tied_head = raw.get("tie_word_embeddings")
    return {
        "gate": _GELU,
        "hidden_act": None,  # transformers ignores it
        "post_norms": True,
        "qk_norm": "head",
        "embedding_scale": math.sqrt(integer({"hidden_size": 2304, **raw}, "hidden_size")),
        "logit_cap": raw.get("final_logit_softcapping") or None,
        "tie_word_embeddings": flag("tie_word_embeddings", True if tied_head is None else tied_head),
    }


def _windows(raw: Fields, default: int, every: int = 6) -> dict[str, Any]:
    """Every so many-th layer sees all tokens, unless layer_types says otherwise."""
    return sliding({"sliding_window": default, **present(raw)}, layers=lambda i: bool((i + 1) % every))


def _gemma3_rope(raw: Fields, kind: str) -> dict[str, Any]:
    """Newer files have one object for each kind of layers."""
    given = optional_section(raw, "rope_parameters")
    if kind in given:
        own = optional_section(given, kind)
    else:
        own = optional_section(raw, "rope_scaling") if kind == _FULL else {}
    name = "rope_theta" if kind == _FULL else "rope_local_base_freq"
    theta = _THETA[kind] if raw.get(name) is None else number(name, raw[name], above=0.0)
    return {"rope_theta": theta, **own}


def _gemma3(raw: Fields) -> Fields:
    if raw.get("attn_logit_softcapping") is not None:
        raise wrong("attn_logit_softcapping", raw["attn_logit_softcapping"], "null, as in Gemma 3")
    scalar = number("query_pre_attn_scalar", raw.get("query_pre_attn_scalar", 256), above=0.0)
    defaults = {"num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6}
    every = integer({"sliding_window_pattern": 6, **present(raw)}, "sliding_window_pattern")
    fixed = {
        **_common(raw),
        **_windows(raw, 4096, every),
        "norm_offset": 1.0,
        "attention_multiplier": scalar**-0.5,
        "rope_parameters": _gemma3_rope(raw, _FULL),
        "windowed": {"rope_parameters": _gemma3_rope(raw, _SLIDING)},
    }
    return {**defaults, **present(raw), **DENSE, **half_split(raw), **fixed}


_ABSENT = {  # of the small models, whose layers share keys and have embeddings of their own
    "hidden_size_per_layer_input": "embeddings of single layers are not supported (E2B and E4B have them)",
    "num_kv_shared_layers": "layers that share keys and values are not supported (E2B and E4B have them)",
}


def _gemma4(raw: Fields) -> Fields:
    for name, what in _ABSENT.items():
        if raw.get(name, 256 if name.startswith("hidden") else 0) not in (None, 0):
            raise wrong(name, raw.get(name, 256), f"0: {what}")
    given = {"num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, **present(raw)}
    windows = _windows(raw, 512)
    windows["windows"][-1] = 0
    shared = flag("attention_k_eq_v", raw.get("attention_k_eq_v", False))
    ropes = optional_section(raw, "rope_parameters")
    full = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
    local = {name: given[name] for name in _OWN_HEADS}
    fixed = {
        **_common(raw),
        **windows,
        **_mixture(raw),
        "layer_scalar": True,
        "value_norm": True,
        "attention_multiplier": 1.0,
        **_full_heads(given, shared, windows["windows"]),
        "shared_kv": shared,
        "rope_parameters": optional_section(ropes, _FULL) or full,
        "windowed": {
            **local,
            "shared_kv": False,
            "rope_parameters": optional_section(ropes, _SLIDING) or {"rope_theta": 1e4},
        },
    }
    return {**given, **SOFTMAX, **half_split(raw), **fixed}


_OWN_HEADS = ("head_dim", "num_key_value_heads")


def _full_heads(given: dict[str, Any], shared: bool, windows: list[int]) -> dict[str, Any]:
    """Sizes of heads that see all tokens. transformers writes them layer by layer, as per_layer_config."""
    listed = given.get("per_layer_config")
    if listed is None:
        own = {"head_dim": integer({"global_head_dim": 512, **given}, "global_head_dim")}
        if shared and "num_global_key_value_heads" in given:
            own["num_key_value_heads"] = integer(given, "num_global_key_value_heads")
        return own
    full = [str(i) for i, window in enumerate(windows) if not window]
    own = listed.get(full[0], {}) if isinstance(listed, dict) and full else {}
    if listed != ({i: own for i in full} if own else {}) or not set(own) <= set(_OWN_HEADS):
        expected = f"{' and '.join(_OWN_HEADS)} of layers with full_attention, the same in all of them"
        raise wrong("per_layer_config", listed, expected)
    return dict(own)


def _mixture(raw: Fields) -> dict[str, Any]:
    if not flag("enable_moe_block", raw.get("enable_moe_block", False)):
        return DENSE
    return {
        **experts(raw),
        "num_experts_per_tok": integer(raw, "top_k_experts"),
        "norm_topk_prob": True,
        "parallel_mlp": True,
        "scaled_router": True,
    }


def _nested(fields: Callable[[Fields], Fields], kind: str) -> Callable[[Fields], Fields]:
    """Of a checkpoint with a vision tower."""

    def read(raw: Fields) -> Fields:
        text = section(raw, "text_config")
        if text.get("model_type") not in (None, kind):
            raise wrong("text_config.model_type", text.get("model_type"), repr(kind))
        ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id") if raw.get(key) is not None}
        return fields({**text, **tied(raw, text, default=True), **ids})

    return read


_LAYER = re.compile(r"(model\.layers\.\d+)\.(.*)")
_STORED = {
    "self_attn.post_norm.weight": "post_attention_layernorm.weight",
    "post_attention_layernorm.weight": "pre_feedforward_layernorm.weight",
    "mlp.post_mlp_layernorm.weight": "post_feedforward_layernorm.weight",
    "mlp.dense_post_norm.weight": "post_feedforward_layernorm_1.weight",
    "mlp.expert_post_norm.weight": "post_feedforward_layernorm_2.weight",
    "mlp.expert_norm.weight": "pre_feedforward_layernorm_2.weight",
    "mlp.gate.weight": "router.proj.weight",
    "mlp.gate.input_scale": "router.scale",
    "mlp.gate.expert_scale": "router.per_expert_scale",
}


def _stored(name: str) -> str:
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    inner = _STORED.get(match[2], match[2])
    return f"{match[1]}.{inner.removeprefix('mlp.') if inner.startswith('mlp.experts.') else inner}"


def _in_language_model(name: str) -> str:
    return re.sub(r"^model\.", "model.language_model.", _stored(name))


def _under_language_model(name: str) -> str:
    return f"language_model.{_stored(name)}"


_TOWERS = (
    "*vision_tower.*",
    "*audio_tower.*",
    "*multi_modal_projector.*",
    "*embed_vision.*",
    "*embed_audio.*",
)
_TEXT_ONLY = "vision and audio towers are not served; this model answers text only"
_TEXT = Names(_stored, variants=(_in_language_model, _under_language_model))
_WRAPPED = Names(_in_language_model, _TOWERS, _TEXT_ONLY, variants=(_under_language_model, _stored))
_OWN = {"num_experts_per_tok": "top_k_experts", "logit_cap": "final_logit_softcapping"}
TYPES = (
    ModelType("gemma3_text", "Gemma 3 270M, 1B", _gemma3, _TEXT, _OWN, mixers=grouped_layers),
    ModelType(
        "gemma3",
        "Gemma 3 4B, 12B, 27B (text)",
        _nested(_gemma3, "gemma3_text"),
        _WRAPPED,
        _OWN,
        mixers=grouped_layers,
    ),
    ModelType(
        "gemma4_text", "the text model of gemma4 on its own", _gemma4, _TEXT, _OWN, mixers=grouped_layers
    ),
    ModelType(
        "gemma4",
        "Gemma 4 26B-A4B, 31B (text)",
        _nested(_gemma4, "gemma4_text"),
        _WRAPPED,
        _OWN,
        mixers=grouped_layers,
    ),
)
