"""Qwen3's mixtures, OLMoE and GLM-4.5: grouped-query attention with V3's layout of experts.

They differ in QK-norm, in the router and in which layers have experts.
"""

from __future__ import annotations

from typing import Any

from farthing.model.fields import flag, in_range, integer, wrong
from farthing.model.types.base import Fields, ModelType, half_split, present, rotated_share, sliding

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


TYPES = (
    ModelType("qwen3_moe", "Qwen3-30B-A3B, Qwen3-Coder, Qwen3-235B-A22B", _qwen3_moe, grouped=True),
    ModelType("glm4_moe", "GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7", _glm4_moe, grouped=True),
    ModelType("olmoe", "OLMoE", _olmoe, grouped=True),
)
