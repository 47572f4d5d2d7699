"""DeepSeek-V4: names of its own in published files, transformers' names in those that it saves."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from farthing.model.fields import (
    RopeConfig,
    choice,
    in_range,
    integer,
    number,
    optional_section,
    read_rope,
    section,
    wrong,
)
from farthing.model.forms.compressed import compressed_layers
from farthing.model.types.base import Fields, ModelType, Names, layer_count, per_layer, present
from farthing.ops.specs import Gate, StreamSpec

_KINDS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_SPARSE, _HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
_DEFAULTS: dict[str, Any] = {
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "sliding_window": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
}


def _rates(raw: Fields) -> tuple[list[int], int]:
    """The rate of each layer, and that of layers with an indexer."""
    layers, given = layer_count(raw), optional_section(raw, "compress_rates")
    rates = _KINDS | {kind: integer(given, kind, within="compress_rates.") for kind in given}
    for kind, name in ((_SPARSE, "compress_rate_csa"), (_HEAVY, "compress_rate_hca")):
        if raw.get(name) is not None:
            rates[kind] = integer(raw, name)
    if rates[_SPARSE] == rates[_HEAVY]:
        raise wrong(f"compress_rates.{_HEAVY}", rates[_HEAVY], f"another rate than that of {_SPARSE}")
    kinds, ratios = per_layer(raw, "layer_types", tuple(_KINDS)), raw.get("compress_ratios")
    if not kinds and ratios is not None:
        named = {rate: kind for kind, rate in _KINDS.items()}
        if not isinstance(ratios, list) or any(type(r) is not int or r not in named for r in ratios):
            raise wrong("compress_ratios", ratios, "a list of 0, 4 or 128")
        if len(ratios) < layers:
            raise ValueError(
                f"compress_ratios has {len(ratios)} entries; expected num_hidden_layers = {layers}"
            )
        kinds = [named[rate] for rate in ratios]
    if not kinds:
        kinds = [_HEAVY if i < 2 or i % 2 == 0 else _SPARSE for i in range(layers)]
    return [rates[kind] for kind in kinds[:layers]], rates[_SPARSE]


def _ropes(raw: Fields) -> tuple[dict[str, Any], RopeConfig]:
    """Fields of the rotation where the past is compressed, whose cosines YaRN does not scale, and that of
    layers with a window alone."""
    given = optional_section(raw, "rope_parameters") or optional_section(raw, "rope_scaling")
    if "main" in given and "compress" in given:
        plain, past = section(given, "main"), dict(section(given, "compress"))
    else:
        names = ("rope_theta", "compress_rope_theta")
        own, theirs = (number(name, raw[name], above=0.0) for name in names)
        plain, past = {"rope_theta": own}, {**given, "rope_theta": theirs}
    if past.get("rope_type", past.get("type")) == "yarn":
        past = {"attention_factor": 1.0, **past}
    return {"rope_parameters": past, "rope_scaling": None}, read_rope({"rope_parameters": plain})


def _fields(raw: Fields) -> Fields:
    raw = {**_DEFAULTS, **present(raw)}
    rates, indexed = _rates(raw)
    rotated, plain = _ropes(raw)
    width, share = raw.get("qk_rope_head_dim"), raw.get("partial_rotary_factor")
    if width is None or share is not None:
        share = number("partial_rotary_factor", 0.125 if share is None else share, above=0.0)
        rotary = int(integer(raw, "head_dim") * share)
        if width is not None and width != rotary:
            raise wrong("qk_rope_head_dim", width, f"head_dim · partial_rotary_factor = {rotary}")
        width = rotary
    kinds = per_layer(raw, "mlp_layer_types", ("hash_moe", "moe"))
    if not kinds:
        hashed = in_range("num_hash_layers", raw.get("num_hash_layers", 3), 0)
        kinds = ["hash_moe" if i < hashed else "moe" for i in range(len(rates))]
    drafts = in_range("num_nextn_predict_layers", raw.get("num_nextn_predict_layers", 0), 0, 64)
    in_range("num_key_value_heads", raw.get("num_key_value_heads", 1), 1, 1)
    choice("expert_dtype", raw.get("expert_dtype", "fp8"), ("fp4", "fp8"))  # in files with scales
    limit = number("swiglu_limit", raw.get("swiglu_limit", 10.0), above=0.0)
    return {
        **raw,
        **rotated,
        "intermediate_size": integer(raw, "moe_intermediate_size"),
        "rates": [*rates, *[0] * drafts],
        "indexed": indexed,
        "window_rope": plain,
        "qk_rope_head_dim": width,
        "index_topk": None,
        "indexer": raw.get("index_topk"),
        "hashed_layers": [i for i, kind in enumerate(kinds[: len(rates)]) if kind == "hash_moe"],
        "gate": Gate(limit=limit),
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": drafts,
        "streams": StreamSpec(
            in_range("hc_mult", raw.get("hc_mult", 4), 1, 16),
            in_range("hc_sinkhorn_iters", raw.get("hc_sinkhorn_iters", 20), 1),
            number("hc_eps", raw.get("hc_eps", 1e-6), above=0.0),
            number("rms_norm_eps", raw["rms_norm_eps"], above=0.0),
        ),
    }


_RENAMED = (  # from transformers' names, in this order
    (r"^model\.embed_tokens", "embed"),
    (r"^lm_head", "head"),
    (r"\bhc_head\.hc_", "hc_head_"),
    (r"\.shared_head\.norm\.", ".norm."),
    (r"^model\.", ""),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.compressor\.indexer\.scorer\.", ".indexer."),
    (r"\.compressor\.indexer\.q_b_proj", ".indexer.wq_b"),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"(compressor)\.kv_norm\.", r"\1.norm."),
    (r"\.position_bias", ".ape"),
    (r"\.gate_proj(?=\.|$)", ".wgate"),
    (r"\.kv_proj", ".wkv"),
    (r"\.q_a_proj", ".wq_a"),
    (r"\.q_b_proj", ".wq_b"),
    (r"\.q_a_norm", ".q_norm"),
    (r"\.o_([ab])_proj", r".wo_\1"),
    (r"\.sinks", ".attn_sink"),
    (r"\.e_score_correction_bias", ".bias"),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
)
_EXPERT = re.compile(r"(experts(?:\.\d+)?)\.(gate|down|up)_proj")
_PARTS = {"gate": "w1", "down": "w2", "up": "w3"}


@lru_cache(maxsize=8192)  # a plan asks for each name several times
def _published(name: str) -> str:
    name = _EXPERT.sub(lambda m: f"{m[1]}.{_PARTS[m[2]]}", name)
    for pattern, by in _RENAMED:
        name = re.sub(pattern, by, name)
    return name


def _draft(number: int, name: str) -> str:
    return f"mtp.{number}." + _published(f"model.layers.{number}.{name}").removeprefix(f"layers.{number}.")


def _saved(name: str) -> str:
    """As transformers saves: the leaves of published files, under its own names of modules."""
    if not name.startswith("model.layers."):
        return re.sub(r"^lm_head", "head", name)
    return "model." + _published(name).replace(".attn.kv_norm.", ".attn.norm.")


TYPE = ModelType(
    "deepseek_v4",
    "DeepSeek-V4-Flash, V4-Pro",
    _fields,
    Names(
        _published,
        variants=(_saved, lambda name: name),
        drafts=_draft,
    ),
    mixers=compressed_layers,
    defaults={"n_shared_experts": 1},
)
