"""Mixtral, MiniMax-M2 and Granite's mixtures: experts under `block_sparse_moe`, with names of their own."""

from __future__ import annotations

import re

from farthing.model.fields import integer
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
from farthing.model.types.llama import multipliers
from farthing.model.types.qwen3_moe import SOFTMAX, experts

_MLP = re.compile(r"(model\.layers\.\d+)\.mlp\.(.*)")
_BIAS = "e_score_correction_bias"
_COUNT = "num_local_experts"
_PART = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_EXPERT = re.compile(r"(experts\.\d+)\.(gate_proj|up_proj|down_proj)")
_STACKS = {
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
    "gate.weight": "router.layer.weight",
}


def _stored(name: str) -> str:
    match = _MLP.fullmatch(name)
    if match is None:
        return name
    inner = _EXPERT.sub(lambda m: f"{m[1]}.{_PART[m[2]]}", match[2])
    return f"{match[1]}.block_sparse_moe.{_BIAS if inner.endswith(_BIAS) else inner}"


def _of_llm_compressor(name: str) -> str:
    match = _MLP.fullmatch(name)
    if match is None:
        return name
    return f"{match[1]}.block_sparse_moe.{_BIAS if match[2].endswith(_BIAS) else match[2]}"


def _of_gptqmodel(name: str) -> str:
    match = _MLP.fullmatch(name)
    return f"{match[1]}.mlp.{_BIAS}" if match and match[2].endswith(_BIAS) else name


_TOOLS = (_of_llm_compressor, _of_gptqmodel)  # as transformers' modules are called


def _granite_stored(name: str) -> str:
    match = _MLP.fullmatch(name)
    return name if match is None else f"{match[1]}.block_sparse_moe.{_STACKS.get(match[2], match[2])}"


def _width(raw: Fields) -> dict[str, int]:
    return {"moe_intermediate_size": integer(raw, "intermediate_size")}


def _mixtral(raw: Fields) -> Fields:
    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2}
    fixed = {"norm_topk_prob": True, **experts(raw, _COUNT), **_width(raw), **sliding(raw)}
    return {**defaults, **present(raw), **SOFTMAX, **half_split(raw, 1e6), **fixed}


def _minimax_m2(raw: Fields) -> Fields:
    """A sigmoid with correction bias as in V3. rotary_dim, if present, is the rotated part of a head."""
    size = integer({"head_dim": 128, **present(raw)}, "head_dim")
    rotated = size if raw.get("rotary_dim") is None else integer(raw, "rotary_dim")
    fixed = {
        "head_dim": size,
        "qk_norm": "whole",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        **rotated_share(raw, rotated / size),
        **experts(raw, _COUNT),
        **_width(raw),
    }
    return {**present(raw), **SOFTMAX, **half_split(raw, 5e6), **fixed}


def _granitemoe(raw: Fields) -> Fields:
    fixed = {**multipliers(raw), "norm_topk_prob": True, **experts(raw, _COUNT), **_width(raw)}
    return {**present(raw), **SOFTMAX, **half_split(raw), **fixed}


_MTP = ("model.mtp.*", "mtp.*")
TYPES = (
    ModelType(
        "mixtral", "Mixtral 8x7B, 8x22B", _mixtral, Names(_stored, variants=_TOOLS), mixers=grouped_layers
    ),
    ModelType(
        "minimax_m2",
        "MiniMax-M2",
        _minimax_m2,
        Names(_stored, _MTP, "the MTP layers of this type are not supported", _TOOLS),
        own_words={"partial_rotary_factor": "rotary_dim"},
        defaults={"num_key_value_heads": 8},
        mixers=grouped_layers,
    ),
    ModelType(
        "granitemoe", "Granite 3.x mixtures", _granitemoe, Names(_granite_stored), mixers=grouped_layers
    ),
)
