"""Qwen3-Next, and Qwen3.5 and 3.6: three of four layers are Gated DeltaNet, the others gated attention.

Attention's output is multiplied by the sigmoid of a gate, a quarter of each head is rotated, norms have
weights around zero, and the shared expert has a gate of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from farthing.model.fields import in_range, integer, section, wrong
from farthing.model.forms.grouped import grouped_layers
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
from farthing.model.types.qwen3_moe import (
    OWN_WORDS,
    SOFTMAX,
    experts,
    shared_expert,
    shared_stored,
    sparse_layers,
)

_KINDS = ("linear_attention", "full_attention")


def _hybrid(raw: Fields, fused: bool) -> dict[str, Any]:
    """What the types share but for experts. Layers are listed, or every full_attention_interval-th has
    attention."""
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
        "num_nextn_predict_layers": in_range(drafts, raw.get(drafts) or 0, 0, 64),
    }


def _qwen3_next(raw: Fields) -> Fields:
    defaults = {"norm_topk_prob": True, "head_dim": 256, "num_key_value_heads": 2}
    fixed = {**_hybrid(raw, True), **experts(raw), **shared_expert(raw), **sparse_layers(raw)}
    return {**defaults, **present(raw), **SOFTMAX, **half_split(raw), **fixed}


def _qwen3_5_moe(raw: Fields) -> Fields:
    """Every layer has experts, whose weights are always normalized."""
    fixed = {**_hybrid(raw, False), **experts(raw), **shared_expert(raw), "norm_topk_prob": True}
    fixed["intermediate_size"] = integer(raw, "moe_intermediate_size")  # of no layer
    defaults = {"head_dim": 256, "num_key_value_heads": 2}
    return {**defaults, **present(raw), **SOFTMAX, **half_split(raw), **fixed}


def _qwen3_5(raw: Fields) -> Fields:
    """No layer has experts."""
    defaults = {"head_dim": 256, "num_key_value_heads": 4}
    return {**defaults, **present(raw), **half_split(raw), **_hybrid(raw, False), "n_routed_experts": None}


def _nested(fields: Callable[[Fields], Fields], kind: str) -> Callable[[Fields], Fields]:
    """Of a checkpoint with a vision tower."""

    def read(raw: Fields) -> Fields:
        text = section(raw, "text_config")
        if text.get("model_type") not in (None, kind):
            raise wrong("text_config.model_type", text.get("model_type"), repr(kind))
        ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id")}
        return fields({**ids, **text, **tied(raw, text, default=False)})

    return read


def _under_language_model(name: str) -> str:
    return re.sub(r"^model\.", "model.language_model.", shared_stored(name))


_DRAFT = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc"}
_DRAFT |= {"shared_head.norm": "norm"}


def _drafts(layer: int, rest: str) -> str:
    """The MTP layer has attention. Of several only the first one's input is described by these names."""
    own = next((part for part in _DRAFT if f"{rest}.".startswith(f"{part}.")), None)
    if own is not None:
        return f"mtp.{_DRAFT[own]}{rest[len(own) :]}"
    return shared_stored(f"mtp.layers.{layer}.{rest}")


_VISION, _TEXT_ONLY = ("model.visual.*",), "the vision tower is not served; this model answers text only"
TYPES = (
    ModelType(
        "qwen3_next",
        "Qwen3-Next-80B-A3B, Qwen3-Coder-Next",
        _qwen3_next,
        Names(shared_stored, drafts=_drafts),
        own_words=OWN_WORDS,
        mixers=grouped_layers,
    ),
    ModelType(
        "qwen3_5_moe",
        "Qwen3.5 and 3.6 mixtures: 35B-A3B, 122B-A10B, 397B-A17B (text)",
        _nested(_qwen3_5_moe, "qwen3_5_moe_text"),
        Names(_under_language_model, _VISION, _TEXT_ONLY, variants=(shared_stored,), drafts=_drafts),
        mixers=grouped_layers,
    ),
    ModelType(
        "qwen3_5_moe_text",
        "the text model of qwen3_5_moe on its own",
        _qwen3_5_moe,
        Names(shared_stored, _VISION, _TEXT_ONLY, variants=(_under_language_model,), drafts=_drafts),
        mixers=grouped_layers,
    ),
    ModelType(
        "qwen3_5",
        "Qwen3.5 and 3.6, dense: 0.8B to 27B (text)",
        _nested(_qwen3_5, "qwen3_5_text"),
        Names(_under_language_model, _VISION, _TEXT_ONLY, variants=(shared_stored,), drafts=_drafts),
        mixers=grouped_layers,
    ),
    ModelType(
        "qwen3_5_text",
        "the text model of qwen3_5 on its own",
        _qwen3_5,
        Names(shared_stored, _VISION, _TEXT_ONLY, variants=(_under_language_model,), drafts=_drafts),
        mixers=grouped_layers,
    ),
)
