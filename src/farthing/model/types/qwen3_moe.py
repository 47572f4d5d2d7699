"""Qwen2's and Qwen3's mixtures, OLMoE, GLM-4.5 and its relatives: grouped-query attention with V3's layout of
experts.

They differ in QK-norm, in the router and in which layers have experts.
"""

from __future__ import annotations

import re
from typing import Any

from farthing.model.fields import flag, in_range, integer, wrong
from farthing.model.forms.grouped import grouped_layers
from farthing.model.types.base import (
    Fields,
    ModelType,
    Names,
    half_split,
    present,
    rotated_share,
    sliding,
)
from farthing.model.types.llama import qwen_windows

# A softmax over all experts, whose best are taken without a correction bias.
SOFTMAX: dict[str, Any] = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_shared_experts": 0,
    "shared_intermediate_size": None,  # MiniMax-M2 is released with 0
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
}


def experts(raw: Fields, name: str = "num_experts") -> dict[str, Any]:
    """n_routed_experts from the type's name for it, or the other that transformers writes."""
    key = next((n for n in (name, "num_experts", "num_local_experts") if raw.get(n) is not None), name)
    return {"n_routed_experts": integer(raw, key)}


def sparse_layers(raw: Fields) -> dict[str, Any]:
    """Which layers have no experts: all but every decoder_sparse_step-th, and mlp_only_layers."""
    layers = integer(raw, "num_hidden_layers")
    step = integer({"decoder_sparse_step": 1, **present(raw)}, "decoder_sparse_step")
    listed = raw.get("mlp_only_layers") or []
    if not isinstance(listed, list):
        raise wrong("mlp_only_layers", listed, "a list of layers")
    only = {in_range("mlp_only_layers", i, 0) for i in listed}
    return {"dense_layers": [i for i in range(layers) if i in only or (i + 1) % step]}


_SHARED = re.compile(r"\.mlp\.shared_experts\.")


def shared_stored(name: str) -> str:
    """The name of a tensor where the shared expert's are called `shared_expert`."""
    return _SHARED.sub(".mlp.shared_expert.", name)


def shared_expert(raw: Fields) -> dict[str, Any]:
    """One shared expert with a gate of its own."""
    width = integer(raw, "shared_expert_intermediate_size")
    return {"n_shared_experts": 1, "shared_gate": True, "shared_intermediate_size": width}


def _qwen2_moe(raw: Fields) -> Fields:
    """Queries, keys and values have biases; a shared expert has a gate of its own."""
    bias = flag("qkv_bias", raw.get("qkv_bias", True))
    fixed: dict[str, Any] = {"attention_bias": bias, "o_bias": False, **sparse_layers(raw)}
    fixed["norm_topk_prob"] = flag("norm_topk_prob", raw.get("norm_topk_prob", False))
    most = in_range("max_window_layers", raw.get("max_window_layers", 28), 0)
    windows = {"sliding_window": 4096, **raw}
    fixed |= sliding(windows, switch=True, layers=lambda i: i % 2 == 0 and i < most)
    return {**present(raw), **SOFTMAX, **experts(raw), **half_split(raw), **fixed, **shared_expert(raw)}


def _qwen3_moe(raw: Fields) -> Fields:
    """norm_topk_prob is false if the field is absent, as in transformers; released files have it."""
    normalized = flag("norm_topk_prob", raw.get("norm_topk_prob", False))
    fixed: dict[str, Any] = {"qk_norm": "head", "norm_topk_prob": normalized, **sparse_layers(raw)}
    fixed |= sliding({"sliding_window": 4096, **raw}, switch=True)
    return {**present(raw), **SOFTMAX, **experts(raw), **half_split(raw), **fixed}


def _olmoe(raw: Fields) -> Fields:
    if raw.get("clip_qkv") is not None:
        raise wrong("clip_qkv", raw["clip_qkv"], "null: clipped queries are not supported")
    normalized = flag("norm_topk_prob", raw.get("norm_topk_prob", False))
    fixed: dict[str, Any] = {"qk_norm": "whole", "norm_topk_prob": normalized, **experts(raw)}
    fixed["moe_intermediate_size"] = integer(raw, "intermediate_size")
    return {"rms_norm_eps": 1e-5, **present(raw), **SOFTMAX, **half_split(raw), **fixed}


def _glm4_moe(raw: Fields) -> Fields:
    """V3's experts and MTP layer. o_proj has no bias where q, k and v have one."""
    fixed: dict[str, Any] = {"o_bias": False, **rotated_share(raw, 0.5)}
    if flag("use_qk_norm", raw.get("use_qk_norm", False)):
        fixed["qk_norm"] = "head"
    defaults = {"first_k_dense_replace": 1, "rms_norm_eps": 1e-5}
    return {**defaults, **present(raw), **half_split(raw), **fixed}


def _dots1(raw: Fields) -> Fields:
    """V3's experts behind heads with norms, in some layers with a window."""
    fixed = {"qk_norm": "head", "num_nextn_predict_layers": 0}
    fixed |= qwen_windows({"max_window_layers": 62, **raw}, switch=False)
    defaults = {"first_k_dense_replace": 0, "norm_topk_prob": False}
    return {**defaults, **present(raw), **half_split(raw), **fixed}


def _solar_open(raw: Fields) -> Fields:
    """GLM-4.5 without norms of heads; every layer has experts, and whole heads are rotated."""
    if (share := rotated_share(raw, 1.0)["partial_rotary_factor"]) != 1:
        raise wrong("partial_rotary_factor", share, "1, as transformers computes no other")
    fixed: dict[str, Any] = {"o_bias": False, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    fixed["intermediate_size"] = integer(raw, "moe_intermediate_size")  # of no layer
    defaults = {"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "n_shared_experts": 1}
    return {**defaults, **present(raw), **half_split(raw, 1e6), **fixed}


OWN_WORDS = {"shared_intermediate_size": "shared_expert_intermediate_size"}
TYPES = (
    ModelType(
        "qwen2_moe",
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        _qwen2_moe,
        Names(shared_stored),
        OWN_WORDS,
        mixers=grouped_layers,
        defaults={"num_key_value_heads": 16},
    ),
    ModelType(
        "qwen3_moe",
        "Qwen3-30B-A3B, Qwen3-Coder, Qwen3-235B-A22B",
        _qwen3_moe,
        mixers=grouped_layers,
        defaults={"num_key_value_heads": 4},
    ),
    ModelType(
        "glm4_moe",
        "GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
        _glm4_moe,
        mixers=grouped_layers,
        defaults={"num_key_value_heads": 8, "n_shared_experts": 1},
    ),
    ModelType("olmoe", "OLMoE", _olmoe, mixers=grouped_layers),
    ModelType("dots1", "dots.llm1", _dots1, mixers=grouped_layers, defaults={"num_key_value_heads": 32}),
    ModelType("solar_open", "Solar Open 100B", _solar_open, mixers=grouped_layers),
)
