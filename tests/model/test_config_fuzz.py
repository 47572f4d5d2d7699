"""Published configurations with one field changed: a valid model, or one line that names the field."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from farthing.model.config import ModelConfig
from farthing.model.fields import ConfigError
from farthing.model.parameters import parameter_shapes
from farthing.planner.estimate import SAME, published, published_config
from farthing.planner.footprint import stored_by_config

SMALL = dict(num_hidden_layers=4, n_layers=4, num_layers=4)
VALUES = (None, True, "x", -1, 10**30, 99)
GONE = object()
# Names that messages use for a field of the file: its own in V3's words, or its condition.
ALSO = {
    "first_k_dense_replace": ("mlp_layer_types",),
    "index_topk": ("index_n_heads", "index_head_dim"),
    "q_lora_rank": ("index_topk",),
    "num_hidden_layers": ("layer_types",),
    "num_global_key_value_heads": ("num_key_value_heads",),
    "global_head_dim": ("head_dim",),
}


def paths(raw: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field, nested ones included."""
    for name, value in raw.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from paths(value, (*before, name))


def changed(raw: Mapping[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    """A copy with one field replaced, or removed."""
    copied = copy.deepcopy(dict(raw))
    inner = copied
    for name in path[:-1]:
        inner = inner[name]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copied


def shrunk(raw: dict[str, Any]) -> dict[str, Any]:
    """With few layers, so that parameters are quickly listed."""
    text = raw.get("text_config", raw)
    text.update({name: n for name, n in SMALL.items() if name in text})
    for name in ("mlp_layer_types", "indexer_types", "layer_types"):
        if name in text:
            text[name] = text[name][:4]
    return raw


@pytest.mark.parametrize("name", [name for name in published() if name not in SAME])
def test_changed_fields_are_accepted_or_named(name: str) -> None:
    raw = shrunk(published_config(name) or {})
    for path in list(paths(raw)):
        for value in (GONE, *VALUES):
            mutated = changed(raw, path, value)
            try:
                config = ModelConfig.from_json(mutated)
                stored = stored_by_config(mutated)
            except ValueError as error:  # ConfigError and CheckpointError
                message = str(error)
                field = path[-1]
                assert "\n" not in message and "expected" in message and len(message) < 900, message
                names = (field, *ALSO.get(field, ()))
                assert any(each in message for each in names), f"{path} = {value!r}: {message}"
                continue
            unread = IGNORED | IGNORED_BY.get(raw["model_type"], set())
            assert value != 10**30 or path[-1] in unread or path in OVERRIDDEN, path
            if config.num_hidden_layers * config.router_size < 10_000:
                for parameter, shape in parameter_shapes(config):
                    assert all(type(n) is int and n > 0 for n in shape), (path, value, parameter, shape)
                    stored(parameter)


_FP8 = ("quantization_config", "config_groups", "FP8_BLOCK", "input_activations")
_INPUTS = ("group_size", "num_bits", "strategy", "symmetric", "type")
OVERRIDDEN = {
    ("text_config", "tie_word_embeddings"),  # by the wrapper's
    *((*_FP8, field) for field in _INPUTS),  # inputs are not rounded to FP8
}
# Fields that are not read.
IGNORED = {
    "num_key_value_heads", "aux_loss_alpha", "seq_aux", "head_dim", "n_kv_heads", "torch_dtype", "dtype",
    "fmt", "activation_scheme", "scale_fmt", "quantization_status", "input_activations", "dynamic",
    "output_activations", "pretraining_tp", "ep_size", "model_max_length", "use_cache", "vocab",
}  # fmt: skip
_UNUSED_WINDOW = {"sliding_window", "max_window_layers"}  # use_sliding_window is false
IGNORED_BY = {
    "llama": {"rope_interleaved"},
    "minimax_m2": {
        "mlp_intermediate_size", "mtp_transformer_layers", "num_mtp_modules", "use_mtp", "qk_norm_type",
        "use_qk_norm", "scoring_func", "use_routing_bias", "shared_intermediate_size", "shared_moe_mode",
        "sliding_window",
    },
    "qwen3": _UNUSED_WINDOW,
    "qwen3_moe": _UNUSED_WINDOW,
    "smollm3": _UNUSED_WINDOW,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kimi-k2.5", {"text_config": GONE}, "text_config is missing; expected an object"),
        ("mistral-large-3", {"moe": None}, "moe: got null; expected an object"),
        ("longcat-flash", {"q_lora_rank": None}, "q_lora_rank: got null; expected a positive integer"),
        (
            "longcat-flash",
            {"zero_expert_num": GONE},
            "zero_expert_num is missing; expected an integer of at least 0",
        ),
        ("deepseek-v3", {"num_experts_per_tok": 999}, "num_experts_per_tok: got 999; expected 1…256"),
        ("sarvam-105b", {"num_experts": GONE}, "num_experts is missing; expected a positive integer"),
        (
            "deepseek-v3",
            {"num_hidden_layers": True},
            "num_hidden_layers: got True; expected a positive integer",
        ),
        ("deepseek-v3", {"norm_topk_prob": 1}, "norm_topk_prob: got 1; expected true or false"),
        ("deepseek-v3", {"rms_norm_eps": None}, "rms_norm_eps: got null; expected a number greater than 0"),
        ("deepseek-v3", {"norm_topk_prob": None}, "norm_topk_prob: got null; expected true or false"),
        ("deepseek-v3", {"scoring_func": None}, "scoring_func: got null; expected 'sigmoid' or 'softmax'"),
        ("deepseek-v3", {"moe_layer_freq": None}, "moe_layer_freq: got null; expected a positive integer"),
        ("mistral-large-3", {"norm_eps": None}, "norm_eps: got null; expected a number greater than 0"),
        ("deepseek-v3", {"rope_theta": True}, "rope_theta: got True; expected a number greater than 0"),
    ],
)
def test_messages(name: str, change: dict[str, Any], message: str) -> None:
    raw = published_config(name) or {}
    for field, value in change.items():
        raw = changed(raw, (field,), value)
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_json(raw)
    assert message in str(error.value)


def test_the_file_itself_may_be_no_object() -> None:
    for raw in ([], "x", 5, None):
        with pytest.raises(ConfigError, match=r"config.json is .*; expected an object"):
            ModelConfig.from_json(raw)  # type: ignore[arg-type]
