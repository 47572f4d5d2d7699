"""Llama and its dense relatives: grouped-query attention and an MLP in every layer.

Layers are stored under the names that DeepSeek-V3 took over, so only config fields need translation.
"""

from __future__ import annotations

from typing import Any

from farthing.model.fields import flag, in_range, integer, number, wrong
from farthing.model.forms.grouped import grouped_layers
from farthing.model.types.base import Fields, ModelType, Names, half_split, present, sliding

_INV_FREQ = Names(skipped=("*.rotary_emb.inv_freq",))
DENSE: dict[str, Any] = {"n_routed_experts": None, "num_nextn_predict_layers": 0}
QKV_BIAS: dict[str, Any] = {"attention_bias": True, "o_bias": False}  # Qwen2's


def _llama(raw: Fields) -> Fields:
    return {**present(raw), **DENSE, **half_split(raw)}


def _mistral(raw: Fields) -> Fields:
    """sliding_window is 4096 if the field is absent, as in transformers."""
    return {**present(raw), **DENSE, **half_split(raw), **sliding({"sliding_window": 4096, **raw})}


def qwen_windows(raw: Fields, switch: bool = True) -> dict[str, Any]:
    """Layers from max_window_layers on have the window, unless layer_types says otherwise."""
    first = in_range("max_window_layers", raw.get("max_window_layers", 28), 0)
    return sliding({"sliding_window": 4096, **raw}, switch=switch, layers=lambda i: i >= first)


def _qwen2(raw: Fields) -> Fields:
    return {**present(raw), **DENSE, **half_split(raw), **QKV_BIAS, **qwen_windows(raw)}


def _qwen3(raw: Fields) -> Fields:
    fixed = {"qk_norm": "head", **qwen_windows(raw)}
    return {"head_dim": 128, **present(raw), **DENSE, **half_split(raw), **fixed}


def _seed_oss(raw: Fields) -> Fields:
    """The output has a bias of its own switch, off in released files."""
    given = {"attention_bias": True, "attention_out_bias": False, **present(raw)}
    bias, o_bias = (flag(name, given[name]) for name in ("attention_bias", "attention_out_bias"))
    if o_bias and not bias:
        raise wrong("attention_out_bias", True, "false where attention_bias is false")
    sizes = {"head_dim": 128, "num_key_value_heads": 8}
    return {**sizes, **present(raw), **DENSE, **half_split(raw), "attention_bias": bias, "o_bias": o_bias}


def multipliers(raw: Fields) -> dict[str, Any]:
    """Granite's: of the embedding, the residual branches, the scores and the logits.

    A residual stream divided by residual_multiplier needs no multiplier of its branches: norms do not depend
    on the scale of their input but for eps, which is divided by the square.
    """
    named = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    embedding, residual, scores, logits = (number(n, raw.get(n, 1.0), above=0.0) for n in named)
    eps = number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), above=0.0)
    return {
        "rms_norm_eps": eps / residual**2,
        "embedding_scale": embedding / residual,
        "attention_multiplier": scores,
        "logit_scale": 1.0 / logits,
    }


def _granite(raw: Fields) -> Fields:
    return {**present(raw), **DENSE, **half_split(raw), **multipliers(raw)}


def _smollm3(raw: Fields) -> Fields:
    """Layers with 0 in no_rope_layers, by default every no_rope_layer_interval-th, do not rotate."""
    layers = integer(raw, "num_hidden_layers")
    every = integer({"no_rope_layer_interval": 4, **present(raw)}, "no_rope_layer_interval")
    listed = raw.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(listed, list) or len(listed) < layers or not set(listed) <= {0, 1}:
        raise ValueError(f"no_rope_layers: got {listed!r}; expected 0 or 1 for each of {layers} layers")
    fixed = {
        "unrotated": [i for i in range(layers) if not listed[i]],
        "tie_word_embeddings": flag("tie_word_embeddings", raw.get("tie_word_embeddings", True)),
        **sliding(raw, switch=True, layers=lambda i: not listed[i]),
    }
    return {"num_key_value_heads": 4, **present(raw), **DENSE, **half_split(raw, 2e6), **fixed}


def _headless(name: str) -> str:
    """The name in a checkpoint of the layers alone, as Qwen3-Embedding's: its embedding stands in for a head,
    which nothing reads."""
    return "embed_tokens.weight" if name == "lm_head.weight" else name.removeprefix("model.")


_QWEN3_NAMES = Names(variants=(_headless,))

TYPES = (
    ModelType("llama", "Llama 2, 3.x; SmolLM2", _llama, _INV_FREQ, mixers=grouped_layers),
    ModelType(
        "mistral",
        "Mistral 7B, Nemo, Small (text)",
        _mistral,
        mixers=grouped_layers,
        defaults={"num_key_value_heads": 8},
    ),
    ModelType(
        "qwen2",
        "Qwen2 and 2.5 0.5B to 72B, QwQ, distillations of R1",
        _qwen2,
        mixers=grouped_layers,
        defaults={"num_key_value_heads": 32},
    ),
    ModelType(
        "qwen3",
        "Qwen3 0.6B to 32B, Embedding, Reranker",
        _qwen3,
        _QWEN3_NAMES,
        mixers=grouped_layers,
        defaults={"num_key_value_heads": 32},
    ),
    ModelType("smollm3", "SmolLM3", _smollm3, mixers=grouped_layers),
    ModelType("seed_oss", "Seed-OSS 36B", _seed_oss, mixers=grouped_layers),
    ModelType("granite", "Granite 3.x, dense", _granite, mixers=grouped_layers),
)
