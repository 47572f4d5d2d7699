"""Mistral's own file format: params.json and Mistral's tensor names, as Mistral Large 3 is released.

Routing is a softmax without correction bias and queries are scaled by their position, as in `mistral4`. YaRN
only affects the rotation: with `apply_scale` false the score scale is the same as without YaRN.
"""

from __future__ import annotations

import re
from typing import Any

from farthing.model.fields import flag, integer, number, optional_section, section
from farthing.model.types.base import Fields, ModelType, Names

_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
}
_OTHERS = {"norm_eps": "rms_norm_eps", "tied_embeddings": "tie_word_embeddings"}
_EXPERTS = {  # required, under "moe"
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "expert_hidden_dim": "moe_intermediate_size",
}
_COUNTS = {  # optional
    "num_shared_experts": "n_shared_experts",
    "first_k_dense_replace": "first_k_dense_replace",
    "route_every_n": "moe_layer_freq",
    "num_expert_groups": "n_group",
    "num_expert_groups_per_tok": "topk_group",
}
_ORIGINAL = "original_max_position_embeddings"
_TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate": "gate",
}
_MLP = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_IN_MLP = re.compile(r"mlp\.(?:(shared_experts|experts\.\d+)\.)?(gate_proj|up_proj|down_proj)(\..*)?")


def _fields(raw: Fields) -> Fields:
    moe = section(raw, "moe")
    fields: dict[str, Any] = {ours: integer(raw, theirs) for theirs, ours in _SIZES.items()}
    fields |= {ours: raw[theirs] for theirs, ours in _OTHERS.items() if theirs in raw}
    fields |= {ours: integer(moe, theirs, within="moe.") for theirs, ours in _EXPERTS.items()}
    fields |= {ours: integer(moe, theirs, 0, "moe.") for theirs, ours in _COUNTS.items() if theirs in moe}
    if "routed_scale" in moe:
        fields["routed_scaling_factor"] = number("moe.routed_scale", moe["routed_scale"], above=0.0)
    fields |= {"scoring_func": "softmax", "topk_method": "noaux_tc", "router_bias": False}
    return {**raw, **fields, "rope_parameters": _rope(raw)}


def _rope(raw: Fields) -> Fields:
    theta = number("rope_theta", raw.get("rope_theta", 10000.0), above=0.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if yarn := optional_section(raw, "yarn"):
        rope |= {
            "rope_type": "yarn",
            "factor": number("yarn.factor", yarn.get("factor"), above=0.0),
            "original_max_position_embeddings": integer(yarn, _ORIGINAL, within="yarn."),
            "beta_fast": number("yarn.beta", yarn.get("beta", 32), above=0.0),
            "beta_slow": number("yarn.alpha", yarn.get("alpha", 1), above=0.0),
        }
        scales = flag("yarn.apply_scale", yarn.get("apply_scale", True))
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0} if scales else {"attention_factor": 1.0}
    if scaling := optional_section(raw, "llama_4_scaling"):
        rope["llama_4_scaling_beta"] = number("llama_4_scaling.beta", scaling.get("beta"))
        rope.setdefault(_ORIGINAL, integer(scaling, _ORIGINAL, within="llama_4_scaling."))
    return rope


def _stored(name: str) -> str:
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        module, dot, rest = name.rpartition(".") if name.rpartition(".")[0] in _TOP else (name, "", "")
        return _TOP.get(module, module) + dot + rest
    layer, rest = match.groups()
    if mlp := _IN_MLP.fullmatch(rest):
        where, part, tail = mlp.groups()
        return f"layers.{layer}.{where or 'feed_forward'}.{_MLP[part]}{tail or ''}"
    own = next((m for m in _LAYER if f"{rest}.".startswith(f"{m}.")), None)
    return f"layers.{layer}." + (rest if own is None else _LAYER[own] + rest[len(own) :])


TYPE = ModelType(
    "mistral_large_3",
    "Mistral Large 3 (params.json)",
    _fields,
    Names(
        _stored,
        skipped=(
            "vision_encoder.*",
            "vision_language_adapter.*",
            "patch_merger.*",
            "pre_mm_projector_norm.*",
        ),
        skipped_because="the vision encoder is not served; this model answers text only",
    ),
    own_words={
        **{ours: theirs for theirs, ours in (_SIZES | _OTHERS).items()},
        **{ours: f"moe.{theirs}" for theirs, ours in (_EXPERTS | _COUNTS).items()},
    },
)
