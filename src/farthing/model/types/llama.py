"""Llama and its dense relatives: grouped-query attention and an MLP in every layer.

Layers are stored under the names that DeepSeek-V3 took over, so only config fields need translation.
"""

from __future__ import annotations

from typing import Any

from farthing.model.fields import flag, in_range, integer
from farthing.model.types.base import Fields, ModelType, Names, half_split, present, sliding

_INV_FREQ = Names(skipped=("*.rotary_emb.inv_freq",))
DENSE: dict[str, Any] = {"n_routed_experts": None, "num_nextn_predict_layers": 0}


def _llama(raw: Fields) -> Fields:
    return {**present(raw), **DENSE, **half_split(raw)}


def _mistral(raw: Fields) -> Fields:
    """sliding_window is 4096 if the field is absent, as in transformers."""
    return {**present(raw), **DENSE, **half_split(raw), **sliding({"sliding_window": 4096, **raw})}


def _qwen3(raw: Fields) -> Fields:
    first = in_range("max_window_layers", raw.get("max_window_layers", 28), 0)
    windows = sliding({"sliding_window": 4096, **raw}, switch=True, layers=lambda i: i >= first)
    return {"head_dim": 128, **present(raw), **DENSE, **half_split(raw), "qk_norm": "head", **windows}


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
    ModelType("llama", "Llama 2, 3.x; SmolLM2", _llama, _INV_FREQ, grouped=True),
    ModelType("mistral", "Mistral 7B, Nemo, Small (text)", _mistral, grouped=True),
    ModelType("qwen3", "Qwen3 0.6B to 32B, Embedding, Reranker", _qwen3, _QWEN3_NAMES, grouped=True),
    ModelType("smollm3", "SmolLM3", _smollm3, grouped=True),
)
