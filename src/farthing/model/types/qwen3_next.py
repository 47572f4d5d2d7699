"""Qwen3-Next, and Qwen3.5 and 3.6: three of four layers are Gated DeltaNet, the others gated attention.

Attention's output is multiplied by the sigmoid of a gate, a quarter of each head is rotated, norms have
weights around zero, and the shared expert has a gate of its own.
"""

from __future__ import annotations

import re
from typing import Any

from farthing.model.fields import in_range, integer, section, wrong
from farthing.model.types.base import (
    Fields,
    ModelType,
    Names,
    half_split,
    per_layer,
    present,
    rotated_share,
    tied,
)
from farthing.model.types.qwen3_moe import SOFTMAX, experts, sparse_layers

_KINDS = ("linear_attention", "full_attention")
_SHARED = re.compile(r"\.mlp\.shared_experts\.")


def _hybrid(raw: Fields, fused: bool) -> dict[str, Any]:
    """What the types share. Layers are listed, or every full_attention_interval-th has attention."""
    layers = integer(raw, "num_hidden_layers")
    every = integer({"full_attention_interval": 4, **present(raw)}, "full_attention_interval")
    kinds = per_layer(raw, "layer_types", _KINDS) or [_KINDS[(i + 1) % every == 0] for i in range(layers)]
    drafts = "mtp_num_hidden_layers" if raw.get("mtp_num_hidden_layers") else "num_nextn_predict_layers"
    return {
        "recurrent_layers": [i for i, kind in enumerate(kinds) if kind == _KINDS[0]],
        "fused": fused,
        "qk_norm": "head",
        "output_gate": True,
        "norm_offset": 1.0,
        **rotated_share(raw, 0.25),
        "n_shared_experts": 1,
        "shared_gate": True,
        "shared_intermediate_size": integer(raw, "shared_expert_intermediate_size"),
        **experts(raw),
        "num_nextn_predict_layers": in_range(drafts, raw.get(drafts) or 0, 0, 64),
    }


def _qwen3_next(raw: Fields) -> Fields:
    defaults = {"norm_topk_prob": True, "head_dim": 256, "num_key_value_heads": 2}
    fixed = {**_hybrid(raw, True), **sparse_layers(raw)}
    return {**defaults, **present(raw), **SOFTMAX, **half_split(raw), **fixed}


def _qwen3_5_moe(raw: Fields) -> Fields:
    """Every layer has experts, whose weights are always normalized."""
    fixed = {**_hybrid(raw, False), "norm_topk_prob": True}
    fixed["intermediate_size"] = integer(raw, "moe_intermediate_size")  # of no layer
    defaults = {"head_dim": 256, "num_key_value_heads": 2}
    return {**defaults, **present(raw), **SOFTMAX, **half_split(raw), **fixed}


def _nested(raw: Fields) -> Fields:
    text = section(raw, "text_config")
    if text.get("model_type") not in (None, "qwen3_5_moe_text"):
        raise wrong("text_config.model_type", text.get("model_type"), "'qwen3_5_moe_text'")
    ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id")}
    return _qwen3_5_moe({**ids, **text, **tied(raw)})


def _stored(name: str) -> str:
    return _SHARED.sub(".mlp.shared_expert.", name)


def _under_language_model(name: str) -> str:
    return re.sub(r"^model\.", "model.language_model.", _stored(name))


_DRAFT = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc"}
_DRAFT |= {"shared_head.norm": "norm"}


def _drafts(layer: int, rest: str) -> str:
    """The MTP layer has attention. Of several only the first one's input is described by these names."""
    own = next((part for part in _DRAFT if f"{rest}.".startswith(f"{part}.")), None)
    if own is not None:
        return f"mtp.{_DRAFT[own]}{rest[len(own) :]}"
    return _stored(f"mtp.layers.{layer}.{rest}")


_VISION, _TEXT_ONLY = ("model.visual.*",), "the vision tower is not served; this model answers text only"
TYPES = (
    ModelType(
        "qwen3_next",
        "Qwen3-Next-80B-A3B, Qwen3-Coder-Next",
        _qwen3_next,
        Names(_stored, drafts=_drafts),
        own_words={"shared_intermediate_size": "shared_expert_intermediate_size"},
        grouped=True,
    ),
    ModelType(
        "qwen3_5_moe",
        "Qwen3.5 and 3.6 mixtures: 35B-A3B, 122B-A10B, 397B-A17B (text)",
        _nested,
        Names(_under_language_model, _VISION, _TEXT_ONLY, variants=(_stored,), drafts=_drafts),
        grouped=True,
    ),
    ModelType(
        "qwen3_5_moe_text",
        "the text model of qwen3_5_moe on its own",
        _qwen3_5_moe,
        Names(_stored, _VISION, _TEXT_ONLY, variants=(_under_language_model,), drafts=_drafts),
        grouped=True,
    ),
)
